"""Times fitted to one model: a fine pilot run shows where its velocity bends, and there the times go.

A multistep rule of order k errs by about h^(k+1)·|dᵏv/dqᵏ| a step, with q = log(s/a) as the even coordinate.
Steps whose errors are all alike lie at equal shares of ∫ |dᵏv/dqᵏ|^(1/(k+1)) dq.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import Refused
from .course import Course, combine, start_of
from .definition import Theory
from .grids import crowding, custom, evenness, interpolate
from .shapes import Anything, Denoise

LOWEST, HIGHEST = 2e-3, 200.0
"""Ratios s/a between which the pilot looks."""
PILOTED = 0.5
"""Share of the times that go where the pilot saw difficulty; the rest keep to `two_sided`, which hedges."""


@dataclass(frozen=True)
class Pilot:
    """Where a model needs its times, whatever theory and however many.

    Args:
        ratios: log(s/a), falling from noise to data.
        shares: of the difficulty, from 0 at the first ratio to 1 at the last.
    """

    ratios: tuple[float, ...]
    shares: tuple[float, ...]

    def grid(self, theory: Theory, steps: int) -> Tensor:
        """`steps` times and the end, [steps + 1], from t_noise to t_data."""
        if steps < 1:
            raise Refused(f"steps is {steps}; a grid needs at least 1.")
        top, bottom = (float(theory.angle(end).tan()) for end in (theory.t_noise, theory.t_data))
        q = torch.linspace(math.log(min(top, 1e4)), math.log(max(bottom, 1e-5)), 4001, dtype=torch.float64)
        seen, ratios = (torch.tensor(v, dtype=torch.float64) for v in (self.shares, self.ratios))
        usual = evenness(
            torch.cat([q.exp(), torch.tensor([top, bottom], dtype=torch.float64)]), *crowding(steps)
        )
        usual = (usual[-2] - usual[:-2]) / (usual[-2] - usual[-1])
        share = PILOTED * interpolate(-q, -ratios, seen) + (1 - PILOTED) * usual
        i = torch.arange(1, steps, dtype=torch.float64)
        place = PILOTED * (i - 0.3) / (steps - 0.6) + (1 - PILOTED) * i / steps
        middle = theory.time_at(-2 * interpolate(place, share, q))
        ends = torch.tensor([theory.t_noise, theory.t_data], dtype=torch.float64)
        return custom(theory, torch.cat([ends[:1], middle, ends[1:]]))

    def to_dict(self) -> dict[str, list[float]]:
        """Plain numbers, to be stored beside a model."""
        return {"ratios": list(self.ratios), "shares": list(self.shares)}

    @staticmethod
    def from_dict(stored: dict[str, Any]) -> "Pilot":
        """What `to_dict` wrote.

        Raises:
            Refused: for anything else.
        """
        ratios, shares = stored.get("ratios"), stored.get("shares")
        if not isinstance(ratios, Sequence) or not isinstance(shares, Sequence) or len(ratios) != len(shares):
            raise Refused("Stored times must hold as many ratios as shares. Fit them again.")
        return Pilot(tuple(map(float, ratios)), tuple(map(float, shares)))


def fit(denoise: Denoise, x_T: Anything, theory: Theory, nodes: int = 128, order: int = 2) -> Pilot:
    """Fit times to a model: one fine run of Heun steps, 2·nodes + 1 evaluations of the batch.

    Args:
        denoise, theory: the model and what it answers.
        x_T: unit noise of a few dozen pictures that will not be judged.
        nodes: steps of the pilot.
        order: of the derivative that is evened out.
    """
    if nodes < 16:
        raise Refused(f"nodes is {nodes}; the pilot needs at least 16 steps to see where the velocity bends.")
    top = math.tan(min(float(theory.angle(theory.t_noise)), math.pi / 2 - 1e-3))
    q = torch.linspace(math.log(min(top, HIGHEST)), math.log(LOWEST), nodes + 1, dtype=torch.float64)
    course = Course(denoise, theory, theory.time_at(-2 * q), x_T)
    stops = course.nodes(course.times)
    z = start_of(x_T, theory, theory.t_noise)
    slopes = []
    turn = course.angles[:, 0].sin() * course.angles[:, 0].cos()  # dφ/dq
    v = course.velocity(stops[0], z)
    for i in range(nodes):
        slopes.append((v * turn[i]).double().cpu())
        step = float(course.angles[i + 1, 0] - course.angles[i, 0])
        trial = course.velocity(stops[i + 1], combine((1.0, z), (step, v)))
        z = combine((1.0, z), (step / 2, v), (step / 2, trial))
        v = course.velocity(stops[i + 1], z)
    return _even(q[:nodes], torch.stack(slopes).flatten(2), order)


def _even(q: Tensor, slopes: Tensor, order: int) -> Pilot:
    """Difficulty along q from dv/dq [nodes, B, D]: wide differences, a smooth root, a floor."""
    width, bend = 3, slopes
    for _ in range(order):
        bend = (bend[width:] - bend[:-width]) / (width * float((q[1] - q[0]).abs()))
    size = bend.square().mean(-1).sqrt().mean(-1)  # per sample first: a single wild one must not rule
    rate = size.clamp(min=1e-12) ** (1 / (order + 1))
    rate = torch.nn.functional.avg_pool1d(
        torch.nn.functional.pad(rate[None, None], (5, 5), mode="replicate"), 11, stride=1
    )[0, 0]
    rate = rate.clamp(min=0.05 * float(rate.max()))
    seen = q[order * width // 2 :][: len(rate)]
    share = torch.cat([rate.new_zeros(1), ((rate[1:] + rate[:-1]) / 2 * seen.diff().abs()).cumsum(0)])
    return Pilot(tuple(seen.tolist()), tuple((share / share[-1]).tolist()))
