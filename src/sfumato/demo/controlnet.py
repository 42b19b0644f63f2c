"""Demo: outline → picture. The outline says where, words say what: a ControlNet beside a model of shapes."""

from dataclasses import replace

import numpy as np
from PIL import Image

from ..data import shapes
from ..data.settings import DataSettings
from ..workflow.guided import picture_for
from .drawing import draw, picture_of
from .stages import recipe_beside, train_both, unseen
from .text import PLANS
from .way import Seen, Task, Verdict

_TEXT = PLANS["shapes"]
_RECIPE = replace(
    _TEXT.recipe,
    model=replace(_TEXT.recipe.model, train="controlnet"),
    sample=replace(_TEXT.recipe.sample, guidance=3.0),
)
PLAN = replace(_TEXT, recipe=_RECIPE, minutes=6.0, codec=0.07, fewest=500)
BASE_SHARE, GUIDE_COST = 1.2, 1.7


def cover(picture: Image.Image) -> np.ndarray:
    """Where a drawing is not its background, [H, W] bool."""
    away = np.asarray(picture.convert("RGB"), np.float32) - shapes.background(picture)[1]
    return np.linalg.norm(away, axis=-1) > 70


def overlap(drawn: Image.Image, asked: Image.Image) -> float:
    """Intersection over union of what two drawings' outlines enclose."""
    one, other = cover(drawn), cover(asked)
    return float((one & other).sum() / max(1, (one | other).sum()))


def judge(seen: Seen) -> Verdict:
    """How well outlines of unseen combinations are followed, and whether words are, read from the pixels."""
    samples = unseen(seen)
    settings = DataSettings(control="sketch", resolution=int(seen.model.info["resolution"]))
    prompts = [sample.captions[0] for sample in samples]
    outlines = [picture_for(settings, "control", sample) for sample in samples]
    drawn = draw(seen, prompts, "judged_held_out", control=outlines)
    followed = [overlap(one, picture_of(sample)) for one, sample in zip(drawn, samples, strict=True)]
    right = [shapes.judge(one, prompt)["shape_and_color"] for one, prompt in zip(drawn, prompts, strict=True)]
    found = {"outline_iou": float(np.mean(followed)), "shape_and_color": sum(right) / len(right)}
    how = "what the outline encloses in the drawing and in the picture it was taken from: mean of "
    return found, {"outline_iou": f"{how}intersection over union, unseen combinations"}


TASK = Task(
    recipe_beside(PLAN, BASE_SHARE, GUIDE_COST, control="sketch", dropout=("control=0.05",)),
    judge,
    train_both(BASE_SHARE),
)
