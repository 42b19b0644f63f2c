"""Demo: outline → picture. The outline says where, words say what: a ControlNet beside a model of shapes."""

import numpy as np
from PIL import Image

from sfumato.data.settings import DataSettings
from sfumato.data.sources import shape_reader
from sfumato.demo.drawing import draw, picture_of
from sfumato.demo.runner import DemoReport, DemoTask, Scores
from sfumato.demo.two_step import GuideDemo, plan_of, unseen
from sfumato.settings import Table
from sfumato.workflow.control_training import picture_for

DEMO = GuideDemo(
    plan_of("controlnet", minutes=5.0, guidance=3.0, fewest=600),
    base_share=0.7,
    fewest_base=2000,
    data={"control_image": "sketch", "condition_dropout": Table({"control": 0.05})},
)


def cover(picture: Image.Image) -> np.ndarray:
    """Where a drawing is not its background, [H, W] bool."""
    away = np.asarray(picture.convert("RGB"), np.float32) - shape_reader.background(picture)[1]
    return np.linalg.norm(away, axis=-1) > 70


def overlap(drawn: Image.Image, asked: Image.Image) -> float:
    """Intersection over union of what two drawings' outlines enclose."""
    one, other = cover(drawn), cover(asked)
    return float((one & other).sum() / max(1, (one | other).sum()))


def judge(trained: DemoReport) -> Scores:
    """How well outlines of unseen combinations are followed, and whether words are, read from the pixels."""
    samples = unseen(trained)
    settings = DataSettings(control_image="sketch", resolution=int(trained.model.info["resolution"]))
    prompts = [sample.captions[0] for sample in samples]
    outlines = [picture_for(settings, "control", sample) for sample in samples]
    drawn = draw(trained, prompts, "judged_held_out", control=outlines)
    followed = [overlap(one, picture_of(sample)) for one, sample in zip(drawn, samples, strict=True)]
    right = [
        shape_reader.judge(one, prompt)["shape_and_color"] for one, prompt in zip(drawn, prompts, strict=True)
    ]
    found = {"outline_iou": float(np.mean(followed)), "shape_and_color": sum(right) / len(right)}
    how = "what the outline encloses in the drawing and in the picture it was taken from: mean of "
    return found, {"outline_iou": f"{how}intersection over union, unseen combinations"}


TASK = DemoTask(DEMO.recipe, judge, DEMO.train)
