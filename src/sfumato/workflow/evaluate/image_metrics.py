"""Pictures measured: of what was asked, how far from the data, what the codec leaves, what was copied."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sfumato import models
from sfumato.data.sources.sample import Sample
from sfumato.evaluation import Measure, Neighbors, kernel_distance, mean_with_error, measure_memorization
from sfumato.evaluation.latent_kernel_distance import latent_features
from sfumato.evaluation.measure import proportion
from sfumato.evaluation.neighbors import FEWEST
from sfumato.generation import Pipeline
from sfumato.readers.media import center_crop_resize
from sfumato.recipe import Recipe
from sfumato.theory import noise
from sfumato.training.objective.reconstruction import to_pixels
from sfumato.workflow.dataset import Bucket, PicturesInMemory, fitting_in_memory
from sfumato.workflow.draw_sizes import draw_in_sizes, squeeze_to_square
from sfumato.workflow.train_codec import Progress

MOST_REAL = 2000
FEWEST_TO_COMPARE = 4
"""Pictures of each kind, below which a distance between the kinds says nothing."""
CLOSEST = 8
CODEC = "codec latents averaged to 4×4, polynomial kernel, subsets of 100"
ClosestMatch = tuple[str, Tensor, Tensor, float]
"""Of a drawn picture most like one training picture: its name, both uint8 [3, H, W], the ratio."""


@dataclass(frozen=True)
class RealImages:
    """The true pictures as squares [3, side, side]; shapes: those they were learned in; captions by name."""

    names: list[str]
    shapes: list[tuple[int, ...]]
    squares: list[Tensor]
    captions: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, samples: Sequence[Sample], bucket_of: Any, side: int) -> "RealImages":
        """Those of these samples that can be read."""
        captions = {sample.name: sample.captions for sample in samples}
        if not samples:
            return cls([], [], [], captions)
        found = PicturesInMemory(fitting_in_memory(list(samples), bucket_of), bucket_of)
        squares = [squeeze_to_square(picture, side) for picture in found.pictures]
        return cls(found.names, found.buckets, squares, captions)

    @property
    def texts(self) -> list[str]:
        """Every caption once, in order."""
        return sorted({text for texts in self.captions.values() for text in texts if text})

    @property
    def sizes(self) -> dict[str, Bucket]:
        """The (width, height) in which each caption's picture was learned."""
        known = zip(self.names, self.shapes, strict=True)
        return {text: (shape[2], shape[1]) for name, shape in known for text in self.captions[name]}


def measure_images(
    recipe: Recipe,
    model: Pipeline,
    split: dict[str, list[Sample]],
    bucket_of: Bucket | Callable[[Bucket], Bucket],
    samples: int,
    seeds: int,
    drawing: dict[str, Any],
    progress: Progress | None,
) -> tuple[dict[str, Measure], list[tuple[str, Image.Image]], list[ClosestMatch]]:
    """What needs pictures to be drawn: neighbors, kernel distance, the judge where data has one.

    Returns:
        The numbers, the first seed's (prompt, picture), and the drawn pictures most like one they learned.
    """
    side = recipe.data.resolution
    real, unseen = (RealImages.of(split[name], bucket_of, side) for name in ("train", "held_out"))
    neighbors = Neighbors(torch.stack(real.squares), [list(real.captions[name]) for name in real.names])
    compares = len(real.squares) >= FEWEST_TO_COMPARE
    features = _features(model, real.squares[:MOST_REAL])
    captions, sizes = real.texts or [""], real.sizes
    right: list[float] = []
    distances: list[float] = []
    judged: dict[str, list[float]] = {}
    drawn: list[tuple[str, Image.Image]] = []
    drawn_pixels: list[Tensor] = []
    by_chance: list[float] = []
    for seed in range(seeds):
        prompts = _drawn_prompts(captions, samples, seed)
        phase = f"drawing {seed + 1} of {seeds}"
        asked_sizes = [sizes.get(prompt) for prompt in prompts]
        pictures = _draw(model, prompts, seed, drawing, progress, phase, asked_sizes)
        pixels = torch.stack(
            [squeeze_to_square(center_crop_resize(picture, *picture.size), side) for picture in pictures]
        )
        drawn_pixels.append(pixels)
        right.append(sum(neighbors.judge(pixels, prompts)) / len(prompts))
        by_chance.append(neighbors.chance(prompts))
        if compares and len(pixels) >= FEWEST_TO_COMPARE:
            distances.append(kernel_distance(features, _features(model, list(pixels)), seed=seed).value)
        drawn = drawn or list(zip(prompts, pictures, strict=True))
        if recipe.data.train == "shapes" and unseen.texts:
            unseen_prompts = _drawn_prompts(unseen.texts, samples, seed)
            unseen_drawn = _draw(
                model, unseen_prompts, 7919 + seed, drawing, progress, f"unseen {seed + 1} of {seeds}"
            )
            for name, value in _judged(unseen_drawn, unseen_prompts).items():
                judged.setdefault(name, []).append(value)
    metrics: dict[str, Measure] = {}
    if distances:
        metrics["latent_kernel_distance"] = mean_with_error(distances, CODEC)
        metrics |= _floor(model, features, unseen, seeds)
    if captions != [""] and neighbors.can_tell:
        chance = sum(by_chance) / len(by_chance)
        metrics["nearest_neighbor_accuracy"] = replace(_merged(right, samples, neighbors.how), chance=chance)
    metrics |= {
        name: _merged(values, samples, "unseen captions, read from pixels") for name, values in judged.items()
    }
    metrics["codec_psnr"] = _reconstruction(model, real.squares[:256])
    copied, closest = _copies(torch.cat(drawn_pixels), real, unseen)
    return metrics | copied, drawn, closest


