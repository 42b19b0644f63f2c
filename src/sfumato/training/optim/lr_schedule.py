"""The learning rate over a run, as a factor that is a pure function of the step.

Where the clock says how long a run is, it is one of the step and of what the clock decided.
"""

import math
from collections.abc import Callable

from sfumato.errors import one_of

Schedule = Callable[[float], float]
"""From the share of training done after warm-up, in [0, 1], to a factor in [0, 1]."""

DECAY_SHARE = 0.2


def constant(_: float) -> float:
    """Always 1."""
    return 1.0


def cosine(done: float) -> float:
    """Half a cosine from 1 to 0 (arXiv:1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * done))


def linear(done: float) -> float:
    """A straight line from 1 to 0."""
    return 1 - done


def warmup_stable_decay(done: float) -> float:
    """1 until the last fifth, then 1 − √ of what is done of it (arXiv:2405.18392)."""
    if done < 1 - DECAY_SHARE:
        return 1.0
    return 1 - math.sqrt((done - (1 - DECAY_SHARE)) / DECAY_SHARE)


def rex(done: float) -> float:
    """The reflected exponential (1 − z)/(1 − z/2) (arXiv:2107.04197)."""
    return (1 - done) / (1 - done / 2)


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "wsd": warmup_stable_decay,
    "rex": rex,
}


def lr_factor(name: str, step: int, steps: int, warmup_steps: int, done: float | None = None) -> float:
    """What the learning rate is multiplied by in step `step` (0, 1, …) of `steps`.

    Args:
        done: share of training that is done, where something else than `steps` says so; the warm-up is
            counted in steps all the same.
    Raises:
        Refused: there is no schedule of that name.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    schedule = SCHEDULES[one_of("train.lr_schedule", name, SCHEDULES)]
    if done is None:
        done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return schedule(min(1.0, done))
