"""What a step and a run cost: bytes and seconds, counted on the network that will be trained."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import models
from sfumato.data.encoding.encoded_dataset import EncodedDataset
from sfumato.generation import Pipeline
from sfumato.models import Condition
from sfumato.recipe import Recipe
from sfumato.report.page import duration
from sfumato.training import precision
from sfumato.training.device import free_bytes
from sfumato.training.distributed import strategy
from sfumato.training.distributed.processes import BatchSplit, Processes, current_processes
from sfumato.training.estimate import probe
from sfumato.training.estimate.memory import (
    FORWARD_AND_BACKWARD,
    NEEDS_VALUES,
    NON_MATMUL_FACTOR,
    MemoryBreakdown,
    count_memory,
)
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.training.optim.optimizers import spec_of
from sfumato.training.state import async_checkpoint, checkpoint
from sfumato.workflow import base_images, control_training, encode_ahead

FLOAT, DEVIATION = 4, 2
PROBED_SECONDS = 10.0
"""Steps that promise to take longer are counted, not probed: a plan is a matter of seconds."""
MOMENT = 0.2
"""Seconds of a forward pass that are not worth estimating: it is tried."""
SAFE = 0.7
"""Of the memory that is free, what a probe may be counted to need."""


@dataclass(frozen=True)
class StepEstimate:
    """What a step costs a process.

    inputs: what the network is given for one part of a batch, of so many samples; forward: seconds of one
    forward pass of them, and flops its operations; how: "counted" or "probed"; numbers: how many weights
    learn; sharing: of many processes, how they share the run.
    """

    inputs: tuple[Any, ...]
    samples: int
    memory: MemoryBreakdown
    seconds: float
    forward: float
    how: str
    sharing: dict[str, Any]
    flops: float = 0.0
    numbers: int = 0


def longest_first(captions: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """The captions with the longest in front, so that a batch is as wide as its widest."""
    at = max(range(len(captions)), key=lambda i: len((captions[i] or ("",))[0]), default=0)
    return [*captions[at:], *captions[:at]]


def inputs_of(
    recipe: Recipe,
    model: Pipeline,
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
    if not recipe.train.sequence_packing or not sizes:
        return _alike(recipe, model, texts, (data.resolution, data.resolution, data.frames or 1))
    rising = sorted(tuple(size) for size in sizes)
    spread = Counter(rising[(2 * i + 1) * len(rising) // (2 * count)] for i in range(count))
    groups = [_alike(recipe, model, texts[:many], size) for size, many in spread.items()]
    return tuple(list(column) for column in zip(*groups, strict=True))


def _alike(recipe: Recipe, model: Pipeline, texts: Sequence[str], size: Sequence[int]) -> tuple:
    """What the denoiser is given for samples of one size, one for each text."""
    once = list(dict.fromkeys(texts))  # a batch may be larger than the data has captions
    unguided = base_images.example_condition(model, recipe.data, once).to(model.device, model.dtype)
    if len(once) < len(texts):
        at = {text: place for place, text in enumerate(once)}
        rows = torch.tensor([at[text] for text in texts], device=model.device)
        repeated = {name: one.index_select(0, rows) for name, one in unguided.tensors.items()}
        is_unpadded, unguided = unguided.is_unpadded, Condition(repeated, len(texts))
        unguided.is_unpadded = is_unpadded
    frames = size[2] if recipe.data.frames else 0
    condition = control_training.with_blank_control(model, unguided, recipe.data.resolution, frames)
    latents = torch.zeros(len(texts), *model.codec.latent_shape(*size), device=model.device)
    return latents, torch.full((len(texts),), 500.0, device=model.device), condition


def largest_inputs(objective: DiffusionObjective, recipe: Recipe) -> tuple[Tensor, Tensor, Condition]:
    """What the network is given for one part of a batch of the largest encoded samples."""
    encoded = objective.encoded
    shapes = getattr(encoded, "buckets", [()])
    largest = max(range(len(shapes)), key=lambda i: torch.Size(shapes[i]).numel())
    parts = BatchSplit.of(recipe.train, current_processes()).parts
    batch = encoded.read([largest] * samples_in_memory(recipe, parts), recipe.seed, 0)
    x = batch.latents.to(objective.model.device, torch.float32)
    condition = Condition.stack([dict(row) for row in objective.rows(batch)]).to(x.device, x.dtype)
    return x, torch.full((len(x),), 500.0, device=x.device), condition


def inputs_of_run(
    recipe: Recipe, model: Pipeline, train: EncodedDataset, objective: DiffusionObjective
) -> tuple[Any, ...]:
    """What the network of a run is given for one part of a batch: the largest, of a pack all sizes."""
    if not recipe.train.sequence_packing:
        return largest_inputs(objective, recipe)
    parts = BatchSplit.of(recipe.train, current_processes()).parts
    sizes = [item.bucket for item in train.items]
    return inputs_of(recipe, model, [tuple(train.captions[:1])], samples_in_memory(recipe, parts), sizes)


def samples_in_memory(recipe: Recipe, parts: int) -> int:
    """Samples whose activations are there at once: a part of the batch, and as much of a prior."""
    has_prior = bool(recipe.data.class_images or recipe.data.class_prompt)
    return -(-recipe.train.batch // parts) * (1 + has_prior)


def step_cost(
    recipe: Recipe,
    model: Pipeline,
    captions: Sequence[Sequence[str]],
    network: nn.Module,
    devices: int = 1,
    sizes: Sequence[Sequence[int]] = (),
) -> StepEstimate:
    """A step's memory and seconds: counted, then probed where a few real ones take seconds.

    Of `devices` processes each one's; what they send each other takes time that is not counted.
    """
    division = BatchSplit.of(recipe.train, Processes(0, devices))
    chosen = strategy.choose(recipe.train, network, Processes(0, devices))
    samples = samples_in_memory(recipe, division.parts)
    inputs = inputs_of(recipe, model, longest_first(captions), samples, sizes)
    mine, speed = (
        len(division.mine),
        probe.flops_per_second(device=model.device, dtype=product_dtype(recipe, model.device)),
    )
    sharing: dict[str, Any] = {}
    if devices > 1:
        sharing = {"devices": devices, "parallel": f"{chosen.name}: {chosen.why}"}
    if recipe.train.context_parallel > 1:
        sharing["context"] = f"{recipe.train.context_parallel} processes share each sample"
    try:
        counted = count_memory(network, inputs)
    except NEEDS_VALUES:
        found = probe.probe(network, inputs, recipe.train)
        memory = MemoryBreakdown(*[0] * 6).probed(found.peak)
        return StepEstimate(
            inputs, samples, memory, found.seconds, found.seconds / 3 / mine, "probed", sharing
        )
    every, group_size = recipe.values().get("train.gradient_checkpointing", 0), recipe.train.context_parallel
    alone = counted.memory(recipe.train, every)
    again = counted.recomputed_share(every) if every else 0
    forward = NON_MATMUL_FACTOR * counted.flops / speed / group_size
    seconds, how = forward * (FORWARD_AND_BACKWARD + again) * mine, "counted"
    if group_size == 1 and seconds < PROBED_SECONDS and alone.peak < SAFE * free_bytes(model.device):
        found = probe.probe(network, inputs, recipe.train)
        seconds, how = found.seconds, "probed"
        if not chosen.is_divided:
            alone = alone.probed(found.peak)
    memory = counted.shared(alone, chosen, recipe.train, devices)
    return StepEstimate(
        inputs, samples, memory, seconds, forward, how, sharing, counted.flops, counted.numbers
    )


def cost_summary(recipe: Recipe, network: nn.Module, inputs: tuple[Any, ...], fresh: bool) -> str:
    """What a run will cost, in a sentence; counted, without a probe, so that training starts soon.

    Args:
        inputs: what the network is given for one part of a batch, as `inputs_of_run` says.

    Raises:
        Failed: the checkpoints will not fit onto the disk.
    """
    processes = current_processes()
    division = BatchSplit.of(recipe.train, processes)
    chosen = strategy.choose(recipe.train, network, processes)
    device = next(network.parameters()).device
    trained = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    disk = checkpoint_bytes(recipe, trained)
    if fresh:
        checkpoint.check_disk_space(Path(recipe.output), disk, "the run's checkpoints")
    words = [f"{trained / 1e6:,.1f} M trained weights", f"{disk / 1e9:.2f} GB of checkpoints"]
    try:
        counted = count_memory(network, inputs)
    except NEEDS_VALUES:
        return f"Plan: {', '.join(words)}; this network's memory can only be probed: sfumato plan."
    alone = counted.memory(recipe.train, recipe.values().get("train.gradient_checkpointing", 0))
    memory = counted.shared(alone, chosen, recipe.train, processes.count)
    dtype = product_dtype(recipe, device)
    speed = probe.flops_per_second(0.05, device, dtype) * recipe.train.context_parallel
    forward = NON_MATMUL_FACTOR * counted.flops / speed
    is_small = forward < MOMENT  # then other things than products take the time
    if is_small and processes.count == 1:

        def ask() -> None:
            with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                network(*inputs)

        forward = probe.measure_call(ask, device).seconds
    seconds = FORWARD_AND_BACKWARD * len(division.mine) * forward
    sizes = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in vars(memory).items() if size > 5e6)
    if processes.count > 1:
        words.append(f"{processes.count} processes, {chosen.name} ({chosen.why})")
    if recipe.train.context_parallel > 1:
        words.append(f"{recipe.train.context_parallel} of them share each sample")
    words += [
        f"{memory.peak / 1e9:.2f} GB of memory a step" + (f" ({sizes})" if sizes else ""),
        f"about {seconds:.2g} s a step, {_length(recipe, seconds)}",
    ]
    return f"Plan: {'; '.join(words)}."


def _length(recipe: Recipe, seconds: float) -> str:
    """How long the run is, where a step takes so many seconds."""
    steps = recipe.train.expected_steps(seconds)
    words = f"{duration(seconds * steps)} in all"
    if not recipe.train.minutes:
        return words
    return f"about {steps:,} steps, {words}: the clock decides (train.minutes = {recipe.train.minutes:g})"


def product_dtype(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """What a run's matrix products are computed in where it is not float32."""
    train = recipe.train
    if recipe.model.base_quantization == "bfloat16":
        return torch.bfloat16
    return precision.NARROW.get(precision.effective_precision(train.precision, device, train.weight_dtype))


