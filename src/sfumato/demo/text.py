"""Demo: text → picture, on OpenMoji's drawings or on shapes whose every word is read back from the pixels."""

from dataclasses import replace
from pathlib import Path

import torch

from sfumato.data.sources import shape_reader
from sfumato.demo.budget import Plan, recipe_for_budget
from sfumato.demo.drawing import JUDGED, draw, picture_of, sample_prompts
from sfumato.demo.runner import DemoReport, DemoTask, Scores
from sfumato.evaluation import Neighbors
from sfumato.generation.settings import SampleSettings
from sfumato.models.settings import ModelSettings
from sfumato.readers.media import center_crop_resize
from sfumato.recipe import Recipe
from sfumato.training.settings import TrainSettings

_MODEL = ModelSettings(
    width=192, depth=6, heads=3, patch=2, codec_stride=8, latent_channels=24, codec_width=32
)
_TRAIN = TrainSettings(
    batch=16, learning_rate=1.5e-3, warmup_steps=40, lr_schedule="linear", ema=0.995, save_every=500,
    keep_checkpoints=1, validate_every=0, ema_snapshot_every=0,
)  # fmt: skip
_SAMPLE = SampleSettings(steps=16, guidance=2.0)
_PICTURES = Recipe(
    model=replace(_MODEL, codec_batch=16),
    train=replace(_TRAIN, batch=32, learning_rate=1.2e-3, ema=0.99),
    sample=_SAMPLE,
)
_SHAPES = Recipe(
    model=replace(
        _MODEL,
        width=128,
        depth=5,
        heads=2,
        pooled_fourier_terms=6,
        codec_stride=4,
        latent_channels=16,
        codec_batch=32,
    ),
    train=replace(_TRAIN, learning_rate=2.5e-3),
    sample=replace(_SAMPLE, guidance=4.0),
)
PLANS = {
    "openmoji": Plan(_PICTURES, 4.8, 0.13, 70, 1000, 8000, 200, 2000, 64),
    "openmoji-all": Plan(_PICTURES, 10.0, 0.15, 70, 2000, 20000, 300, 3000, 64),
    "shapes": Plan(_SHAPES, 4.0, 0.10, 150, 2000, 16000, 100, 1000, 32),
}


def recipe(data: str, out: Path, minutes: float | None, device: str) -> Recipe:
    """The recipe that fills the minutes on this machine."""
    return recipe_for_budget(PLANS[data], data, out, minutes, device)


def judge(trained: DemoReport) -> Scores:
    """By the data: shapes are read, drawings compared with the training pictures."""
    return judge_shapes(trained) if trained.data.name == "shapes" else judge_openmoji(trained)


def judge_openmoji(trained: DemoReport) -> Scores:
    """Share of pictures whose nearest training picture is the one asked for, or its namesake."""
    known = trained.data.with_split("train")
    side = int(trained.model.info["resolution"])
    pictures = torch.stack([center_crop_resize(picture_of(sample), side, side) for sample in known])
    neighbors = Neighbors(pictures, [sample.captions for sample in known], namesakes=True)
    prompts = sample_prompts([sample.captions[0] for sample in known], JUDGED)
    drawn = draw(trained, prompts, "judged")
    right = neighbors.judge(
        torch.stack([center_crop_resize(picture, side, side) for picture in drawn]), prompts
    )
    unseen = trained.data.with_split("held_out")[:JUDGED]
    accuracy = {"trained": sum(right) / len(right)}
    how = {"trained": f"{neighbors.how}; chance {neighbors.chance(prompts):.1%}"}
    if unseen:
        asked = [sample.captions[0] for sample in unseen]
        fresh = draw(trained, asked, "judged_held_out")
        truth = torch.stack([center_crop_resize(picture_of(sample), side, side) for sample in unseen])
        everything = Neighbors(
            torch.cat([pictures, truth]),
            [*(one.captions for one in known), *([text] for text in asked)],
            namesakes=True,
        )
        found = everything.judge(
            torch.stack([center_crop_resize(picture, side, side) for picture in fresh]), asked
        )
        accuracy["held_out"] = sum(found) / len(found)
        how["held_out"] = f"the same, the held-out pictures added; chance {everything.chance(asked):.1%}"
    return accuracy, how


def judge_shapes(trained: DemoReport) -> Scores:
    """Shares of pictures of unseen combinations in which every named thing is right, read from the pixels."""
    prompts = sample_prompts([sample.captions[0] for sample in trained.data.with_split("held_out")], JUDGED)
    drawn = draw(trained, prompts, "judged_held_out")
    verdicts = [shape_reader.judge(picture, prompt) for picture, prompt in zip(drawn, prompts, strict=True)]
    accuracy = {
        name: sum(verdict[name] for verdict in verdicts) / len(verdicts)
        for name in ("shape_and_color", "position")
    }
    accuracy["reader"] = shape_reader.accuracy(size=int(trained.model.info["resolution"]))
    how = "every thing named is read from the pixels; training never showed a prompt's two things together"
    return accuracy, {"shape_and_color": how, "reader": "the same, on clean drawings"}


TASK = DemoTask(recipe, judge)
