"""Demo: text → clip, on shapes that move; every clip is judged by following its shape from frame to frame."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.data.sources import moving_shapes
from sfumato.demo.budget import Plan, recipe_for_budget
from sfumato.demo.drawing import JUDGED, draw, sample_prompts
from sfumato.demo.runner import DemoReport, DemoTask, Scores
from sfumato.generation.settings import SampleSettings
from sfumato.models.settings import ModelSettings
from sfumato.readers import clips
from sfumato.recipe import Recipe
from sfumato.training.settings import TrainSettings
from sfumato.workflow.evaluate.video_metrics import frame_change

_RECIPE = Recipe(
    model=ModelSettings(
        width=128, depth=5, heads=2, patch=2, pooled_fourier_terms=6, codec_stride=4, codec_time_stride=2,
        latent_channels=32, codec_width=24, codec_batch=8,
    ),
    train=TrainSettings(
        batch=16, learning_rate=2.5e-3, warmup_steps=40, lr_schedule="linear", ema=0.995, save_every=500,
        keep_checkpoints=1, validate_every=0,
    ),
    sample=SampleSettings(steps=16, guidance=1.7),
)  # fmt: skip
TIMES = 3
"""Clips of each unseen combination that are judged; there are few combinations."""
PLANS = {
    "moving-shapes": Plan(_RECIPE, 7.3, 0.14, 80, 700, 4000, 150, 400, side=32, frames=moving_shapes.FRAMES),
}


def recipe(data: str, out: Path, minutes: float | None, device: str) -> Recipe:
    """The recipe that fills the minutes on this machine."""
    made = recipe_for_budget(PLANS[data], data, out, minutes, device)
    return replace(made, data=replace(made.data, fps=float(moving_shapes.RATE)))


def judge(trained: DemoReport) -> Scores:
    """Shares of clips of unseen combinations that are right in shape, color, direction, and all three."""
    unseen = sample_prompts([sample.captions[0] for sample in trained.data.with_split("held_out")], JUDGED)
    prompts = (unseen * TIMES)[:JUDGED]
    drawn = draw(trained, prompts, "judged_held_out")
    verdicts = [moving_shapes.judge(clip, prompt) for clip, prompt in zip(drawn, prompts, strict=True)]
    accuracy = {name: sum(one[name] for one in verdicts) / len(verdicts) for name in verdicts[0]}
    accuracy["reader"] = moving_shapes.accuracy(size=int(trained.model.info["resolution"]))
    changes = [
        float(np.mean([frame_change(clip) for clip in some])) for some in (drawn, training_clips(trained))
    ]
    accuracy["steadiness"] = min(changes) / max(changes)
    notes = {
        "all": "the shape is followed from frame to frame; training showed no clip of all three words",
        "reader": "the same, on clean clips",
        "steadiness": f"from frame to frame pixels change by {changes[0]:.2f} of 255 in what was drawn, by "
        f"{changes[1]:.2f} in training clips; 1 where alike",
    }
    return accuracy, notes


def training_clips(trained: DemoReport) -> list[Any]:
    """As many training clips as are judged, uint8 [F, H, W, 3]."""
    piece = clips.ClipSpan(moving_shapes.FRAMES, float(moving_shapes.RATE))
    side = int(trained.model.info["resolution"])
    some = trained.data.with_split("train")[:JUDGED]
    read = (clips.read_frames(sample.name, sample.source(), piece, side, side) for sample in some)
    return [frames.permute(1, 2, 3, 0).numpy() for frames in read]


TASK = DemoTask(recipe, judge)