def store_bytes(recipe: Recipe, samples: int, codec: models.Codec) -> float:
    """Bytes the encoded pictures take at most."""
    side, data = recipe.data.resolution, recipe.data
    numbers = math.prod(codec.latent_shape(side, side, data.frames or 1))
    each = numbers * (FLOAT + DEVIATION) * (1 + data.flip) * (data.clips_per_video if data.frames else 1)
    return 0 if data.stream else min(samples * each, encode_ahead.cache_limit_bytes(recipe))


def checkpoint_bytes(recipe: Recipe, trained: int) -> int:
    """Bytes that the run's checkpoints and averages take at most."""
    train = recipe.train
    snapshots = 10 * 2 * 2 * trained if train.ema_snapshot_every else 0
    return (train.keep_checkpoints + 1 + train.keep_best) * saved_bytes(recipe, trained) + snapshots


def saved_bytes(recipe: Recipe, trained: int) -> int:
    """Bytes of one checkpoint."""
    train = recipe.train
    state = spec_of(train.optimizer).states  # what a paged one keeps elsewhere is saved too
    return int(trained * FLOAT * (1 + state + bool(train.ema) + 2 * bool(train.ema_snapshot_every)))


def copies_bytes(recipe: Recipe, trained: int) -> int:
    """Host memory of the copy that is written beside the steps; 0 where there is no room for one."""
    size = saved_bytes(recipe, trained)
    return size if recipe.train.save_async and async_checkpoint.is_small_copy(size) else 0
