"""Demo: reference → picture. The reference says what, in shape and color; words say how large and on what."""

from dataclasses import replace

from ..data import shapes
from .drawing import draw
from .stages import companion, recipe_beside, train_both, unseen
from .text import PLANS
from .way import Seen, Task, Verdict

_TEXT = PLANS["shapes"]
_RECIPE = replace(
    _TEXT.recipe,
    model=replace(_TEXT.recipe.model, train="ip-adapter"),
    sample=replace(_TEXT.recipe.sample, guidance=3.0),
)
PLAN = replace(_TEXT, recipe=_RECIPE, minutes=6.0, codec=0.07, fewest=500)
BASE_SHARE, GUIDE_COST = 0.5, 1.4


def judge(seen: Seen) -> Verdict:
    """Whether a drawing shows the reference's thing, in a color it was never trained in, read from pixels."""
    samples = unseen(seen)
    references = [companion(sample, "reference") for sample in samples]
    drawn = draw(seen, [sample.captions[0] for sample in samples], "judged_held_out", reference=references)
    told = [shapes.read(one)[:1] for one in references]
    shown = [shapes.read(one) for one in drawn]
    pairs = [(a[0], b) for a, b in zip(told, shown, strict=True) if a]
    count = len(pairs)
    color = sum(any(one.color == wanted.color for one in things[:1]) for wanted, things in pairs)
    shape = sum(any(one.shape == wanted.shape for one in things[:1]) for wanted, things in pairs)
    both = sum(
        [(one.shape, one.color) for one in things] == [(wanted.shape, wanted.color)]
        for wanted, things in pairs
    )
    found = {"color": color / count, "shape": shape / count, "shape_and_color": both / count}
    return found, {"shape_and_color": "exactly the reference's thing, which training never showed so"}


TASK = Task(
    recipe_beside(PLAN, BASE_SHARE, GUIDE_COST, reference="reference", dropout=("reference=0.1",)),
    judge,
    train_both(BASE_SHARE),
)
