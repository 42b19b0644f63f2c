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
from sfumato.demo.runner import DemoReport, Progress
from sfumato.demo.text import PLANS
from sfumato.recipe import Recipe
from sfumato.run_folder import RunFolder
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

    plan: of both; base_share: steps of the base for each of the guide; guide_cost: a guide's step, in steps
    of the base; base_data: the set the base learns from, if another; data: further keys of [data].
    """

    plan: Plan
    base_share: float
    guide_cost: float
    base_data: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    def recipe(self, name: str, out: Path, minutes: float | None, device: str) -> Recipe:
        """The guide's recipe; its base is trained in `out/base`."""
        whole = recipe_for_budget(self.plan, name, out, minutes, device)
        steps = max(self.plan.fewest, int(whole.train.steps / (self.base_share + self.guide_cost)))
        return replace(
            whole,
            model=replace(whole.model, base=str(out / "base")),
            data=replace(whole.data, **self.data),
            train=replace(whole.train, steps=steps),
            sample=replace(whole.sample, every=-(-steps // 3)),
        )

    def train(self, recipe: Recipe, progress: Progress | None) -> Run:
        """Train the base, and then the guide."""
        usual = DataSettings()
        plain: dict[str, Any] = {name: getattr(usual, name) for name in self.data}
        steps = max(1, int(recipe.train.steps * self.base_share))
        base = Recipe(
            output=recipe.model.base,
            seed=recipe.seed,
            model=replace(
                recipe.model, base="scratch", train="full", control_layers=0, image_encoder="codec"
            ),
            data=replace(recipe.data, train=self.base_data or recipe.data.train, **plain),
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