def untold(metrics: Mapping[str, Measure], texts: int, pictures: int) -> list[str]:
    """Why numbers that one might look for are not among these, of so many captions and pictures."""
    found = []
    if "nearest_neighbor_accuracy" not in metrics and texts:
        found.append(
            f"Whether pictures show what was asked cannot be told from {texts} different captions: it takes "
            f"{FEWEST}. Look at the pictures."
        )
    if "latent_kernel_distance" not in metrics:
        found.append(
            f"How far what is drawn is from the data cannot be told from {pictures} training pictures or so "
            f"few drawn ones: it takes {FEWEST_TO_COMPARE} of each (--samples)."
        )
    return found


def _floor(model: Pipeline, features: Tensor, unseen: RealImages, seeds: int) -> dict[str, Measure]:
    """The kernel distance of held-out pictures from the training pictures: what no model can beat."""
    if len(unseen.squares) < FEWEST_TO_COMPARE:
        return {}
    clean = [kernel_distance(features, _features(model, unseen.squares), seed=s).value for s in range(seeds)]
    note = "what a perfect model has: held-out pictures against training pictures"
    return {"latent_kernel_distance_floor": mean_with_error(clean, note)}


def _copies(
    drawn: Tensor, real: RealImages, unseen: RealImages
) -> tuple[dict[str, Measure], list[ClosestMatch]]:
    """How many drawn pictures are nearly a training picture, and the most alike."""
    if len(real.squares) < 3:
        return {}, []
    others = torch.stack(unseen.squares) if len(unseen.squares) > 1 else None
    learned = measure_memorization(drawn, torch.stack(real.squares), others)
    closest = [
        (
            real.names[learned.nearest[at]],
            drawn[at],
            real.squares[learned.nearest[at]],
            learned.ratio[at],
        )
        for at in learned.closest(CLOSEST)
    ]
    return {"memorized": learned.copied}, closest


def _merged(rates: list[float], samples: int, note: str) -> Measure:
    """A rate over seeds; its error is the larger of the seeds' spread and the binomial one."""
    spread = mean_with_error(rates, note)
    total = samples * len(rates)
    binomial = proportion(
        [True] * round(spread.value * total) + [False] * (total - round(spread.value * total))
    )
    return Measure(spread.value, max(spread.error or 0.0, binomial.error or 0.0), note)


def _drawn_prompts(captions: list[str], count: int, seed: int) -> list[str]:
    """`count` captions drawn at random, without repetition while there are enough."""
    order = noise.permutation(len(captions), seed, "evaluation prompts", 0).tolist()
    return [captions[order[index % len(order)]] for index in range(count)]


def _draw(
    model: Pipeline,
    prompts: list[str],
    seed: int,
    drawing: dict[str, Any],
    progress: Progress | None,
    phase: str,
    sizes: Sequence[Bucket | None] = (),
) -> list[Image.Image]:
    def watch(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total, phase)

    first = 1_000_003 * (seed + 1)
    seeds = [first + i for i in range(len(prompts))]
    drawing = {"literal_prompt": True, **drawing}  # captions are read as they were learned
    return draw_in_sizes(model, prompts, seeds, sizes or [None] * len(prompts), watch, **drawing)


@torch.no_grad()
def _features(model: Pipeline, pictures: list[Tensor]) -> Tensor:
    parts = [
        latent_features(model.encode(to_pixels(torch.stack(pictures[at : at + 64])))).cpu()
        for at in range(0, len(pictures), 64)
    ]
    return torch.cat(parts)


def _judged(pictures: list[Image.Image], prompts: list[str]) -> dict[str, float]:
    """Shares of pictures that show what was asked, as the shapes' own reader sees them."""
    from sfumato.data.sources import shape_reader

    verdicts = [
        shape_reader.judge(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)
    ]
    return {
        name: sum(one[name] for one in verdicts) / len(verdicts) for name in ("shape_and_color", "position")
    }


def _reconstruction(model: models.Model, pictures: list[Tensor]) -> Measure:
    """Peak signal to noise of pictures that went through the codec and back, in dB: a bound on sharpness."""
    ratios = []
    for at in range(0, len(pictures), 64):
        pixels = to_pixels(torch.stack(pictures[at : at + 64])).to(model.device)
        again = model.decode(model.encode(pixels)).clamp(-1, 1)
        errors = (again - pixels).square().flatten(1).mean(1).clamp_min(1e-12)
        ratios += (10 * torch.log10(4 / errors)).tolist()
    return mean_with_error(ratios, "dB, training pictures through the codec and back")
