"""What the first loss of a pretrained base should be: better than a guess, its own, and the same translated.

The guess is the best that knows only the latents' mean square: x_0 and x_T as linear functions of x_t,

    E[x_0 | x_t] = a·m²/(a²·m² + s²) · x_t,    E[x_T | x_t] = s/(a²·m² + s²) · x_t
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sfumato.stages.interface import Condition
from sfumato.theory.definition import spread

from .objective import DiffusionObjective, Prepared

MUCH = 1.5
"""A base whose loss is so many times the guess's does not know this data, or is asked wrongly."""
DEAF = 0.35
"""Answers less alike to the target than this (their cosine) are as those of weights drawn at random."""


ENOUGH = 8
"""Samples that answer a question; their times are spread as those of a whole batch are."""


@dataclass(frozen=True)
class Rung:
    """A question, its answer, and what was measured or what to do; `remark`: to be said even if it holds."""

    claim: str
    holds: bool
    detail: str
    remark: bool = False


def parts_of(objective: DiffusionObjective) -> int:
    """Into how many parts the first batch is divided, so that one of them is enough to ask about."""
    return max(1, len(objective.order.at(0)[0]) // ENOUGH)


def some(objective: DiffusionObjective) -> Prepared:
    """Enough samples of the first step."""
    return objective.prepare(0, 0, parts_of(objective))


@torch.no_grad()
def knows(objective: DiffusionObjective) -> Rung:
    """A base asked rightly answers better than the guess; random weights do not know what is asked."""
    batch, x_0, drawn, _ = some(objective)
    rows = objective.rows(batch)
    loss = float(objective.measure(x_0, drawn, rows).mean())
    guess = guessed(objective, x_0, drawn.t, drawn.of(objective.model.theory.mix, x_0))
    weight = objective.weighting(objective.model.theory, drawn.t)
    error = objective.error(guess, x_0, drawn, objective.question(x_0, drawn, rows)[1])
    error = error.flatten(1).mean(1) if error.ndim > 1 else error
    weight = weight.flatten(1).mean(1) if weight.ndim > 1 else weight
    bound = float((error * weight.to(error)).mean())
    good = math.isfinite(loss) and loss < MUCH * bound
    detail = f"{loss:.3f}, that of a guess from the latents' size alone is {bound:.3f}"
    claim = "the first loss is what is to be expected of the base"
    if not good and math.isfinite(loss) and (alike := likeness(objective)) < DEAF:
        detail += (
            f": the base's answers have nothing to do with what is asked (cosine {alike:.2f}), as those of "
            "random weights; if it was trained, its files are not what they should be"
        )
        return Rung(claim, True, detail, remark=True)
    advice = (
        ": see whether the base itself draws (sfumato generate BASE), whether data.resolution is one it "
        "knows, and whether its folder's scheduler says the theory it was trained under"
    )
    return Rung(claim, good, detail if good else detail + advice)


@torch.no_grad()
def likeness(objective: DiffusionObjective) -> float:
    """|cosine| of the network's own answers, in its own theory, with what that theory asks for."""
    batch, x_0, drawn, _ = some(objective)
    model, new, t = objective.model, objective.model.theory, drawn.t
    told = Condition.stack([dict(row) for row in objective.rows(batch)]).to(x_0.device, x_0.dtype)
    base, x_t = copy(model), drawn.of(new.mix, x_0)
    if model.trained is not None:
        base.theory, base.trained = model.trained, None
        _, x_t, t = new.convert(x_t, x_t, t, to=model.trained)
    answer = base.predict(x_t, t, told).float().flatten()
    target = replace(drawn, t=t).of(base.theory.target, x_0).to(answer).flatten()
    size = (answer.norm() * target.norm()).clamp(min=1e-12)
    return float((answer @ target / size).abs())


def guessed(objective: DiffusionObjective, x_0: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
    """The answer of one that knows only the latents' mean square."""
    theory = objective.model.theory
    square = x_0.square().mean().double()
    (a, s), (p, q) = theory.data(t.double()), theory.model(t.double())
    size = (a**2 * square + s**2).clamp(min=1e-12)
    share = (p * a * square + q * s) / size
    if share.ndim > 1:  # frames with times of their own: [B, F] stands beside [B, C, F, H, W]
        return share[:, None, :, None, None].to(x_t) * x_t
    return spread(share, x_t).to(x_t) * x_t


@contextmanager
def quietly(network: nn.Module) -> Iterator[None]:
    """Inside the block the network drops nothing out, so that it answers the same twice."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


@torch.no_grad()
def is_the_bases(objective: DiffusionObjective, without: Callable[[], AbstractContextManager[None]]) -> Rung:
    """Before the first step an adapter has no effect, so the loss is the base's to the last digits."""
    batch, x_0, drawn, _ = some(objective)
    with quietly(objective.model.denoiser):
        mine = float(objective.measure(x_0, drawn, objective.rows(batch)).mean())
        with without():
            base = float(objective.measure(x_0, drawn, objective.rows(batch)).mean())
    good = abs(mine - base) <= 1e-3 * abs(base)
    detail = f"{mine:.4f}, without the adapter {base:.4f}"
    if not good and mine < MUCH * base:
        return Rung("the first loss is the base's own", True, f"{detail}: the adapter has begun to act")
    advice = ": what the adapter starts from (model.init_adapter) was made for another base; leave it out"
    return Rung("the first loss is the base's own", good, detail if good else detail + advice)


@torch.no_grad()
def survives_conversion(objective: DiffusionObjective) -> Rung:
    """Under another theory the base must still mean the same picture by the same noise."""
    model, new = objective.model, objective.model.theory
    assert model.trained is not None
    batch, x_0, drawn, _ = some(objective)
    condition = Condition.stack([dict(row) for row in objective.rows(batch)]).to(x_0.device, x_0.dtype)
    x_t = new.mix(x_0, drawn.x_T, drawn.t)
    _, x_there, there = new.convert(x_t, x_t, drawn.t, to=model.trained)
    base = copy(model)
    base.theory, base.trained = model.trained, None
    with quietly(model.denoiser):
        answer, own = model.predict(x_t, drawn.t, condition), base.predict(x_there, there, condition)
    here, _ = new.split(x_t, answer.to(x_t.dtype), drawn.t)
    mine, _ = model.trained.split(x_there, own.to(x_there.dtype), there)
    error = float((here - mine).abs().mean() / mine.abs().mean().clamp(min=1e-12))
    good = error < 1e-2
    detail = f'the pictures "{new.name}" and "{model.trained.name}" mean differ by {error:.1e} of their size'
    advice = ": the change of theory loses something here; leave model.theory out"
    return Rung(
        "under its new theory the base means what it meant", good, detail if good else detail + advice
    )
