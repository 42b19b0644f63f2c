"""Demos in two stages: a base that reads text is trained first, then a guide beside it, the base frozen."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.sample import HELD_OUT, Sample
from ..recipe import Recipe
from ..record import RunFolder
from ..workflow import Run, train
from .budget import Plan, planned
from .drawing import JUDGED
from .way import Progress, Seen


def recipe_beside(
    plan: Plan, base_share: float, guide_cost: float, **data: Any
) -> Callable[[str, Path, float | None, str], Recipe]:
    """What makes the recipe of a guide, whose base is trained in `out/base`.

    Args:
        base_share: steps of the base for each of the guide; guide_cost: a guide's step, in steps of a base.
        data: further keys of [data].
    """

    def recipe(name: str, out: Path, minutes: float | None, device: str) -> Recipe:
        whole = planned(plan, name, out, minutes, device)
        steps = max(plan.fewest, int(whole.train.steps / (base_share + guide_cost)))
        return replace(
            whole,
            model=replace(whole.model, base=str(out / "base")),
            data=replace(whole.data, **data),
            train=replace(whole.train, steps=steps),
            sample=replace(whole.sample, every=-(-steps // 3)),
        )

    return recipe


def train_both(base_share: float) -> Callable[[Recipe, Progress | None], Run]:
    """What trains the base, and then the guide."""

    def both(recipe: Recipe, progress: Progress | None) -> Run:
        steps = max(1, int(recipe.train.steps * base_share))
        base = Recipe(
            output=recipe.model.base,
            seed=recipe.seed,
            model=replace(
                recipe.model, base="scratch", train="full", control_layers=0, image_encoder="codec"
            ),
            data=replace(
                recipe.data, control="control", reference="picture", source="edit_source", dropout=()
            ),
            train=replace(recipe.train, steps=steps),
            sample=replace(recipe.sample, every=steps),
        )
        if not RunFolder(Path(base.output)).effective.is_file():
            train(base, progress=progress)
        elif RunFolder.open(base.output).checkpoint_folders()[-1:] != [
            RunFolder.open(base.output).checkpoint_folder(steps)
        ]:
            train(Recipe.read(base.output), progress=progress)
        return train(recipe, progress=progress)

    return both


def unseen(seen: Seen) -> list[Sample]:
    """The held-out samples that are judged."""
    return seen.data.of(HELD_OUT)[:JUDGED]


def companion(sample: Sample, name: str) -> Image.Image:
    """A picture beside an embedded sample, which draws itself."""
    draw = sample.companions[name]
    assert callable(draw), "embedded samples draw themselves"
    picture = draw()
    assert isinstance(picture, Image.Image)
    return picture
