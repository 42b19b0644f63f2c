"""What a folder or file is, for who gave another one than was wanted; and commands as a shell takes them.

Looks at names alone, so that a sentence about a wrong path costs no time.
"""

import shlex
import tomllib
from difflib import get_close_matches
from pathlib import Path

PICTURES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"))
CLIPS = frozenset((".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v"))
LOOKED_AT = 200
"""Entries of a folder that are looked at to say what it holds."""
RUNS = Path("runs")


def command(*words: object) -> str:
    """`sfumato` with these words as a shell takes them: names with spaces are quoted."""
    return shlex.join(["sfumato", *map(str, words)])


def quoted(word: object) -> str:
    """One word of a command line as a shell takes it."""
    return shlex.quote(str(word))


def is_run(path: Path) -> bool:
    """Whether it is a run's folder."""
    return (path / "recipe.toml").is_file() or (path / "effective.toml").is_file()


def is_model(path: Path) -> bool:
    """Whether it is the folder of a model: of diffusers, or of ours."""
    return (path / "model_index.json").is_file() or (path / "model.json").is_file()


def has_pictures(path: Path) -> bool:
    """Whether pictures or clips are among the first entries of a folder, or of a folder in it."""
    if not path.is_dir():
        return False
    entries = _entries(path)
    inside = (one for entry in entries[:8] if entry.is_dir() for one in _entries(entry))
    return any(one.suffix.lower() in PICTURES | CLIPS for one in (*entries, *inside))


def _entries(folder: Path) -> list[Path]:
    try:
        return [entry for _, entry in zip(range(LOOKED_AT), folder.iterdir(), strict=False)]
    except OSError:
        return []


def similar(path: Path, wanted: str) -> str:
    """A half sentence that offers the run, model or recipe whose name is most like a path that is not there.

    Args:
        wanted: run, model or recipe.
    """
    places = dict.fromkeys((path.parent, RUNS if not path.is_absolute() else path.parent, Path()))
    found = {
        entry.stem: entry
        for folder in places
        for entry in _entries(folder)
        if not entry.name.startswith(".") and _could_be(entry, wanted)
    }
    close = get_close_matches(path.stem, found, n=1, cutoff=0.6)
    return f" Did you mean {quoted(found[close[0]])}?" if close else ""


def _could_be(entry: Path, wanted: str) -> bool:
    if wanted == "recipe":
        return entry.suffix == ".toml" or is_run(entry)
    if wanted == "run":
        return is_run(entry)
    return is_run(entry) or is_model(entry) or entry.suffix == ".safetensors"


def not_a_recipe(path: Path) -> str:
    """Why a folder is no recipe, and what is meant perhaps."""
    shown = str(path)
    if is_model(path):
        return (
            f"{shown} is a model, not a recipe. `{command('new', 'NAME', '--data', 'DIR', '--base', path)}` "
            "writes one that trains it."
        )
    inside = [entry for entry in _entries(path) if is_run(entry)]
    if inside:
        names = ", ".join(quoted(entry) for entry in sorted(inside)[:5])
        return f"{shown} is a folder of runs: give one of them ({names}), or a recipe file."
    if has_pictures(path):
        return (
            f"{shown} is a folder of pictures, not a recipe. `{command('new', 'NAME', '--data', path)}` "
            "writes one."
        )
    return f"{shown} is a folder without effective.toml. Give a recipe file or a run folder."


def no_recipe(path: Path) -> str:
    """What to say where there is no such recipe."""
    hint = similar(path, "recipe") or " `sfumato new NAME --data DIR` writes a recipe."
    return f"{path} does not exist.{hint}"


def no_run(path: Path) -> str:
    """Why a path is no run's folder, and what is meant perhaps."""
    way = " Give a folder that `sfumato train` wrote."
    if not path.exists():
        return f"{path} is no run folder: it does not exist.{similar(path, 'run') or way}"
    if path.suffix == ".toml" and path.is_file():
        return _recipe_given(path)
    if is_model(path):
        return f"{path} is a model, and no run folder: it has no recipe.toml.{way}"
    what = "has no recipe.toml" if path.is_dir() else "is a file"
    return f"{path} is no run folder: it {what}.{similar(path, 'run') or way}"


def no_model(path: Path) -> str:
    """Why nothing can be loaded from a path that is there, and what is meant perhaps."""
    way = "Give the folder of a model or of a run."
    if path.suffix == ".toml" and path.is_file():
        return _recipe_given(path)
    if is_run(path):
        return f"{path} is a run that has not trained yet. Run `{command('train', path)}` first."
    if is_model(path.parent) and path.is_dir():
        return f"{path} is a part of the model {path.parent}. Give {quoted(path.parent)}."
    inside = [entry for entry in _entries(path) if is_run(entry) or is_model(entry)] if path.is_dir() else []
    if inside:
        return f"{path} holds {len(inside)} models or runs: give one, as {quoted(min(inside))}."
    if has_pictures(path):
        return f"{path} is a folder of pictures, not a model. {way}"
    return f"{path} holds no model.json. {way}"


def is_meant_here(given: str) -> bool:
    """Whether a path that is not there lies in a folder that is: so it is no id of the Hub, owner/name."""
    return Path(given).expanduser().parent.is_dir()


def wrong_model(given: Path | str) -> str:
    """Why nothing can be loaded from there, as far as names tell at once; empty where it may be a model."""
    path = Path(given).expanduser()
    if not path.exists():
        if not is_meant_here(str(given)):
            return ""
        hint = similar(path, "model") or " Give the folder of a model or of a run."
        return f"{path} does not exist.{hint}"
    if is_model(path) or is_run(path) or ((path / "config.json").is_file() and not is_model(path.parent)):
        return ""
    is_wrong = path.suffix == ".toml" or (path.is_dir() and (is_model(path.parent) or has_pictures(path)))
    return no_model(path) if is_wrong else ""


def _recipe_given(file: Path) -> str:
    """What to do where a recipe was given in place of its run."""
    output = "runs/run"
    try:
        output = str(tomllib.loads(file.read_text(encoding="utf-8")).get("output", output))
    except (OSError, ValueError):
        return f"{file} is no run folder. Give a folder that `sfumato train` wrote."
    run = file.parent / output
    if is_run(run):
        return f"{file} is a recipe, and its run is {run}. Give {quoted(run)}."
    return f"{file} is a recipe that has not trained yet. Run `{command('train', file)}` first."
