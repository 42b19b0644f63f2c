"""The commands about recipes: write a short one, say what one would do."""

from pathlib import Path
from typing import Any

from ..errors import Refused
from ..record import write_atomic
from .console import result, say
from .lengths import lengths

TEMPLATE = """\
# sfumato plan {file}     says what will run
# sfumato train {file}    trains; the same command resumes
output = "runs/{name}"
seed = 0

[model]
base = {base}{base_note}

[data]
train = {data}
captions = "{captions}"{captions_note}
resolution = {resolution:<14} # pictures have about resolution x resolution pixels{frames}

[train]
steps = {steps}
batch = {batch}
learning_rate = 1e-4
save_every = 500

[sample]
every = 500                 # steps between pictures
prompts = []                # what is drawn; empty: captions of the data, trained and held out
"""


def new(name: str, data: str, base: str, train: str) -> None:
    """Write NAME.toml, with only the keys that matter."""
    from ..data.settings import EMBEDDED
    from ..recipe import Recipe, quoted

    file = Path(name if name.endswith(".toml") else f"{name}.toml")
    if file.exists():
        raise Refused(f"{file} exists already. Choose another name, or remove it.")
    place = Path(data).expanduser()
    if data not in EMBEDDED and not (place.is_dir() or place.suffix.lower() in (".tar", ".npz", ".parquet")):
        raise Refused(
            f"{data} is no folder, .tar, .npz or .parquet. Give --data a folder of pictures, or one of "
            f"{', '.join(EMBEDDED)}."
        )
    captions = _captions(data, EMBEDDED)
    text = TEMPLATE.format(
        file=file,
        name=file.stem,
        base=quoted(base),
        base_note="            # or the folder of a model to go on from" if base == "scratch" else "",
        data=quoted(data),
        captions=captions,
        **lengths(base, data),
        captions_note="          # files (metadata or .txt beside), folder (class names) or none",
    )
    if train != "full":
        rank = (
            "\nrank = 16                   # larger learns more, and more by heart" if train == "lora" else ""
        )
        text = text.replace("\n[data]", f"train = {quoted(train)}{rank}\n\n[data]", 1)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text)
    try:
        Recipe.read(file)
    except Refused:
        file.unlink()
        raise
    say(f"Next: sfumato plan {file}, then sfumato train {file}.")
    print(file)


def _captions(data: str, embedded: tuple[str, ...]) -> str:
    """Where a folder's captions seem to be: beside the pictures, or in the names of its folders."""
    from ..data import archives
    from ..data.metadata import FILES
    from ..data.sources import SIDECARS

    folder = Path(data).expanduser()
    if data in embedded or archives.recognise(folder) is not None:
        return "files"
    named = (FILES, tuple(f"*{suffix}" for suffix in SIDECARS))
    if any(next(folder.rglob(name), None) for names in named for name in names):
        return "files"
    return "folder" if any(entry.is_dir() for entry in folder.iterdir()) else "none"


def plan(recipe: Path, overrides: list[str], fit: str, devices: int, as_json: bool) -> None:
    """Print what the recipe would do; nothing is trained, encoded or written."""
    from .. import workflow
    from ..recipe import Recipe
    from ..settings import plain

    read = Recipe.read(recipe, overrides)
    for note in read.notes:
        say(note)
    fitted: dict[str, Any] = {}
    if fit:
        read, fitted = workflow.fitted(read, fit, devices)
    found = workflow.plan(read, devices)
    values = {
        name: {"value": plain(value), "origin": read.origin(name)} for name, value in read.values().items()
    }
    if fitted:
        found["fit"] = fitted
    told = _told({name: value for name, value in found.items() if name != "fit"}, values)
    if fitted:
        told += "\n\n" + _fitted(fitted, fit, recipe, overrides, found.get("devices", 1))
    result({**found, "recipe": values}, told, as_json)


def _fitted(found: dict[str, Any], size: str, recipe: Path, overrides: list[str], devices: int) -> str:
    """Why this way of taking a step was chosen, and the command that takes it."""
    slower = f", {found['slower_by']:.0%} slower than without" if found["slower_by"] > 0 else ""
    lines = [f"Into {size} fits, with {found['memory_gb']} GB{slower}:"]
    lines += [f"  {why}" for why in found["why"]]
    for one in found["faster"]:
        words = _words(one["keys"]) or "the recipe as it is"
        lines.append(f"  faster, but {one['memory_gb']} GB: {words}")
    if found["keys"]:
        asked = "".join(f" {word}" for word in overrides)
        many = f"torchrun --nproc-per-node {devices} -m " if devices > 1 else ""
        lines.append(f"{many}sfumato train {recipe}{asked} {_words(found['keys'])}")
    return "\n".join(lines)


def _words(keys: dict[str, Any]) -> str:
    return " ".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in keys.items()
    )


def _told(found: dict[str, Any], values: dict[str, dict[str, Any]]) -> str:
    lines = []
    width = max(len(name) for name in values)
    for name, entry in values.items():
        lines.append(f"{name:<{width}}  {_shown(entry['value']):<28} {entry['origin']}")
    lines.append("")
    lines += [f"{name.replace('_', ' '):<{width}}  {_shown(value)}" for name, value in found.items()]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        between = "; " if any(isinstance(one, dict) for one in value.values()) else ", "
        return between.join(f"{name} {_shown(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_shown(one) for one in value) or "none"
    return f"{value:,}" if type(value) is int else str(value) if value != "" else '""'
