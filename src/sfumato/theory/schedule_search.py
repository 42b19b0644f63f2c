"""Times fitted to one model: a pilot run is repeated with bent grids, and the bend that errs least is kept.

`two_sided` says where a network of no particular data wants its times. A model's own wishes are told by a
bend of that density: log-density at a few knots along the way. Each bend is judged by what counts, the
distance of short runs from a fine run of the same noise, so that what later steps mend or make worse is
counted too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sfumato.errors import Refused
from sfumato.theory.definition import Theory, to_lists
from sfumato.theory.grids import angle_at, custom, interpolate, node_positions, progress, two_sided
from sfumato.theory.solvers.solver import integrate
from sfumato.theory.types import AnyFloats, Denoise

KNOTS, POINTS, FINE = 7, 65, 96
"""Knots of the bend, points of the table that is kept, evaluations of the run that counts as exact."""
STRIDES = (0.6, 0.3)
"""By how much a knot's log-density is tried up and down, one round of all knots each."""
KEPT = 0.95
"""Share of the pilot's samples that is judged: the few that end elsewhere would rule."""


@dataclass(frozen=True)
class FittedGrid:
    """Where a model needs its times, whatever theory and however many.

    Args:
        angles: φ = atan2(s, a), falling from π/2 (noise) to 0 (data).
        shares: of the steps, from 0 at the first angle to 1 at the last.
    """

    angles: tuple[float, ...]
    shares: tuple[float, ...]

    def grid(self, theory: Theory, steps: int) -> Tensor:
        """`steps` times and the end, [steps + 1] float64, from t_noise to t_data.

        Raises:
            Refused: for fewer than one step.
        """
        if steps < 1:
            raise Refused(f"steps is {steps}; a grid needs at least 1.")
        angles, shares = (torch.tensor(v, dtype=torch.float64) for v in (self.angles, self.shares))
        way = progress(angles)
        ends = progress(torch.stack([theory.angle(end) for end in (theory.t_noise, theory.t_data)]))
        high, low = (float(end) for end in interpolate(ends, way, shares))
        inner = interpolate(high + (low - high) * node_positions(steps)[1:-1], shares, way)
        middle = theory.time_of(angle_at(inner))
        first, last = (middle.new_tensor([end]) for end in (theory.t_noise, theory.t_data))
        return custom(theory, torch.cat([first, middle, last]))

    def to_dict(self) -> dict[str, list[float]]:
        """Plain numbers, to be stored beside a model."""
        return {"angles": list(self.angles), "shares": list(self.shares)}

    @staticmethod
    def from_dict(stored: dict[str, Any]) -> "FittedGrid":
        """What `to_dict` wrote.

        Raises:
            Refused: for anything else.
        """
        angles, shares = _numbers(stored.get("angles")), _numbers(stored.get("shares"))
        if len(angles) != len(shares) or len(angles) < 2:
            raise Refused("Stored times must hold as many angles as shares. Fit them again.")
        return FittedGrid(angles, shares)

    @staticmethod
    def bent(bend: Sequence[float]) -> "FittedGrid":
        """The density of `two_sided` times exp(bend), whose values stand at knots evenly along the way."""
        way = torch.linspace(0, 1, POINTS, dtype=torch.float64)
        knots = torch.linspace(0, 1, len(bend), dtype=torch.float64)
        density = interpolate(way, knots, torch.tensor(bend, dtype=torch.float64)).exp()
        share = torch.cat([density.new_zeros(1), ((density[1:] + density[:-1]) / 2).cumsum(0)])
        return FittedGrid(tuple(to_lists(angle_at(way))), tuple(to_lists(share / share[-1])))


def fit(
    denoise: Denoise,
    x_T: AnyFloats,
    theory: Theory,
    budgets: Sequence[int] = (5, 8, 16),
    solver: str = "auto",
    watch: Callable[[int, int], None] | None = None,
) -> FittedGrid:
    """Fit times to a model. Asks about `cost(budgets)` times for the whole batch.

    Args:
        denoise, theory: the model and what it answers.
        x_T: unit noise of a few dozen pictures that will not be judged.
        budgets: evaluations of the short runs; the times serve any number, best near these.
        solver: what the times are for.
        watch: called with (evaluations done, in all).
    Raises:
        Refused: for budgets below 3.
    """
    if not budgets or min(budgets) < 3:
        raise Refused(f"budgets are {list(budgets)}; each needs at least 3 evaluations.")
    done = 0

    def counted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal done
        done += 1
        if watch is not None:
            watch(min(done, cost(budgets)), cost(budgets))
        return denoise(x, t)

    with torch.no_grad():
        wanted = integrate(counted, x_T, theory, two_sided(theory, FINE)).double()

        def error(bend: Sequence[float]) -> float:
            pilot = FittedGrid.bent(bend)
            runs = (integrate(counted, x_T, theory, pilot.grid(theory, n), solver) for n in budgets)
            return sum(math.log(max(_miss(run.double() - wanted), 1e-12)) for run in runs) / len(budgets)

        return FittedGrid.bent(_least(error, [0.0] * KNOTS))


def cost(budgets: Sequence[int]) -> int:
    """Evaluations `fit` needs at most."""
    return FINE + (1 + 3 * KNOTS * len(STRIDES)) * sum(budgets)


def _numbers(values: object) -> tuple[float, ...]:
    """A stored list as numbers; nothing, where it is no list."""
    return tuple(map(float, cast("Sequence[Any]", values))) if isinstance(values, Sequence) else ()


def _least(error: Callable[[Sequence[float]], float], bend: list[float]) -> list[float]:
    """Knot by knot, up, down, and where the parabola through the three has its floor."""
    best = error(bend)
    for stride in STRIDES:
        for k in range(len(bend)):
            here = bend[k]
            tried: dict[float, float] = {}
            for way in (stride, -stride):
                tried[way] = error([*bend[:k], here + way, *bend[k + 1 :]])
            curve = tried[stride] + tried[-stride] - 2 * best
            if curve > 1e-6:
                floor = max(
                    -1.5 * stride, min(1.5 * stride, stride * (tried[-stride] - tried[stride]) / curve / 2)
                )
                if abs(floor) > 0.1 * stride and abs(abs(floor) - stride) > 0.1 * stride:
                    tried[floor] = error([*bend[:k], here + floor, *bend[k + 1 :]])
            way = min(tried, key=tried.__getitem__)
            if tried[way] < best:
                bend, best = [*bend[:k], here + way, *bend[k + 1 :]], tried[way]
    return bend


def _miss(miss: Tensor) -> float:
    each = miss.flatten(1).square().mean(1).sort()[0]
    return float(each[: max(1, round(KEPT * len(each)))].mean().sqrt())
