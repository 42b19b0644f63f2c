"""How a demo's minutes are spent: the clock decides, while it trains, how many steps fit.

A faster machine trains longer. None trains less than a good picture needs: there it takes longer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from sfumato.data.settings import DataSettings
from sfumato.models.settings import ModelSettings
from sfumato.recipe import Recipe
from sfumato.training import device as devices
from sfumato.training.settings import TrainSettings
from sfumato.workflow.suggest.measure_steps import step_losses, step_seconds

START_SECONDS = 10.0
"""What is no phase of the run: loading, timing steps, writing the page."""


@dataclass(frozen=True)
class Plan:
    """How a data set's minutes are spent.

    minutes: in all; codec: share of them for the codec; drawing: what drawing and judging take when training
    is over, in steps of the denoiser; fewest, most: steps of the denoiser; fewest_codec, most_codec: of the
    codec; side: of its pictures; frames: of its clips, 0 for pictures.
    """

    recipe: Recipe
    minutes: float
    codec: float
    drawing: int
    fewest: int
    most: int
    fewest_codec: int
    most_codec: int
    side: int
    frames: int = 0


def recipe_for_budget(plan: Plan, data: str, out: Path, minutes: float | None, device: str) -> Recipe:
    """The recipe that fills the minutes on this machine.

    What is timed before it starts, when the machine may be busy for a moment, only says how long the codec is
    trained and when to draw; how many steps the denoiser makes, `train.minutes` decides.
    """
    minutes = minutes or plan.minutes
    model = plan.recipe.model
    where = devices.resolve(device)
    codec_step, step = time_steps(model, plan.recipe.train, plan.side, where, plan.frames)
    for_codec = 60 * minutes * plan.codec
    until_drawing = max(1.0, 60 * minutes - START_SECONDS - step * plan.drawing)
    most = plan.most if minutes <= plan.minutes else 10**7
    expected = _between(plan.fewest, (until_drawing - for_codec) / step, most)
    train = replace(
        plan.recipe.train, steps=most, minutes=until_drawing / 60, min_steps=plan.fewest, device=device
    )
    return replace(
        plan.recipe,
        output=str(out),
        model=replace(
            model, codec_steps=_between(plan.fewest_codec, for_codec / codec_step, plan.most_codec)
        ),
        data=DataSettings(train=data, resolution=plan.side, frames=plan.frames, cache_dir=str(out / "store")),
        train=train,
        sample=replace(plan.recipe.sample, every=-(-expected // 4)),
    )


def _between(fewest: int, wanted: float, most: int) -> int:
    return max(fewest, min(int(wanted), most))


def time_steps(
    model: ModelSettings, settings: TrainSettings, side: int, where: torch.device, frames: int = 0
) -> tuple[float, float]:
    """Seconds that a step of the codec and one of the denoiser take here, measured on noise."""
    found = step_losses(model, settings, side, frames, where)
    codec_seconds = _seconds(found.codec, found.codec_loss, where)
    return codec_seconds, _seconds(found.denoiser, found.denoiser_loss, where)


def _seconds(network: torch.nn.Module, loss: Callable[[], Tensor], where: torch.device) -> float:
    """The median of five optimizer steps after two that warm up."""
    taken = [seconds for seconds, _ in islice(step_seconds(network, loss, where), 7)]
    return sorted(taken[2:])[2] * 1.1
