"""Measuring a run: its loss by noise level, whether pictures are of what was asked, how far from the data."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sfumato.errors import Refused
from sfumato.evaluation import Measure
from sfumato.generation import Pipeline, load
from sfumato.recipe import Recipe
from sfumato.report import run_page
from sfumato.run_folder import RunFolder
from sfumato.training import device as devices
from sfumato.training.loop.loop import print_to_stderr
from sfumato.training.loop.validation import ValidationLoss
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.workflow.checks import choose_sizes
from sfumato.workflow.dataset import collection_of
from sfumato.workflow.encode_samples import batch_sampler_of, caption_encoder, encoded_samples
from sfumato.workflow.evaluate.image_metrics import ClosestMatch, measure_images, untold
from sfumato.workflow.evaluate.video_metrics import measure_videos
from sfumato.workflow.train_codec import Progress

LEVEL_SAMPLES = 128


@dataclass(frozen=True)
class Evaluation:
    """What was measured after `step`; by_level: {split: [{level, loss, error}]}; drawn: prompts, pictures.

    closest: of the drawn pictures most like one training picture: its name, both uint8 [3, H, W], the ratio.
    notes: what could not be measured, and why.
    """

    step: int
    metrics: dict[str, Measure]
    by_level: dict[str, list[dict[str, float]]]
    drawn: list[tuple[str, Any]]
    closest: list[ClosestMatch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def evaluate(
    folder: Path | str,
    samples: int = 64,
    seeds: int = 3,
    steps: int | None = None,
    guidance: float | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    say: Callable[[str], None] = print_to_stderr,
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
    run = run_containing(Path(folder))
    recipe = Recipe.read(run.path)
    model = load(folder, device=str(devices.resolve(device)))
    collection = collection_of(recipe)
    bucket_of = choose_sizes(recipe, collection.samples, model.codec, model)
    encoded = encoded_samples(recipe, collection.samples, bucket_of, model, progress)
    step = step_of(run, Path(folder), model)
    order = batch_sampler_of(recipe, encoded.with_split("train"))
    objective = DiffusionObjective(
        model,
        encoded.with_split("train"),
        order,
        recipe.train,
        recipe.seed,
        0.0,
        read_text=caption_encoder(model) if model.conditioner.learns else None,
    )
    loss = ValidationLoss(
        objective, encoded.with_split("held_out"), encoded.with_split("train"), run, samples=LEVEL_SAMPLES
    )
    metrics: dict[str, Measure] = {}
    by_level: dict[str, list[dict[str, float]]] = {}
    for split, indices in loss.indices.items():
        if indices:
            found = loss.measure(loss.sets[split], indices)
            by_level[split] = [vars(level) for level in found.by_level]
            metrics[f"loss_{split}"] = Measure(
                found.loss, found.error, f"{len(indices)} samples, fixed noise"
            )
    drawing = {"steps": steps, "guidance": guidance}
    split = {name: collection.with_split(name) for name in ("train", "held_out")}
    if model.conditioner.kind == "none":  # captions say nothing to a model without text
        split = {name: [replace(one, captions=("",)) for one in part] for name, part in split.items()}
    closest: list[ClosestMatch] = []
    notes: list[str] = []
    if recipe.data.frames:
        painted, drawn = measure_videos(recipe, model, split["train"], bucket_of, samples, drawing)
    else:
        painted, drawn, closest = measure_images(
            recipe, model, split, bucket_of, samples, seeds, drawing, progress
        )
        texts = {text for sample in split["train"] for text in sample.captions if text}
        notes = untold(painted, len(texts), len(split["train"]))
    metrics |= painted
    if Path(folder).resolve() == run.path.resolve():
        _record(run, step, metrics, say)
    return Evaluation(step, metrics, by_level, drawn, closest, notes)


def run_containing(path: Path) -> RunFolder:
    """The run a path is, or lies in.

    Raises:
        Refused: none.
    """
    inside = path.expanduser().absolute()
    for place in (inside, inside.parent.parent):
        if (place / "effective.toml").is_file():
            return RunFolder.open(path if place == inside else place)
    return RunFolder.open(path)


def step_of(run: RunFolder, path: Path, model: Pipeline) -> int:
    """After how many steps of the run the weights were taken."""
    if averaged := model.info.get("averaged"):
        return int(averaged["step"])
    named = path.resolve().name
    folder = named if named.startswith("step-") else run.checkpoint_folders()[-1].name
    return int(folder.removeprefix("step-"))


def _record(run: RunFolder, step: int, metrics: dict[str, Measure], say: Callable[[str], None]) -> None:
    """Write the numbers into the run, unless it is being written or read-only."""
    try:
        with run.lock():
            run.event("evaluation", step=step, metrics={name: one.to_dict() for name, one in metrics.items()})
            run_page.write(run)
    except Refused as refusal:
        say(f"The numbers are not written into the run: {refusal}")
