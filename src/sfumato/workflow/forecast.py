"""What a recipe would do, said before it is done: counts, what is missing, memory and disk."""

import math
from pathlib import Path
from typing import Any, cast

import torch

from .. import stages
from ..data import buckets
from ..data.order import Order
from ..data.sample import Sample
from ..generation import painting
from ..recipe import Recipe
from ..record import RunFolder
from ..training import device as devices
from ..training import plan as planning
from ..training.parallel import Division, Processes
from .agreement import agree, content_of
from .codecs import codec_key, place
from .course import gather
from .material import known_sizes
from .tuning import tune

FLOAT, DEVIATION = 4, 2
PROBED_SECONDS = 3.0
BESIDE_PRODUCTS = 1.35
"""A step's time over that of its matrix products, as measured on CPUs."""


def plan(recipe: Recipe) -> dict[str, Any]:
    """Counts and sizes of a run, without encoding, training or writing anything.

    Returns:
        plain values: samples, captions, held_out, set_aside, codec, parameters, steps_per_epoch, epochs,
        device, precision, memory_gb, memory, seconds_per_step, hours, disk_gb, run.
    Raises:
        Refused: for whatever training would refuse.
    """
    gathered = gather(recipe)
    collection, base = gathered.collection, gathered.base
    train, held_out = collection.of("train"), collection.of("held_out")
    found: dict[str, Any] = {
        "samples": len(train),
        "held_out": len(held_out),
        "captions": len({caption for sample in collection.samples for caption in sample.captions}),
        "set_aside": [{"file": one.file, "reason": one.reason} for one in collection.set_aside],
    }
    frames = recipe.data.frames
    codec = base.codec if base else stages.new_codec(recipe.model, recipe.seed, bool(frames))
    model = base or stages.build(recipe.model, codec, gathered.conditioner, recipe.seed, frames)
    found["codec"] = f"of {recipe.model.base}" if base else _codec(recipe, codec, train, gathered.bucket_of)
    network = tune(painting(model), recipe)
    parameters = sum(one.numel() for one in network.parameters() if one.requires_grad)
    found["parameters"] = sum(one.numel() for one in network.parameters())
    found["trained_parameters"] = parameters
    shown = sum(sample.repeat for sample in train)
    found["steps_per_epoch"] = max(1, round(shown) // recipe.train.batch)
    if callable(gathered.bucket_of):
        found["buckets"] = _buckets(recipe, train, gathered.bucket_of)
    found["epochs"] = round(recipe.train.steps / found["steps_per_epoch"], 1)
    found["device"] = str(gathered.device)
    found["precision"] = devices.effective_precision(
        recipe.train.precision, gathered.device, recipe.train.weights
    )
    found |= _cost(recipe, model.to(gathered.device), [sample.captions for sample in train])
    found["disk_gb"] = round(_disk(recipe, parameters, len(collection.samples), codec) / 1e9, 3)
    output = Path(recipe.output)
    if (output / "effective.toml").is_file():
        run = RunFolder.open(output)
        found["changed"] = agree(run, recipe, content_of(collection.samples))
        folders = run.checkpoint_folders()
        found["run"] = f"goes on from {folders[-1].name}" if folders else "begun, no checkpoint yet"
    else:
        found["run"] = "new"
    return found


def _buckets(recipe: Recipe, train: list[Sample], bucket_of: Any) -> dict[str, Any]:
    """For each bucket: samples an epoch shows, the batch, and how many the next epoch takes over."""
    held: list[tuple[int, int]] = []
    repeats: list[float] = []
    for sample in train:
        for size in known_sizes([sample], bool(recipe.data.frames)):
            held.append(bucket_of(size))
            repeats.append(sample.repeat)
    batch: Any = recipe.train.batch
    if recipe.data.token_budget:
        by_shape = buckets.token_budget(recipe.train.batch, [(1, *shape) for shape in held])
        batch = lambda shape: by_shape((1, *shape))  # noqa: E731
    order = Order(held, batch, 0, repeats)
    return {
        "×".join(map(str, shape)): {"samples": count, "batch": size, "carried_over": count % size}
        for shape, count, size in zip(cast(Any, order.kinds), order.counts, order.batches, strict=True)
    }


def _cost(recipe: Recipe, model: Any, captions: list[tuple[str, ...]]) -> dict[str, Any]:
    """Memory of a step, counted, and its seconds: probed where two steps take seconds, else estimated."""
    division = Division.of(recipe.train, Processes())
    count = -(-recipe.train.batch // division.parts)
    side = recipe.data.resolution
    texts = [(captions[i % len(captions)] or ("",))[0] for i in range(count)]
    guided = model.conditioner.kind != "none"
    condition = model.condition(texts if guided else [""] * count).to(model.device, model.dtype)
    shape = model.codec.latent_shape(side, side, recipe.data.frames or 1)
    latents = torch.zeros(count, *shape, device=model.device)
    inputs = (latents, torch.full((count,), 500.0, device=model.device), condition)
    forecast = planning.predict(model.denoiser, inputs, recipe.train)
    seconds = BESIDE_PRODUCTS * forecast.seconds(planning.flops_per_second(device=model.device))
    if seconds < PROBED_SECONDS:
        seconds = planning.probe(model.denoiser, inputs, recipe.train).seconds
    memory = {name: round(size / 1e9, 3) for name, size in vars(forecast.memory).items()}
    hours = round(seconds * recipe.train.steps / 3600, 2)
    peak = round(forecast.memory.peak / 1e9, 3)
    return {"memory_gb": peak, "memory": memory, "seconds_per_step": round(seconds, 3), "hours": hours}


def _codec(recipe: Recipe, codec: stages.Codec, samples: list, bucket_of: Any) -> str:
    if not stages.needs_training(recipe.model, codec):
        return recipe.model.codec
    kept = place(recipe, codec_key(recipe, samples, bucket_of))
    return (
        "trained already, in the store"
        if kept.exists()
        else f"trained first, {recipe.model.codec_steps:,} steps"
    )


def _disk(recipe: Recipe, parameters: int, samples: int, codec: stages.Codec) -> float:
    """Bytes the checkpoints and the encodings take at most."""
    side, data = recipe.data.resolution, recipe.data
    numbers = math.prod(codec.latent_shape(side, side, data.frames or 1))
    each = numbers * (FLOAT + DEVIATION) * (1 + data.flip) * (data.segments if data.frames else 1)
    latents = 0 if data.stream else samples * each
    kept = (recipe.train.keep + 1) * parameters * FLOAT * (3 + bool(recipe.train.ema))
    return latents + kept
