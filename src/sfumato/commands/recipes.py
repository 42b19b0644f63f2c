"""The commands about recipes: write a short one, say what one would do."""

import shlex
from pathlib import Path
from typing import Any

from sfumato.commands.console import result, say
from sfumato.errors import Refused
from sfumato.run_folder import write_atomic


def new(name: str, data: str, base: str, train: str, minutes: float, aim: str) -> None:
    """Write NAME.toml, with only the keys that matter, chosen for these data, this base and this machine."""
    from sfumato.recipe import Recipe
    from sfumato.workflow.suggest import suggest_recipe

    file = Path(name if name.endswith(".toml") else f"{name}.toml")
    if file.exists():
        raise Refused(f"{file} exists already. Choose another name, or remove it.")
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
    quoted = shlex.quote(str(file))
    say(f"Next: sfumato plan {quoted}, then sfumato train {quoted}.")
    result({"file": file}, str(file), False)


def plan(recipe: Path, overrides: list[str], fit: str, devices: int, as_json: bool) -> None:
    """Print what the recipe would do; nothing is trained, encoded or written."""
    from sfumato import workflow
    from sfumato.recipe import Recipe
    from sfumato.settings import plain

    read = Recipe.read(recipe, overrides)
    for note in read.notes:
        say(note)
    fitted: dict[str, Any] = {}
    if fit:
        read, fitted = workflow.fit_to_memory(read, fit, devices)
    found = workflow.plan(read, devices)
    values = {
        name: {"value": plain(value), "origin": read.origin(name)} for name, value in read.values().items()
    }
    if fitted:
        found["fit"] = fitted
    plan_text = _plan_text({name: value for name, value in found.items() if name != "fit"}, values)
    if fitted:
        plan_text += "\n\n" + _fitted(fitted, fit, recipe, overrides, found.get("devices", 1))
    result({**found, "recipe": values}, plan_text, as_json)


def _fitted(found: dict[str, Any], size: str, recipe: Path, overrides: list[str], devices: int) -> str:
    """Why this way of taking a step was chosen, and the command that takes it."""
    slower = f", {found['slower_by']:.0%} slower than without" if found["slower_by"] > 0 else ""
    lines = [f"Into {size} fits, with {found['memory_gb']} GB{slower}:"]
    lines += [f"  {why}" for why in found["why"]]
    for one in found["faster"]:
        words = _words(one["keys"]) or "the recipe as it is"
        lines.append(f"  faster, but {one['memory_gb']} GB: {words}")
    if found["keys"]:
        override_text = "".join(f" {word}" for word in overrides)
        many = f"torchrun --nproc-per-node {devices} -m " if devices > 1 else ""
        lines.append(f"{many}sfumato train {recipe}{override_text} {_words(found['keys'])}")
    return "\n".join(lines)


def _words(keys: dict[str, Any]) -> str:
    return " ".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in keys.items()
    )


def _plan_text(found: dict[str, Any], values: dict[str, dict[str, Any]]) -> str:
    lines = []
    width = max(len(name) for name in values)
    for name, entry in values.items():
        lines.append(f"{name:<{width}}  {_value_text(entry['value']):<28} {entry['origin']}")
    lines.append("")
    lines += [f"{name.replace('_', ' '):<{width}}  {_value_text(value)}" for name, value in found.items()]
    return "\n".join(lines)


def _value_text(value: Any) -> str:
    if isinstance(value, dict):
        between = "; " if any(isinstance(one, dict) for one in value.values()) else ", "
        return between.join(f"{name} {_value_text(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_value_text(one) for one in value) or "none"
    return f"{value:,}" if type(value) is int else str(value) if value != "" else '""'
