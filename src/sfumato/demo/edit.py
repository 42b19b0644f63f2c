"""Demo: "make it blue". A picture and an instruction give the picture after the edit."""

from pathlib import Path

from sfumato.data.sources import shape_reader
from sfumato.demo.budget import recipe_for_budget
from sfumato.demo.controlnet import overlap
from sfumato.demo.drawing import draw
from sfumato.demo.runner import DemoReport, DemoTask, Scores
from sfumato.demo.two_step import companion, plan_of, unseen
from sfumato.recipe import Recipe

PLAN = plan_of("edit", minutes=5.0, guidance=2.0, fewest=2400)


def recipe(data: str, out: Path, minutes: float | None, device: str) -> Recipe:
    """The recipe that fills the minutes on this machine."""
    return recipe_for_budget(PLAN, data, out, minutes, device)


def judge(trained: DemoReport) -> Scores:
    """Whether the thing is in the color asked for, and else as it was, of unseen shapes in new colors."""
    samples = unseen(trained)
    sources = [companion(sample, "edit_source") for sample in samples]
    prompts = [sample.captions[0] for sample in samples]
    drawn = draw(trained, prompts, "judged_held_out", image=sources)
    done, kept = 0, 0.0
    for picture, source, prompt in zip(drawn, sources, prompts, strict=True):
        wanted = [(one.shape, prompt.split()[-1]) for one in shape_reader.read(source)]
        done += wanted == [(one.shape, one.color) for one in shape_reader.read(picture)]
        kept += overlap(picture, source)
    found = {"edit_done": done / len(drawn), "kept_iou": kept / len(drawn)}
    notes = {
        "edit_done": "exactly the source's shape, in the color named, which training never showed it in",
        "kept_iou": "mean intersection over union with the source's silhouette",
    }
    return found, notes


TASK = DemoTask(recipe, judge)
