"""The command that draws."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import Refused, one_of
from ..record import write_atomic
from ..studio.page import document, embedded, gallery, section
from .console import progress, result

SHOWN = ("control_weight", "control_start", "control_end", "reference_scale", "strength")
"""Numbers of which 0 is one that is said."""


def generate(
    folder: Path,
    prompts: list[str],
    count: int,
    wanted: dict[str, Any],
    out: Path,
    device: str,
    as_json: bool,
    kinds: Sequence[str] = (),
    fps: float | None = None,
    guides: Sequence[Path] = (),
) -> None:
    """Draw `count` pictures or clips of each prompt into `out`, with a page that shows them.

    Args:
        kinds: of file; default PNG, of clips MP4. fps: of clips; default as the model was trained.
    """
    from ..generation import files, load
    from ..generation.sheet import sheet_of
    from ..stages.guides import attach
    from ..training.device import resolve

    model = load(folder, device=str(resolve(device)))
    loras = wanted.pop("loras", [])
    for file, weight in loras:
        model.add_lora(file, weight)
    for place in guides:
        attach(model, place)
    if not prompts and model.conditioner.kind != "none":
        raise Refused('Say what to draw: --prompt "a red apple". Repeat --prompt for several pictures.')
    known = files.CLIP_KINDS if "frames" in model.info else files.PICTURE_KINDS
    kinds = [one_of("--format", kind, known) for kind in kinds or known[:1]]
    if fps is not None and "frames" not in model.info:
        raise Refused(f"--fps {fps:g}: this model draws pictures, not clips. Leave --fps out.")
    fps = float(model.info.get("fps", files.DEFAULT_FPS)) if fps is None else files.check_fps(fps)
    asked = [prompt for prompt in prompts or [""] for _ in range(count)]
    options: dict[str, Any] = {
        name: value
        for name, value in wanted.items()
        if name in SHOWN or value not in (None, "", 0) or (name in ("seed", "guidance") and value == 0)
    }
    told = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    if "guidance_by" in options:
        options["guidance_by"] = load(options["guidance_by"], device=str(resolve(device)))
    with progress() as shown:
        drawn = model.generate(
            prompt=asked, watch=lambda done, total: shown(done, total, "drawing"), **options
        )
    listed = []
    for index, (prompt, one) in enumerate(zip(asked, drawn, strict=True)):
        seed = wanted["seed"] + index
        said = {"prompt": prompt, **plain(told), "seed": seed, "model": folder.name}
        said |= {"loras": [f"{Path(file).name}:{weight:g}" for file, weight in loras]} if loras else {}
        place = out / f"{index:03d}-{slug(prompt)}-{seed}"
        listed.append({**keep(one, place, kinds, said, fps), "prompt": prompt, "seed": seed})
    sheet, page = out / "sheet.png", out / "index.html"
    write_atomic(sheet, files.png(sheet_of(drawn, asked), {}))
    shown_there = [
        (embedded(*moving(one, fps)), row["prompt"], f"seed {row['seed']}")
        for one, row in zip(drawn, listed, strict=True)
    ]
    title = "Clips" if files.is_clip(drawn[0]) else "Pictures"
    write_atomic(page, document(title, f"By {folder}.", [section("Drawn", gallery(shown_there))]))
    result(
        {"pictures": listed, "sheet": sheet, "page": page},
        "\n".join([*(file for one in listed for file in one["files"]), str(sheet), str(page)]),
        as_json,
    )


def keep(drawn: Any, place: Path, kinds: Sequence[str], said: dict[str, Any], fps: float) -> dict[str, Any]:
    """Write a picture or clip to `place` and an ending; where it is now, numbered frames as their folder."""
    from ..generation import files

    written = []
    for kind in kinds:
        for ending, content in files.contents(drawn, kind, said, fps).items():
            file = Path(f"{place}{ending}")
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, content)
            written.append(str(file))
    frames = next((i for i, kind in enumerate(kinds) if kind == "frames"), None)
    first = str(place) if frames == 0 else written[0]
    return {"file": first, "files": written}


def moving(drawn: Any, fps: float) -> tuple[bytes, str]:
    """What a page shows of a picture or clip: its bytes and what they are."""
    from PIL import Image

    from ..generation import files

    if not files.is_clip(drawn):
        return files.png(drawn, {}), "image/png"
    return files.webp([Image.fromarray(frame) for frame in drawn], {}, fps), "image/webp"


def slug(text: str, most: int = 40) -> str:
    """A text as a part of a file's name."""
    kept = "".join(letter if letter.isalnum() else "-" for letter in text.lower())
    return "-".join(part for part in kept.split("-") if part)[:most] or "picture"


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """The options that can be written down: all but pictures."""
    from PIL.Image import Image

    def is_picture(value: Any) -> bool:
        return any(map(is_picture, value)) if isinstance(value, list) else isinstance(value, Image)

    return {name: value for name, value in options.items() if not is_picture(value)}


def shown(said: dict[str, Any], control_from: str) -> dict[str, Any]:
    """The pictures that guide and their numbers, as `generate` takes them.

    Raises:
        Refused: a file that cannot be read, or a kind of control without one.
    """
    from ..stages.seeing import picture

    known = {name: value for name, value in said.items() if value not in (None, [])}
    for name in ("reference", "init", "mask"):
        if name in known:
            known[name] = picture(known[name])
    if "control" in known:
        known["control"] = [picture(file) for file in known["control"]]
        if control_from:
            known["control"] = [made(one, control_from) for one in known["control"]]
    elif control_from:
        raise Refused("--control-from makes a control of a file: give --control FILE too, or leave it out.")
    for name in ("control_weight", "control_start", "control_end"):
        if name in known and len(known[name]) == 1:
            known[name] = known[name][0]
    return known


def made(one: Any, kind: str) -> Any:
    """A control picture of this kind, made of a picture."""
    from ..data.controls import control
    from ..data.media import fit, to_pixels
    from ..generation import to_images

    return to_images(control(to_pixels(fit(one, *one.size)[None]), kind))[0]


def further(images: list[Path], options: list[str], loras: list[str]) -> dict[str, Any]:
    """Arguments of `generate` that only some models take, from the command line.

    Raises:
        Refused: an option that is no NAME=VALUE.
    """
    known: dict[str, Any] = {"image": [[str(image) for image in images]]} if images else {}
    if loras:
        known["loras"] = [weighted(lora) for lora in loras]
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name.strip():
            raise Refused(f'--option "{option}" must be NAME=VALUE, such as max_sequence_length=128.')
        try:
            known[name.strip()] = json.loads(value)
        except ValueError:
            known[name.strip()] = value
    return known


def weighted(lora: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT.

    Raises:
        Refused: a weight that is no number.
    """
    file, colon, weight = lora.rpartition(":")
    if not colon or Path(lora).exists():
        return lora, 1.0
    try:
        return file, float(weight)
    except ValueError:
        raise Refused(f'--lora "{lora}": "{weight}" is no weight. Write FILE or FILE:0.8.') from None
