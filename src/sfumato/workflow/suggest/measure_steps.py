"""How long a step takes on this machine: a second of steps on noise, of the codec and of the denoiser."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato import models
from sfumato.models import Condition
from sfumato.models.build import new_denoiser
from sfumato.recipe import Recipe
from sfumato.theory import noise
from sfumato.training import device as devices
from sfumato.training.precision import autocast, effective_precision

TEXT_WIDTH, WORDS = 384, 8
WARM_UP, FEWEST, SECONDS = 2, 3, 1.0
WAITS = 3
"""Threads that wait for each other compute less than the whole time, but no less than a third of it."""


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step: of the codec's training, and of the denoiser's."""

    codec: float
    denoiser: float


def measure_steps(recipe: Recipe) -> StepSeconds:
    """Take steps of a network from scratch, of the recipe's sizes, on the recipe's device.

    On a CPU those of a quiet machine count: the time its threads computed, not what others took of it.
    """
    model, settings, side, frames = recipe.model, recipe.train, recipe.data.resolution, recipe.data.frames
    where = devices.resolve(settings.device)
    codec = models.new_codec(model, clips=bool(frames))
    pixels = noise.normal((3, *([frames] if frames else []), side, side), 0, range(model.codec_batch))
    pixels = pixels.clamp(-1, 1).to(where)
    shape = codec.latent_shape(side, side, frames or 1)
    drawn = noise.normal(shape, 0, range(model.codec_batch)).to(where)

    def codec_loss() -> Tensor:
        assert isinstance(codec, models.TrainableCodec)
        again, kl = codec.reconstruct(pixels, drawn)
        return (again - pixels).abs().mean() + kl.mean()

    words = {"tokens": torch.zeros(WORDS, TEXT_WIDTH), "pooled": torch.zeros(TEXT_WIDTH)}
    condition = Condition.stack([words] * settings.batch).to(where)
    theory, latent_frames = models.new_theory(model.theory), codec.latent_frames(frames) if frames else 0
    denoiser = new_denoiser(model, theory, codec, (TEXT_WIDTH, TEXT_WIDTH), frames=latent_frames)
    x = noise.normal(shape, 0, range(settings.batch)).to(where)
    clock = torch.full((settings.batch,), 500.0, device=where)
    cast = autocast(effective_precision(settings.precision, where), where)

    def loss() -> Tensor:
        with cast:
            return denoiser(x, clock, condition).float().square().mean()

    of_codec = _quickest(codec.to(where), codec_loss, where)
    return StepSeconds(of_codec, _quickest(denoiser.to(where), loss, where))


def _quickest(network: torch.nn.Module, loss: Callable[[], Tensor], where: torch.device) -> float:
    """Seconds of the quickest optimizer step of a second of them, after some that warm up."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    taken: list[float] = []
    computed: list[float] = []
    while len(taken) < WARM_UP + FEWEST or sum(taken[WARM_UP:]) < SECONDS:
        began, begun = time.perf_counter(), time.process_time()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        taken.append(time.perf_counter() - began)
        computed.append((time.process_time() - begun) / torch.get_num_threads())
    quickest = min(taken[WARM_UP:])
    if where.type != "cpu":
        return quickest
    return min(quickest, max(min(computed[WARM_UP:]), quickest / WAITS))
