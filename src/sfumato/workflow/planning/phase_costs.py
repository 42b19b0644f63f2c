"""What a run does beside its steps, and what that costs: the codec, encoding, measuring, drawing.

Each part is tried on this machine where that takes a moment, and else estimated from its operations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sfumato import models
from sfumato.data.encoding import views
from sfumato.data.encoding.encode_plan import EncodePlan, plan_encoding
from sfumato.data.encoding.views import EncodingOptions
from sfumato.data.store.store import Store
from sfumato.generation import Pipeline
from sfumato.recipe import Recipe
from sfumato.training.estimate import probe
from sfumato.training.estimate.memory import FORWARD_AND_BACKWARD, NEEDS_VALUES, NON_MATMUL_FACTOR, meta_copy
from sfumato.training.objective.reconstruction import to_pixels
from sfumato.workflow import base_images, condition_encoders, train_codec
from sfumato.workflow.dataset import Bucket
from sfumato.workflow.encode_samples import caption_encoder, encoding_of, is_conditional, posterior_encoder
from sfumato.workflow.planning.step_costs import StepEstimate, product_dtype
from sfumato.workflow.prepare import ResolvedRecipe
from sfumato.workflow.preview import SHOWN

TRIED_SECONDS = 3.0
LOOKED_UP = 20_000
"""Samples of more are not looked up in the store: all are taken to be missing."""
FEW, TOKENS = 8, 77
LEVELS, MEASURED = 8, 64


@dataclass(frozen=True)
class PhaseCost:
    """Seconds, and the bytes by which memory rises; None: it was not tried."""

    seconds: float
    peak: int | None = None


@dataclass(frozen=True)
class Machine:
    """Where things are tried, and how fast it multiplies."""

    device: torch.device
    speed: float

    def seconds(self, flops: float) -> float:
        """About how long so many operations take."""
        return NON_MATMUL_FACTOR * flops / self.speed

    def cost(self, work: Callable[[], Any], flops: float) -> PhaseCost:
        """Of one call of `work`, tried if its operations promise that it is short."""
        guess = self.seconds(flops)
        if guess > TRIED_SECONDS:
            return PhaseCost(guess)
        try:
            found = probe.measure_call(work, self.device)
        except torch.OutOfMemoryError:  # a plan holds more at once than the run does
            return PhaseCost(guess)
        return PhaseCost(found.seconds, found.peak)


class _Again(nn.Module):
    """A codec as it is trained: what comes back beside what went in."""

    def __init__(self, codec: models.TrainableCodec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """The error of each number."""
        again, kl = self.codec.reconstruct(pixels, noise)
        return (again - pixels) + 1e-3 * kl.mean()


def phase_costs(
    recipe: Recipe,
    model: Pipeline,
    network: nn.Module,
    resolved: ResolvedRecipe,
    step: StepEstimate,
    home: Path | None,
) -> dict[str, PhaseCost]:
    """The cost of each part of the run beside its steps.

    Args:
        home: where the codec is kept that is trained for this data; None if it needs no training.
    """
    dtype = product_dtype(recipe, resolved.device)
    machine = Machine(resolved.device, probe.flops_per_second(device=resolved.device, dtype=dtype))
    samples, found = resolved.collection.samples, dict[str, PhaseCost]()
    if home is not None and home.exists():
        model.codec = models.load_codec(home).to(resolved.device).eval()
    elif home is not None:
        found["codec"] = codec_training(recipe, model.codec, machine)
    found["encode"] = encoding(recipe, model, samples, resolved.bucket_of, machine)
    one_answer = evaluation(network, step, machine)
    each = one_answer.seconds / step.samples
    held_out, trained = (len(resolved.collection.with_split(split)) for split in ("held_out", "train"))
    if seconds := measuring(recipe, held_out, trained, each):
        found["measure"] = PhaseCost(seconds, one_answer.peak)
    found["draw"] = drawing(recipe, model, bool(held_out), each, machine)
    return found


def codec_training(recipe: Recipe, codec: models.Codec, machine: Machine) -> PhaseCost:
    """Of training the codec first."""
    assert isinstance(codec, models.TrainableCodec)
    settings, frames = train_codec.codec_train_settings(recipe), recipe.data.frames or 1
    pixels = _gray_pixels(recipe, settings.batch, machine.device)
    side = recipe.data.resolution
    noise = torch.zeros(settings.batch, *codec.latent_shape(side, side, frames), device=machine.device)
    network = _Again(codec)
    flops = flops_of(network, lambda codec: codec(pixels.to("meta"), noise.to("meta")))
    guess = machine.seconds(FORWARD_AND_BACKWARD * flops)
    if guess > TRIED_SECONDS:
        return PhaseCost(guess * settings.steps)
    found = probe.probe(network, (pixels, noise), settings)
    return PhaseCost(found.seconds * settings.steps, found.peak)


def _gray_pixels(recipe: Recipe, count: int, device: torch.device) -> Tensor:
    side, frames = recipe.data.resolution, recipe.data.frames
    return torch.zeros(count, 3, *([frames] if frames else []), side, side, device=device)


def flops_of(module: nn.Module, work: Callable[[Any], Any]) -> float:
    """Operations of `work(the module without its numbers)`; 0 where it asks for numbers: then it is tried."""
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            work(meta_copy(module))
    except NEEDS_VALUES:
        return 0.0
    return float(counter.get_total_flops())


def encoding(
    recipe: Recipe,
    model: Pipeline,
    samples: Sequence[Any],
    bucket_of: Bucket | Callable,
    machine: Machine,
) -> PhaseCost:
    """Of what the store lacks."""
    how = encoding_of(recipe, model)
    work, wanted = _wanted(recipe, model, samples, bucket_of, how)
    seconds, peaks = 0.0, [0]
    if wanted["pictures"]:
        pixels, encode = to_pixels(_gray_pixels(recipe, 1, machine.device)), posterior_encoder(model)
        flops = flops_of(model.codec, lambda codec: codec.distribution(pixels.to("meta", model.dtype)))
        picture = machine.cost(lambda: encode(pixels), flops)
        each = picture.seconds * (1 + recipe.data.flip)
        if work is not None and work.tasks:
            each += probe.measure_call(lambda: views.decode(work.tasks[0]), torch.device("cpu")).seconds
        seconds, peaks = each * wanted["pictures"], [picture.peak or 0]
    if wanted["texts"] and not base_images.encodes_text_with_image(model.conditioner):
        texts = [text for one in samples for text in one.captions][:FEW] or [""]
        weights = sum(weight.numel() for weight in model.conditioner.parameters())
        read = caption_encoder(model)
        text = machine.cost(lambda: read(texts), 2.0 * weights * TOKENS * len(texts))
        seconds += text.seconds / len(texts) * wanted["texts"]
        peaks.append(text.peak or 0)
    return PhaseCost(seconds, max(peaks) or None)


def _wanted(
    recipe: Recipe, model: Pipeline, samples: Sequence[Any], bucket_of: Any, how: EncodingOptions
) -> tuple[EncodePlan | None, dict[str, int]]:
    """What has to be encoded first: the layout of the work, and how many pictures and texts."""
    guided = is_conditional(model) and not model.conditioner.learns
    if len(samples) > LOOKED_UP:
        return None, {"pictures": len(samples) * how.use_store, "texts": len(samples) * guided}
    seen = base_images.picture_key(model, recipe.data)
    beside = condition_encoders.encoders(model, recipe.data)
    work = plan_encoding(samples, bucket_of, how, beside, guided, lambda *_: None, seen)
    keys = {
        "pixels": {one.keys[0] for one in work.pictures if how.use_store},
        "text": set(work.texts.values()),
    }
    if Path(recipe.data.cache_dir).expanduser().is_dir():
        store = Store(recipe.data.cache_dir)
        keys = {kind: set(some) - store.has(kind, some) for kind, some in keys.items()}
    return work, {"pictures": len(keys["pixels"]), "texts": len(keys["text"])}


def evaluation(network: nn.Module, step: StepEstimate, machine: Machine) -> PhaseCost:
    """Of asking the network once, for as many samples as a part of a batch has."""
    if step.forward > TRIED_SECONDS:
        return PhaseCost(step.forward)

    def ask() -> None:
        was_training = network.training
        network.eval()
        network(*step.inputs)
        network.train(was_training)

    found = probe.measure_call(ask, machine.device)
    return PhaseCost(found.seconds, found.peak)


def measuring(recipe: Recipe, held_out: int, trained: int, each: float) -> float:
    """Seconds of all measurements of the loss, an answer for one sample taking `each`."""
    if not (recipe.train.validate_every and held_out):
        return 0.0
    samples = min(MEASURED, held_out) + min(MEASURED, trained)
    answers = samples * LEVELS * (1 + bool(recipe.train.ema))
    return -(-recipe.train.steps // recipe.train.validate_every) * answers * each


def drawing(recipe: Recipe, model: Pipeline, has_held_out: bool, each: float, machine: Machine) -> PhaseCost:
    """Of all previews."""
    guided, sample, side = is_conditional(model), recipe.sample, recipe.data.resolution
    count = len(sample.prompts) or SHOWN * (1 + (guided and has_held_out))
    shape = model.codec.latent_shape(side, side, recipe.data.frames or 1)
    latents = torch.zeros(1, *shape, device=machine.device, dtype=model.dtype)
    flops = flops_of(model.codec, lambda codec: codec.decode(latents.to("meta")))
    decoded = machine.cost(lambda: model.codec.decode(latents), flops)
    guidance = model.info.get("guidance", sample.guidance)
    evaluations = model.info.get("steps", sample.steps) * (1 + (guided and guidance != 1))
    times = -(-recipe.train.steps // sample.every) if sample.every else 1
    peak = None if decoded.peak is None else decoded.peak * min(count, SHOWN)
    return PhaseCost(times * count * (evaluations * each + decoded.seconds), peak)
