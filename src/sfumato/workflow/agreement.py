"""A run keeps the recipe it began with: what may change does, what may not is refused by name."""

from pathlib import Path

from ..errors import Refused
from ..recipe import Recipe
from ..record import RunFolder

FREE = ("output", "format", "data.store", "train.steps", "train.log_every", "train.save_every", "train.keep")
FREE_PARTS = ("sample.", "train.keep_every", "train.held_out_every", "train.threads", "train.device")


def agree(run: RunFolder, recipe: Recipe) -> dict[str, tuple[object, object]]:
    """Compare the recipe with the one this run began with.

    Returns:
        what changed and may: {key: (before, now)}.
    Raises:
        Refused: naming the first key that may not change.
    """
    if not run.effective.is_file() or not run.effective.read_text(encoding="utf-8").strip():
        return {}
    before = Recipe.read(run.path)
    changed = before.differences(recipe)
    for name, (was, now) in changed.items():
        if name in FREE or name.startswith(FREE_PARTS):
            continue
        raise Refused(
            f"{run.path} was begun with {name} = {_said(was)}, but the recipe now says {_said(now)}. "
            f"Go on with {name}={_said(was)}, or give this recipe another output."
        )
    return {name: pair for name, pair in changed.items() if name not in ("output", "format")}


def _said(value: object) -> str:
    return (
        f'"{value}"'
        if isinstance(value, str | Path)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )
