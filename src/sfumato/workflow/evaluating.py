"""Measuring a run: its loss by noise level, whether pictures are of what was asked, how far from the data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import stages
from ..data.media import fit
from ..data.sample import Sample
from ..errors import Refused
from ..evaluation import Measure, Neighbours, kernel_distance, memory, over
from ..evaluation.kernel import latent_features
from ..evaluation.measure import share
from ..generation import PaintingModel, load
from ..recipe import Recipe
from ..record import RunFolder
from ..studio import report
from ..theory import noise
from ..training import device as devices
from ..training.held_out import HeldOut
from ..training.loop import to_stderr
from ..training.objective import DiffusionObjective
from ..training.reconstruction import to_pixels
from .checks import sizes
from .clips_measured import clips_measured
from .codecs import Progress
from .encoding import encoded_samples, order_of
from .material import Bucket, Pictures, collect, few
from .sizes import in_sizes, square

LEVEL_SAMPLES = 128
MOST_REAL = 2000
CLOSEST = 8
CODEC = "codec latents averaged to 4×4, polynomial kernel, subsets of 100"


@dataclass(frozen=True)
class Evaluation:
    """What was measured after `step`; by_level: {split: [{level, loss, error}]}; drawn: prompts, pictures.

    closest: of the drawn pictures most like one training picture: its name, both uint8 [3, H, W], the ratio.
    """

    step: int
    metrics: dict[str, Measure]
    by_level: dict[str, list[dict[str, float]]]
    drawn: list[tuple[str, Any]]
    closest: list[tuple[str, Tensor, Tensor, float]] = field(default_factory=list)


def evaluate(
    folder: Path | str,
    samples: int = 64,
    seeds: int = 3,
    steps: int | None = None,
    guidance: float | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    say: Callable[[str], None] = to_stderr,
) -> Evaluation:
    """Measure a run's newest averaged weights; the numbers also go into the run's record and page.

    Args:
        folder: a run; or a part of it, one of its checkpoints or of its averages, which is measured instead
            and leaves the record alone.
        samples: pictures drawn for each seed; seeds: repetitions that give the error bars.
        steps, guidance: of drawing; default the recipe's.
    Raises:
        Refused: it is no run, or has not trained yet.
    """
    run = run_of(Path(folder))
    recipe = Recipe.read(run.path)
    model = load(folder, device=str(devices.resolve(device)))
    collection = collect(recipe.data)
    bucket_of = sizes(recipe, collection.samples, model.codec, model)
    encoded = encoded_samples(recipe, collection.samples, bucket_of, model, progress)
    step = step_of(run, Path(folder), model)
    order = order_of(recipe, encoded.of("train"))
    objective = DiffusionObjective(model, encoded.of("train"), order, recipe.train, recipe.seed, 0.0)
    loss = HeldOut(objective, encoded.of("held_out"), encoded.of("train"), run, samples=LEVEL_SAMPLES)
    metrics: dict[str, Measure] = {}
    by_level: dict[str, list[dict[str, float]]] = {}
    for split, indices in loss.chosen.items():
        if indices:
            found = loss.measure(loss.sets[split], indices)
            by_level[split] = [vars(level) for level in found.by_level]
            metrics[f"loss_{split}"] = Measure(
                found.loss, found.error, f"{len(indices)} samples, fixed noise"
            )
    drawing = {"steps": steps, "guidance": guidance}
    split = {name: collection.of(name) for name in ("train", "held_out")}
    closest: list[tuple[str, Tensor, Tensor, float]] = []
    if recipe.data.frames:
        painted, drawn = clips_measured(recipe, model, split["train"], bucket_of, samples, drawing)
    else:
        painted, drawn, closest = _pictures(
            recipe, model, split, bucket_of, samples, seeds, drawing, progress
        )
    metrics |= painted
    if Path(folder).resolve() == run.path.resolve():
        _record(run, step, metrics, say)
    return Evaluation(step, metrics, by_level, drawn, closest)


def run_of(path: Path) -> RunFolder:
    """The run a path is, or lies in.

    Raises:
        Refused: none.
    """
    inside = path.expanduser().absolute()
    for place in (inside, inside.parent.parent):
        if (place / "effective.toml").is_file():
            return RunFolder.open(path if place == inside else place)
    return RunFolder.open(path)


def step_of(run: RunFolder, path: Path, model: PaintingModel) -> int:
    """After how many steps of the run the weights were taken."""
    if averaged := model.info.get("averaged"):
        return int(averaged["step"])
    named = path.resolve().name
    folder = named if named.startswith("step-") else run.checkpoint_folders()[-1].name
    return int(folder.removeprefix("step-"))


def _pictures(
    recipe: Recipe,
    model: PaintingModel,
    split: dict[str, list[Sample]],
    bucket_of: Bucket | Callable[[Bucket], Bucket],
    samples: int,
    seeds: int,
    drawing: dict[str, Any],
    progress: Progress | None,
) -> tuple[dict[str, Measure], list[tuple[str, Image.Image]], list[tuple[str, Tensor, Tensor, float]]]:
    """What needs pictures to be drawn: neighbours, kernel distance, the judge where data has one."""
    side = recipe.data.resolution
    real = Pictures(few(split["train"], bucket_of), bucket_of)
    known = {name: sample.captions for sample in split["train"] for name in [sample.name]}
    size_of = {
        text: (shape[2], shape[1])
        for name, shape in zip(real.names, real.buckets, strict=True)
        for text in known[name]
    }
    squares = [square(picture, side) for picture in real.pictures]
    neighbours = Neighbours(torch.stack(squares), [known[name] for name in real.names])
    features = _features(model, squares[:MOST_REAL])
    captions = sorted({text for texts in known.values() for text in texts if text}) or [""]
    unseen = sorted({text for sample in split["held_out"] for text in sample.captions if text})
    right: list[float] = []
    distances: list[float] = []
    judged: dict[str, list[float]] = {}
    drawn: list[tuple[str, Image.Image]] = []
    seen: list[Tensor] = []
    unseen_squares: list[Tensor] = []
    for seed in range(seeds):
        prompts = _drawn_prompts(captions, samples, seed)
        asked_sizes = [size_of.get(prompt) for prompt in prompts]
        phase = f"drawing {seed + 1} of {seeds}"
        pictures = _draw(model, prompts, seed, drawing, progress, phase, asked_sizes)
        pixels = torch.stack([square(fit(picture, *picture.size), side) for picture in pictures])
        seen.append(pixels)
        right.append(sum(neighbours.judge(pixels, prompts)) / len(prompts))
        distances.append(kernel_distance(features, _features(model, list(pixels)), seed=seed).value)
        drawn = drawn or list(zip(prompts, pictures, strict=True))
        if recipe.data.train == "shapes" and unseen:
            asked = _drawn_prompts(unseen, samples, seed)
            shown = _draw(model, asked, 7919 + seed, drawing, progress, f"unseen {seed + 1} of {seeds}")
            for name, value in _judged(shown, asked).items():
                judged.setdefault(name, []).append(value)
    metrics = {"kid": over(distances, CODEC)}
    if split["held_out"]:
        others = Pictures(few(split["held_out"], bucket_of), bucket_of)
        if len(others) > 1:
            unseen_squares = [square(picture, side) for picture in others.pictures]
            clean = [
                kernel_distance(features, _features(model, unseen_squares), seed=s).value
                for s in range(seeds)
            ]
            metrics["kid_of_held_out_data"] = over(
                clean, "the floor: held-out pictures against training pictures"
            )
    if captions != [""]:
        metrics["nearest_neighbour"] = _merged(right, samples, neighbours.how)
    metrics |= {
        name: _merged(values, samples, "unseen captions, read from pixels") for name, values in judged.items()
    }
    metrics["codec_psnr"] = _reconstruction(model, squares[:256])
    closest = []
    if len(squares) > 2:
        others = torch.stack(unseen_squares) if unseen_squares else None
        shown = torch.cat(seen)
        learned = memory(shown, torch.stack(squares), others)
        metrics["copied"] = learned.copied
        closest = [
            (real.names[learned.nearest[at]], shown[at], squares[learned.nearest[at]], learned.ratio[at])
            for at in learned.closest(CLOSEST)
        ]
    return metrics, drawn, closest


def _merged(rates: list[float], samples: int, note: str) -> Measure:
    """A rate over seeds; its error is the larger of the seeds' spread and the binomial one."""
    spread = over(rates, note)
    total = samples * len(rates)
    binomial = share([True] * round(spread.value * total) + [False] * (total - round(spread.value * total)))
    return Measure(spread.value, max(spread.error or 0.0, binomial.error or 0.0), note)


