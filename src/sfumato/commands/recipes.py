"""The commands about recipes: write a short one, say what one would do."""

from pathlib import Path
from typing import Any

from sfumato import paths
from sfumato.commands.console import result, say
from sfumato.commands.early import checked_recipe
from sfumato.errors import Refused
from sfumato.run_folder import write_atomic


def new(name: str, data: str, base: str, train: str, minutes: float, aim: str) -> None:
    """Write NAME.toml, with only the keys that matter, chosen for these data, this base and this machine."""
    from sfumato.data.sources import folder
    from sfumato.recipe import Recipe

    file = Path(name if name.endswith(".toml") else f"{name}.toml")
    if file.exists():
        raise Refused(f"{file} exists already. Choose another name, or remove it.")
    folder.check_source(data)
    from sfumato.workflow.suggest import suggest_recipe

    found = suggest_recipe(file, data, base, train, minutes, aim)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, found.text)
    try:
        Recipe.read(file)
    except Refused:
        file.unlink()
        raise
    for note in found.notes:
        say(note)
    say(f"Next: {paths.command('plan', file)}, then {paths.command('train', file)}.")
    result({"file": file}, str(file), False)


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
    if fit and not workflow.to_fetch(read):
        read, fitted = workflow.fit_to_memory(read, fit, devices)
    found = workflow.plan(read, devices)
    lines = workflow.summary(found)
    width = max(len(word) for word, _ in lines)
    text = "\n".join(f"{word:<{width}}  {line}" for word, line in lines)
    if everything and "fetch" not in found:
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
