"""The demo: the whole way on an embedded data set, as far as a few minutes on this machine go.

It first times a step of the codec and of the denoiser, and spends the minutes given accordingly: a faster
machine trains longer. What it chose is the recipe in the run's folder; the same command goes on with it.
"""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import stages
from .data import shapes
from .data.media import fit
from .data.sample import Collection
from .data.settings import DataSettings
from .errors import Refused, one_of
from .evaluation import Neighbours
from .generation import PaintingModel
from .generation.settings import SampleSettings
from .recipe import Recipe
from .record import RunFolder
from .stages import Condition
from .stages.scratch import new_denoiser
from .stages.settings import ModelSettings
from .studio import report
from .theory import noise
from .training import device as devices
from .training.settings import TrainSettings
from .workflow import train
from .workflow.material import collect

Progress = Callable[..., None]
JUDGED = 64
TEXT_WIDTH = 384
FIRST_SEED = 1_000_003
"""Judged pictures start from noise that no preview used."""


@dataclass(frozen=True)
class Plan:
    """How a data set's minutes are spent.

    minutes: in all; codec: share of them for the codec; rest: seconds for all that is not training;
    fewest, most: steps of the denoiser, and fewest_codec, most_codec of the codec.
    """

    recipe: Recipe
    minutes: float
    codec: float
    rest: float
    fewest: int
    most: int
    fewest_codec: int
    most_codec: int


_MODEL = ModelSettings(width=192, depth=6, heads=3, patch=2, stride=8, latent_channels=24, codec_width=32)
_TRAIN = TrainSettings(
    batch=16, learning_rate=1.5e-3, warmup=40, schedule="linear", ema=0.995, save_every=500, keep=1,
    held_out_every=0,
)  # fmt: skip
_SAMPLE = SampleSettings(steps=16, guidance=2.0)
_PICTURES = Recipe(
    model=replace(_MODEL, codec_batch=16),
    train=replace(_TRAIN, batch=32, learning_rate=1.2e-3, ema=0.99),
    sample=_SAMPLE,
)
_SHAPES = Recipe(
    model=replace(
        _MODEL, width=128, depth=5, heads=2, text_waves=6, stride=4, latent_channels=16, codec_batch=32
    ),
    train=replace(_TRAIN, learning_rate=2.5e-3),
    sample=replace(_SAMPLE, guidance=4.0),
)
PLANS = {
    "openmoji": Plan(_PICTURES, 5.2, 0.13, 30, 400, 8000, 150, 2000),
    "openmoji-all": Plan(_PICTURES, 10.0, 0.15, 60, 800, 20000, 200, 3000),
    "shapes": Plan(_SHAPES, 4.2, 0.10, 45, 800, 16000, 100, 1000),
}
RESOLUTION = {"openmoji": 64, "openmoji-all": 64, "shapes": 32}


