"""What a step and a run cost: bytes and seconds, counted on the network that will be trained."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import stages
from ..data.encoded import EncodedSet
from ..generation import PaintingModel
from ..recipe import Recipe
from ..studio.page import duration
from ..training import checkpoint, parallel, strategy
from ..training import plan as planning
from ..training.parallel import Division, Processes
from . import ahead, guided, showing

FLOAT, DEVIATION = 4, 2
PROBED_SECONDS = 3.0
BESIDE_PRODUCTS = 1.35
"""A step's time over that of its matrix products, as measured on CPUs."""


def inputs_of(
    recipe: Recipe,
    model: PaintingModel,
    captions: Sequence[Sequence[str]],
    count: int,
    sizes: Sequence[Sequence[int]] = (),
) -> tuple:
    """What the denoiser is given for `count` samples of the recipe's size.

    Args:
        sizes: of the samples (width, height, frames of clips); packed ones are spread over them.
    """
    data = recipe.data
    reads = model.conditioner.kind != "none"
    texts = [(captions[i % len(captions)] or ("",))[0] if reads else "" for i in range(count)]
    if not recipe.train.pack or not sizes:
        return _alike(recipe, model, texts, (data.resolution, data.resolution, data.frames or 1))
    rising = sorted(tuple(size) for size in sizes)
    spread = Counter(rising[(2 * i + 1) * len(rising) // (2 * count)] for i in range(count))
    groups = [_alike(recipe, model, texts[:many], size) for size, many in spread.items()]
    return tuple(list(column) for column in zip(*groups, strict=True))


def _alike(recipe: Recipe, model: PaintingModel, texts: Sequence[str], size: Sequence[int]) -> tuple:
    """What the denoiser is given for samples of one size, one for each text."""
    told = showing.example(model, recipe.data, texts).to(model.device, model.dtype)
    condition = guided.blank(model, told, recipe.data.resolution)
    latents = torch.zeros(len(texts), *model.codec.latent_shape(*size), device=model.device)
    return latents, torch.full((len(texts),), 500.0, device=model.device), condition


def together(recipe: Recipe, parts: int) -> int:
    """Samples whose activations are there at once: a part of the batch, and as much of a prior."""
    has_prior = bool(recipe.data.prior or recipe.data.prior_prompt)
    return -(-recipe.train.batch // parts) * (1 + has_prior)


def cost(
    recipe: Recipe,
    model: PaintingModel,
    captions: Sequence[Sequence[str]],
    network: nn.Module,
    devices: int = 1,
    sizes: Sequence[Sequence[int]] = (),
) -> dict[str, Any]:
    """Memory of a step, counted, and its seconds: probed where two steps take seconds, else estimated.

    Of `devices` processes each one's; what they send each other takes time that is not counted.
    """
    division = Division.of(recipe.train, Processes(0, devices))
    chosen = strategy.choose(recipe.train, network, Processes(0, devices))
    inputs = inputs_of(recipe, model, captions, together(recipe, division.parts), sizes)
    counted = planning.count(network, inputs)
    every = recipe.values().get("train.checkpointing", 0)
    memory = counted.shared(counted.memory(recipe.train, every), chosen, recipe.train, devices)
    mine = len(division.mine)
    forecast = planning.Forecast(memory, planning.FORWARD_AND_BACKWARD * mine * counted.flops)
    seconds = BESIDE_PRODUCTS * forecast.seconds(planning.flops_per_second(device=model.device))
    if seconds < PROBED_SECONDS:
        seconds = planning.probe(network, inputs, recipe.train).seconds
    parts = {name: round(size / 1e9, 3) for name, size in vars(memory).items()}
    hours = round(seconds * recipe.train.steps / 3600, 2)
    peak = round(memory.peak / 1e9, 3)
    told = {"devices": devices, "parallel": f"{chosen.name}: {chosen.why}"} if devices > 1 else {}
    return told | {
        "memory_gb": peak, "memory": parts, "seconds_per_step": round(seconds, 3), "hours": hours
    }  # fmt: skip


def said(recipe: Recipe, model: PaintingModel, network: nn.Module, train: EncodedSet, fresh: bool) -> str:
    """What a run will cost, in a sentence; counted, without a probe, so that training starts at once.

    Raises:
        Failed: the checkpoints will not fit onto the disk.
    """
    processes = parallel.current()
    division = Division.of(recipe.train, processes)
    chosen = strategy.choose(recipe.train, network, processes)
    count = together(recipe, division.parts)
    trained = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    disk = _checkpoints(recipe, trained)
    if fresh:
        checkpoint.ask_for_room(Path(recipe.output), disk, "the run's checkpoints")
    words = [f"{trained / 1e6:,.1f} M trained weights", f"{disk / 1e9:.2f} GB of checkpoints"]
    try:
        sizes = [item.bucket for item in train.items]
        counted = planning.count(network, inputs_of(recipe, model, [tuple(train.captions[:1])], count, sizes))
    except (RuntimeError, NotImplementedError, TypeError):
        return f"Plan: {', '.join(words)}; this network's memory can only be probed: sfumato plan."
    alone = counted.memory(recipe.train, recipe.values().get("train.checkpointing", 0))
    memory = counted.shared(alone, chosen, recipe.train, processes.count)
    speed = planning.flops_per_second(0.05, device=model.device)
    seconds = BESIDE_PRODUCTS * planning.FORWARD_AND_BACKWARD * len(division.mine) * counted.flops / speed
    sizes = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in vars(memory).items() if size > 5e6)
    if processes.count > 1:
        words.append(f"{processes.count} processes, {chosen.name} ({chosen.why})")
    words += [
        f"{memory.peak / 1e9:.2f} GB of memory a step" + (f" ({sizes})" if sizes else ""),
        f"about {seconds:.2g} s a step, {duration(seconds * recipe.train.steps)} in all",
    ]
    return f"Plan: {'; '.join(words)}."


def _checkpoints(recipe: Recipe, trained: int) -> int:
    """Bytes that the run's checkpoints and averages take at most."""
    train = recipe.train
    each = trained * FLOAT * (1 + 2 + bool(train.ema) + 2 * bool(train.ema_snapshots))
    snapshots = 10 * 2 * 2 * trained if train.ema_snapshots else 0
    return (train.keep + 1 + train.keep_best) * each + snapshots


def disk_bytes(recipe: Recipe, parameters: int, samples: int, codec: stages.Codec) -> float:
    """Bytes the checkpoints and the encodings take at most."""
    side, data = recipe.data.resolution, recipe.data
    numbers = math.prod(codec.latent_shape(side, side, data.frames or 1))
    each = numbers * (FLOAT + DEVIATION) * (1 + data.flip) * (data.segments if data.frames else 1)
    latents = 0 if data.stream else min(samples * each, ahead.limit_of(recipe))
    return latents + _checkpoints(recipe, parameters)