def _drawn_prompts(captions: list[str], count: int, seed: int) -> list[str]:
    """`count` captions drawn at random, without repetition while there are enough."""
    order = noise.permutation(len(captions), seed, "evaluation prompts", 0).tolist()
    return [captions[order[index % len(order)]] for index in range(count)]


def _draw(
    model: PaintingModel,
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
    return in_sizes(model, prompts, seeds, sizes or [None] * len(prompts), watch, **drawing)


@torch.no_grad()
def _features(model: PaintingModel, pictures: list[Tensor]) -> Tensor:
    parts = [
        latent_features(model.encode(to_pixels(torch.stack(pictures[at : at + 64])))).cpu()
        for at in range(0, len(pictures), 64)
    ]
    return torch.cat(parts)


def _judged(pictures: list[Image.Image], prompts: list[str]) -> dict[str, float]:
    """Shares of pictures that show what was asked, as the shapes' own reader sees them."""
    from ..data import shapes

    verdicts = [shapes.judge(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    return {
        name: sum(one[name] for one in verdicts) / len(verdicts) for name in ("shape_and_color", "position")
    }


def _reconstruction(model: stages.Model, pictures: list[Tensor]) -> Measure:
    """Peak signal to noise of pictures that went through the codec and back, in dB: a bound on sharpness."""
    ratios = []
    for at in range(0, len(pictures), 64):
        pixels = to_pixels(torch.stack(pictures[at : at + 64])).to(model.device)
        again = model.decode(model.encode(pixels)).clamp(-1, 1)
        errors = (again - pixels).square().flatten(1).mean(1).clamp_min(1e-12)
        ratios += (10 * torch.log10(4 / errors)).tolist()
    return over(ratios, "dB, training pictures through the codec and back")


def _record(run: RunFolder, step: int, metrics: dict[str, Measure], say: Callable[[str], None]) -> None:
    """Write the numbers into the run, unless it is being written or read-only."""
    try:
        with run.lock():
            run.event("evaluation", step=step, metrics={name: one.plain() for name, one in metrics.items()})
            report.write(run)
    except Refused as refusal:
        say(f"The numbers are not written into the run: {refusal}")