def run(
    data: str = "openmoji",
    out: Path | str = "runs/demo",
    minutes: float | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a codec and a denoiser, draw, judge, write the page.

    Args:
        data: openmoji, openmoji-all or shapes.
        out: the run's folder; the store lies in it, so nothing from before is used.
        minutes: what the demo may take; more is better.
    Returns:
        data, seconds of each phase, accuracy as fractions, peak_memory_gb, report (a path).
    """
    began = time.perf_counter()
    out = Path(out).absolute()
    one_of("data", data, PLANS)
    recipe = begun(data, out) or planned(data, out, minutes, device)
    trained = train(recipe, progress=progress)
    with RunFolder.open(out).lock() as folder:
        model = trained.model(device=str(devices.resolve(device)))
        drawing = time.perf_counter()
        judge = judge_shapes if data == "shapes" else judge_openmoji
        accuracy, notes = judge(model, collect(recipe.data), folder, trained.step, progress)
        seconds = {**_phases(folder), "generate": time.perf_counter() - drawing}
        seconds["total"] = time.perf_counter() - began
        seconds = {name: round(value, 1) for name, value in seconds.items()}
        peak = _peak_memory_gb()
        folder.event("phase", name="generate", seconds=seconds["generate"])
        told = {"accuracy": accuracy, "notes": notes, "seconds": seconds, "peak_memory_gb": peak}
        folder.event("judge", step=trained.step, **told)
        report.write(folder)
    found = {"data": data, "seconds": seconds, "accuracy": accuracy, "peak_memory_gb": peak}
    return {**found, "report": str(folder.report)}


def begun(data: str, out: Path) -> Recipe | None:
    """The recipe of a demo that was begun in this folder, or None.

    Raises:
        Refused: it was begun on other data.
    """
    if not (out / "effective.toml").is_file():
        return None
    recipe = Recipe.read(out)
    if recipe.data.train != data:
        raise Refused(
            f'{out} holds a demo on "{recipe.data.train}". Go on with --data {recipe.data.train}, '
            f"or give this one on {data} another --out."
        )
    return recipe


def planned(data: str, out: Path, minutes: float | None, device: str) -> Recipe:
    """The recipe that fills the minutes on this machine."""
    plan = PLANS[data]
    minutes = minutes or plan.minutes
    side, model = RESOLUTION[data], plan.recipe.model
    where = devices.resolve(device)
    codec_step, step = time_steps(model, plan.recipe.train, side, where)
    for_codec = 60 * minutes * plan.codec
    for_training = 60 * minutes - for_codec - plan.rest
    codec_steps = _between(plan.fewest_codec, for_codec / codec_step, plan.most_codec)
    steps = _between(plan.fewest, for_training / step, plan.most if minutes <= plan.minutes else 10**7)
    return replace(
        plan.recipe,
        output=str(out),
        model=replace(model, codec_steps=codec_steps),
        data=DataSettings(train=data, resolution=side, store=str(out / "store")),
        train=replace(plan.recipe.train, steps=steps, device=device),
        sample=replace(plan.recipe.sample, every=-(-steps // 4)),
    )


def _between(fewest: int, wanted: float, most: int) -> int:
    return max(fewest, min(int(wanted), most))


def time_steps(
    model: ModelSettings, settings: TrainSettings, side: int, where: torch.device
) -> tuple[float, float]:
    """Seconds that a step of the codec and one of the denoiser take here, measured on noise."""
    codec = stages.new_codec(model)
    assert isinstance(codec, stages.TrainableCodec)
    pixels = noise.normal((3, side, side), 0, range(model.codec_batch)).clamp(-1, 1).to(where)
    shape = (model.latent_channels, side // model.stride, side // model.stride)
    drawn = noise.normal(shape, 0, range(model.codec_batch)).to(where)

    def codec_loss() -> Tensor:
        again, kl = codec.reconstruct(pixels, drawn)
        return (again - pixels).abs().mean() + kl.mean()

    widths = TEXT_WIDTH, (1 + 2 * model.text_waves) * TEXT_WIDTH
    words = {"tokens": torch.zeros(8, widths[0]), "pooled": torch.zeros(widths[1])}
    condition = Condition.stack([words] * settings.batch).to(where)
    theory = stages.new_theory(model.theory)
    denoiser = new_denoiser(model, theory, codec, widths)
    x = noise.normal(shape, 0, range(settings.batch)).to(where)
    clock = torch.full((settings.batch,), 500.0, device=where)
    cast = devices.autocast(devices.effective_precision(settings.precision, where), where)

    def loss() -> Tensor:
        with cast:
            return denoiser(x, clock, condition).float().square().mean()

    codec_seconds = _seconds(codec.to(where), codec_loss, where)
    return codec_seconds, _seconds(denoiser.to(where), loss, where)


def _seconds(network: torch.nn.Module, loss: Callable[[], Tensor], where: torch.device) -> float:
    """The median of five optimizer steps after two that warm up."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    taken = []
    for _ in range(7):
        began = time.perf_counter()
        loss().backward()
        optimiser.step()
        optimiser.zero_grad()
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        taken.append(time.perf_counter() - began)
    return sorted(taken[2:])[2] * 1.1


def judge_openmoji(
    model: PaintingModel, data: Collection, folder: RunFolder, step: int, progress: Progress | None
) -> tuple[dict[str, float], dict[str, str]]:
    """Share of pictures whose nearest training picture is the one asked for, or its namesake."""
    seen = data.of("train")
    side = int(model.info["resolution"])
    pictures = torch.stack([fit(_image(sample.source()), side, side) for sample in seen])
    neighbours = Neighbours(pictures, [sample.captions for sample in seen])
    prompts = chosen([sample.captions[0] for sample in seen], JUDGED)
    drawn = draw(model, prompts, folder, step, "judged", progress)
    right = neighbours.judge(torch.stack([fit(picture, side, side) for picture in drawn]), prompts)
    unseen = data.of("held_out")[:JUDGED]
    accuracy = {"trained": sum(right) / len(right)}
    if unseen:
        asked = [sample.captions[0] for sample in unseen]
        fresh = draw(model, asked, folder, step, "judged_held_out", progress)
        truth = torch.stack([fit(_image(sample.source()), side, side) for sample in unseen])
        everything = Neighbours(
            torch.cat([pictures, truth]), [*(one.captions for one in seen), *([text] for text in asked)]
        )
        found = everything.judge(torch.stack([fit(picture, side, side) for picture in fresh]), asked)
        accuracy["held_out"] = sum(found) / len(found)
    return accuracy, {"trained": neighbours.how, "held_out": "the same, the held-out pictures added"}


def judge_shapes(
    model: PaintingModel, data: Collection, folder: RunFolder, step: int, progress: Progress | None
) -> tuple[dict[str, float], dict[str, str]]:
    """Shares of pictures of unseen combinations in which every named thing is right, read from the pixels."""
    prompts = chosen([sample.captions[0] for sample in data.of("held_out")], JUDGED)
    drawn = draw(model, prompts, folder, step, "judged_held_out", progress)
    verdicts = [shapes.judge(picture, prompt) for picture, prompt in zip(drawn, prompts, strict=True)]
    accuracy = {
        name: sum(verdict[name] for verdict in verdicts) / len(verdicts)
        for name in ("shape_and_color", "position")
    }
    accuracy["reader"] = shapes.accuracy(size=int(model.info["resolution"]))
    how = "every thing named is read from the pixels; training never showed a prompt's two things together"
    return accuracy, {"shape_and_color": how, "reader": "the same, on clean drawings"}


def chosen(captions: list[str], count: int) -> list[str]:
    """`count` of the captions at random, the same every time."""
    distinct = sorted(set(captions))
    order = noise.permutation(len(distinct), 0, "judged prompts", 0).tolist()
    return [distinct[index] for index in order[:count]]


def draw(
    model: PaintingModel,
    prompts: list[str],
    folder: RunFolder,
    step: int,
    group: str,
    progress: Progress | None,
) -> list[Image.Image]:
    """Draw the prompts and enter the pictures into the run."""
    seeds = [FIRST_SEED + index for index in range(len(prompts))]

    def watch(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total, f"drawing {group.replace('_', ' ')}")

    pictures = model.generate(prompts, seed=seeds, watch=watch)
    names = [f"{group}-{step:06d}-{index:02d}.png" for index in range(len(pictures))]
    for picture, name in zip(pictures, names, strict=True):
        picture.save(folder.samples / name)
    told = {"prompts": prompts, "seeds": seeds, "group": group}
    folder.event("pictures", step=step, files=[f"samples/{name}" for name in names], **told)
    return pictures


def _image(source: Any) -> Image.Image:
    assert isinstance(source, Image.Image), "embedded samples draw themselves"
    return source


def _phases(folder: RunFolder) -> dict[str, float]:
    """Seconds of each phase, over all the times the demo was started."""
    spent: dict[str, float] = dict.fromkeys(("codec", "encode", "train"), 0.0)
    for event in folder.events():
        if event["kind"] == "phase" and event["name"] in spent:
            spent[event["name"]] += event["seconds"]
    return spent


def _peak_memory_gb() -> float:
    """The most memory this process ever held, in GB; on a GPU, the GPU's."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)
