"""How long a step takes on this machine: a second of steps on noise, of the codec and of the denoiser."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato import models
from sfumato.models import Condition
from sfumato.models.build import new_denoiser
from sfumato.models.settings import ModelSettings
from sfumato.recipe import Recipe
from sfumato.theory import noise
from sfumato.training import device as devices
from sfumato.training.precision import autocast, effective_precision
from sfumato.training.settings import TrainSettings

TEXT_WIDTH, WORDS = 384, 8
WARM_UP, FEWEST, SECONDS = 2, 3, 1.0
WAITS = 3
"""Threads that wait for each other compute less than the whole time, but no less than a third of it."""


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step: of the codec's training, and of the denoiser's."""

    codec: float
    denoiser: float


@dataclass(frozen=True)
class StepLosses:
    """A codec and a denoiser from scratch on a device, and the losses of their steps on noise."""

    codec: torch.nn.Module
    codec_loss: Callable[[], Tensor]
    denoiser: torch.nn.Module
    denoiser_loss: Callable[[], Tensor]


def step_losses(
    model: ModelSettings, settings: TrainSettings, side: int, frames: int, where: torch.device
) -> StepLosses:
    """Networks of these sizes, and what is asked of them in a step of pictures of this side, or clips."""
    codec = models.new_codec(model, clips=bool(frames))
    assert isinstance(codec, models.TrainableCodec)
    trained = codec
    pixels = noise.normal((3, *([frames] if frames else []), side, side), 0, range(model.codec_batch))
    pixels = pixels.clamp(-1, 1).to(where)
    shape = codec.latent_shape(side, side, frames or 1)
    drawn = noise.normal(shape, 0, range(model.codec_batch)).to(where)

    def codec_loss() -> Tensor:
        again, kl = trained.reconstruct(pixels, drawn)
        return (again - pixels).abs().mean() + kl.mean()

    widths = TEXT_WIDTH, (1 + 2 * model.pooled_fourier_terms) * TEXT_WIDTH
    words = {"tokens": torch.zeros(WORDS, widths[0]), "pooled": torch.zeros(widths[1])}
    condition = Condition.stack([words] * settings.batch).to(where)
    theory, latent_frames = models.new_theory(model.theory), codec.latent_frames(frames) if frames else 0
    denoiser = new_denoiser(model, theory, codec, widths, frames=latent_frames)
    x = noise.normal(shape, 0, range(settings.batch)).to(where)
    clock = torch.full((settings.batch,), 500.0, device=where)
    cast = autocast(effective_precision(settings.precision, where), where)

    def denoiser_loss() -> Tensor:
        with cast:
            return denoiser(x, clock, condition).float().square().mean()

    return StepLosses(codec.to(where), codec_loss, denoiser.to(where), denoiser_loss)


def step_seconds(
    network: torch.nn.Module, loss: Callable[[], Tensor], where: torch.device
) -> Iterator[tuple[float, float]]:
    """Of one optimizer step after the other: seconds of the clock, and those a thread computed of them."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    while True:
        began, begun = time.perf_counter(), time.process_time()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        devices.wait_for(where)
        computed = (time.process_time() - begun) / torch.get_num_threads()
        yield time.perf_counter() - began, computed


def measure_steps(recipe: Recipe) -> StepSeconds:
    """Take steps of a network from scratch, of the recipe's sizes, on the recipe's device.

    On a CPU those of a quiet machine count: the time its threads computed, not what others took of it.
    """
    where, data = devices.resolve(recipe.train.device), recipe.data
    found = step_losses(recipe.model, recipe.train, data.resolution, data.frames, where)
    of_codec = _quickest(found.codec, found.codec_loss, where)
    return StepSeconds(of_codec, _quickest(found.denoiser, found.denoiser_loss, where))


def _quickest(network: torch.nn.Module, loss: Callable[[], Tensor], where: torch.device) -> float:
    """Seconds of the quickest optimizer step of a second of them, after some that warm up."""
    taken: list[float] = []
    computed: list[float] = []
    for seconds, of_thread in step_seconds(network, loss, where):
        taken.append(seconds)
        computed.append(of_thread)
        if len(taken) >= WARM_UP + FEWEST and sum(taken[WARM_UP:]) >= SECONDS:
            break
    quickest = min(taken[WARM_UP:])
    if where.type != "cpu":
        return quickest
    return min(quickest, max(min(computed[WARM_UP:]), quickest / WAITS))
