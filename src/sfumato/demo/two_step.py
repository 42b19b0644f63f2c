"""Demos of guides: a base that reads text is trained first, then a guide beside it, the base frozen."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from sfumato.data.settings import DataSettings
from sfumato.data.sources.sample import HELD_OUT, Sample
from sfumato.demo.budget import Plan, recipe_for_budget
from sfumato.demo.drawing import JUDGED
from sfumato.demo.runner import DemoReport, Progress, phases
from sfumato.demo.text import PLANS
from sfumato.recipe import Recipe
from sfumato.workflow import Run, train


def plan_of(kind: str, minutes: float, guidance: float, fewest: int) -> Plan:
    """A plan to teach this kind of guide on shapes, with the network and the rates of the text demo.

    fewest: steps of the guide.
    """
    text = PLANS["shapes"]
    model = replace(text.recipe.model, train=kind)
    recipe = replace(text.recipe, model=model, sample=replace(text.recipe.sample, guidance=guidance))
    return replace(text, recipe=recipe, minutes=minutes, codec=0.07, fewest=fewest)


@dataclass(frozen=True)
class GuideDemo:
    """A demo of two stages.

    plan: of both, its fewest steps those of the guide; base_share: of the training's time for the base;
    fewest_base: steps of the base; base_data: the set the base learns from, if another; data: further keys
    of [data].
    """

    plan: Plan
    base_share: float
    fewest_base: int
    base_data: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    def recipe(self, name: str, out: Path, minutes: float | None, device: str) -> Recipe:
        """The guide's recipe, with the minutes of both; its base is trained in `out/base`."""
        whole = recipe_for_budget(self.plan, name, out, minutes, device)
        every = max(1, round(whole.sample.every * (1 - self.base_share)))
        return replace(
            whole,
            model=replace(whole.model, base=str(out / "base")),
            data=replace(whole.data, **self.data),
            sample=replace(whole.sample, every=every),
        )

    def train(self, recipe: Recipe, progress: Progress | None) -> Run:
        """Train the base, and then the guide in the minutes that are left."""
        if not has_begun(Path(recipe.output)):
            self.train_base(recipe, progress)
            left = recipe.train.minutes - sum(phases(Path(recipe.model.base)).values()) / 60
            recipe = replace(recipe, train=replace(recipe.train, minutes=max(0.01, left)))
        return train(recipe, progress=progress)

    def train_base(self, recipe: Recipe, progress: Progress | None) -> None:
        """Train the base of a guide's recipe, or go on with it."""
        if has_begun(Path(recipe.model.base)):
            train(Recipe.read(recipe.model.base), progress=progress)
            return
        usual = DataSettings()
        plain: dict[str, Any] = {name: getattr(usual, name) for name in self.data}
        settings = replace(
            recipe.train, minutes=recipe.train.minutes * self.base_share, min_steps=self.fewest_base
        )
        base = Recipe(
            output=recipe.model.base,
            seed=recipe.seed,
            model=replace(
                recipe.model, base="scratch", train="full", control_layers=0, image_encoder="codec"
            ),
            data=replace(recipe.data, train=self.base_data or recipe.data.train, **plain),
            train=settings,
            sample=replace(recipe.sample, every=settings.steps),
        )
        train(base, progress=progress)


def has_begun(folder: Path) -> bool:
    """Whether a run was begun there."""
    effective = folder / "effective.toml"
    return effective.is_file() and bool(effective.read_text(encoding="utf-8").strip())


def unseen(trained: DemoReport) -> list[Sample]:
    """The held-out samples that are judged."""
    return trained.data.with_split(HELD_OUT)[:JUDGED]


def companion(sample: Sample, name: str) -> Image.Image:
    """A picture beside an embedded sample, which draws itself."""
    draw = sample.companions[name]
    assert callable(draw), "embedded samples draw themselves"
    picture = draw()
    assert isinstance(picture, Image.Image)
    return picture
