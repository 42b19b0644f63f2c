"""The commands about recipes: write a short one, say what one would do."""

import json
from pathlib import Path
from typing import Any

from sfumato import paths
from sfumato.commands.console import result, say
from sfumato.commands.early import checked_recipe
from sfumato.errors import Refused
from sfumato.run_folder import write_atomic

TEMPLATE = """\
# {plan}     says what will run
# {train_it}    trains; the same command resumes
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
    from sfumato.data.settings import EMBEDDED
    from sfumato.recipe import Recipe, quoted

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
        plan=paths.command("plan", file),
        train_it=paths.command("train", file),
        name=file.stem,
        base=quoted(base),
        base_note="            # or the folder of a model to go on from" if base == "scratch" else "",
        data=quoted(data),
        captions=captions,
        **template_sizes(base, data),
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
    say(f"Next: {paths.command('plan', file)}, then {paths.command('train', file)}.")
    result({"file": file}, str(file), False)


def _captions(data: str, embedded: tuple[str, ...]) -> str:
    """Where a folder's captions seem to be: beside the pictures, or in the names of its folders."""
    from sfumato.data.sources import archives
    from sfumato.data.sources.folder import SIDECARS
    from sfumato.data.sources.metadata import FILES

    folder = Path(data).expanduser()
    if data in embedded or archives.find_reader(folder) is not None:
        return "files"
    named = (FILES, tuple(f"*{suffix}" for suffix in SIDECARS))
    if any(next(folder.rglob(name), None) for names in named for name in names):
        return "files"
    return "folder" if any(entry.is_dir() for entry in folder.iterdir()) else "none"


def plan(
    recipe: Path, overrides: list[str], fit: str, devices: int, as_json: bool, everything: bool = False
) -> None:
    """Print what the recipe would do; nothing is trained, encoded or written.

    Args:
        everything: every key, its value and where it came from, and all that was counted.
    """
    read = checked_recipe(recipe, overrides)
    for note in read.notes:
        say(note)
    from sfumato import workflow

    fitted: dict[str, Any] = {}
    if fit:
        read, fitted = workflow.fit_to_memory(read, fit, devices)
    found = workflow.plan(read, devices)
    lines = workflow.summary(found)
    width = max(len(word) for word, _ in lines)
    text = "\n".join(f"{word:<{width}}  {line}" for word, line in lines)
    if everything:
        text += "\n\n" + _plan_text(found)
    if fitted:
        text += "\n\n" + _fitted(fitted, fit, recipe, overrides, found.get("devices", 1))
        found["fit"] = fitted
    result(found, text, as_json)


def _fitted(found: dict[str, Any], size: str, recipe: Path, overrides: list[str], devices: int) -> str:
    """Why this way of taking a step was chosen, and the command that takes it."""
    slower = f", {found['slower_by']:.0%} slower than without" if found["slower_by"] > 0 else ""
    lines = [f"Into {size} fits, with {found['memory_gb']} GB{slower}:"]
    lines += [f"  {why}" for why in found["why"]]
    for one in found["faster"]:
        words = " ".join(_words(one["keys"])) or "the recipe as it is"
        lines.append(f"  faster, but {one['memory_gb']} GB: {words}")
    if found["keys"]:
        many = f"torchrun --nproc-per-node {devices} -m " if devices > 1 else ""
        lines.append(many + paths.command("train", recipe, *overrides, *_words(found["keys"])))
    return "\n".join(lines)


def _words(keys: dict[str, Any]) -> list[str]:
    return [
        f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in keys.items()
    ]


def _plan_text(found: dict[str, Any]) -> str:
    """Every key with its value and where it came from, then every number that was counted."""
    values, lines = found["recipe"], []
    width = max(len(name) for name in values)
    for name, entry in values.items():
        lines.append(f"{name:<{width}}  {_value_text(entry['value']):<28} {entry['origin']}")
    lines.append("")
    counted = {name: value for name, value in found.items() if name != "recipe"}
    lines += [f"{_label(name):<{width}}  {_value_text(value)}" for name, value in counted.items()]
    return "\n".join(lines)


def _label(name: str) -> str:
    """`memory_gb` as people write it: memory (GB)."""
    what = name.removesuffix("_gb")
    return what.replace("_", " ") + (" (GB)" if what != name else "")


def _value_text(value: Any) -> str:
    if isinstance(value, dict):
        between = "; " if any(isinstance(one, dict) for one in value.values()) else ", "
        return between.join(f"{_label(name)} {_value_text(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_value_text(one) for one in value) or "none"
    return f"{value:,}" if type(value) is int else str(value) if value != "" else '""'


USUAL = {"resolution": 64, "steps": 5000, "batch": 32, "frames": ""}
FROM_A_PIPELINE = {"resolution": 512, "steps": 1500, "batch": 4, "frames": ""}
LARGE, CLIPS = 1024, 480
FRAMES = 25
"""One and a multiple of the frames (4, 6 or 8) that share a latent in the video families."""
OF_SCRATCH = """
frames = 9                  # of a clip; one and a multiple of model.codec_time_stride, which is 2
fps = 8                     # frames a second, whatever rate a file has
short_clip_frames = [1]     # lengths for clips too short for that; 1 makes them stills"""
"""What a recipe from scratch says where there are videos."""
OF_CLIPS = ("Wan", "LTX", "HunyuanVideo", "CogVideoX", "Mochi")


def template_sizes(base: str, data: str) -> dict[str, Any]:
    """The template's values for this base and these data; reads JSON alone, so that it takes no time."""
    folder = Path(base).expanduser()
    if base == "scratch":
        return {**USUAL, "batch": 16, "frames": OF_SCRATCH} if has_clips(data) else USUAL
    if folder.exists() and not (folder / "model_index.json").is_file():
        return USUAL
    found = dict(FROM_A_PIPELINE)
    index = _json(folder / "model_index.json")
    kind = str(index.get("_class_name", ""))
    if kind.startswith(OF_CLIPS):
        found["resolution"] = CLIPS
        if has_clips(data):
            found["frames"] = (
                f"\nframes = {FRAMES:<18} # of a clip; one and a multiple of what shares a latent"
            )
    elif kind:
        found["resolution"] = native_resolution(folder)
    return found


def native_resolution(folder: Path) -> int:
    """Pixels a side that a pipeline draws: its network's latents times what its autoencoder joins."""
    network = next(
        (folder / name / "config.json" for name in ("unet", "transformer") if (folder / name).is_dir()), None
    )
    side = _json(network).get("sample_size") if network is not None else None
    if not isinstance(side, int):
        return LARGE
    levels = _json(folder / "vae" / "config.json").get("block_out_channels") or [1]
    return side * 2 ** (len(levels) - 1)


def has_clips(data: str) -> bool:
    """Whether a folder holds videos."""
    from sfumato.readers.media import CLIPS as ENDINGS

    folder = Path(data).expanduser()
    return folder.is_dir() and any(file.suffix.lower() in ENDINGS for file in folder.rglob("*"))


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read, which loading will say in its own words."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
