"""One-step walks: each plans its coefficients in float64, then asks the network and moves z.

Euler is the derived step itself, a rotation of (z, v); the others are Runge–Kutta rules for dz/dφ = v whose
last step never asks at the data, where a network has not been trained.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sfumato.errors import Refused
from sfumato.theory.trajectory import Node, Trajectory, Weight, combine
from sfumato.theory.types import NoiseSource


def rotation(trajectory: Trajectory, start: Tensor, end: Tensor) -> list[list[Weight]]:
    """(cos Δφ, sin Δφ): z and v turned from `start` to `end` while (x_0, x_T) stay."""
    turn = end - start
    return trajectory.weights(torch.stack([turn.cos(), turn.sin()], -1))


def euler(
    trajectory: Trajectory, x: Tensor, eta: float = 0.0, noise: NoiseSource | None = None
) -> Iterator[Tensor]:
    """First order: the theory's own step, exact for a single data point. One evaluation a step.

    Walks in x_t itself: one pass over the state where the step keeps it whole (flow matching), else two.
    """
    of_out, of_x = trajectory.velocity_coefficients()
    down, back = renoising(trajectory, eta)
    turn, scale_next = down - trajectory.angles[:-1], trajectory.lengths[1:]
    keep = turn.cos() / trajectory.lengths[:-1] + turn.sin() * of_x
    weights = trajectory.weights(torch.stack([scale_next * keep, scale_next * turn.sin() * of_out], -1))
    fresh = [trajectory.radii[i + 1] * ours for i, (_, ours) in enumerate(back)]
    network_times = trajectory.network_times(trajectory.times[:-1])

    def states(x: Tensor) -> Iterator[Tensor]:
        for i, (t, (of_state, of_answer)) in enumerate(zip(network_times, weights, strict=True)):
            x = combine((of_state, x), (of_answer, trajectory.answer(t, x)))
            x = renoised(x, [back[i][0], fresh[i]], noise, i)
            yield x

    return states(x)


Tableau = tuple[tuple[float, ...], ...]
"""Rows of a Runge–Kutta rule: the fraction of the step, then weights of earlier stages; the last row sums."""

HEUN: Tableau = ((1.0, 1.0), (1.0, 0.5, 0.5))
MIDPOINT: Tableau = ((0.5, 0.5), (1.0, 0.0, 1.0))
KUTTA: Tableau = ((0.5, 0.5), (0.5, 0.0, 0.5), (1.0, 0.0, 0.0, 1.0), (1.0, 1 / 6, 1 / 3, 1 / 3, 1 / 6))
OPEN_THIRD: Tableau = ((1 / 3, 1 / 3), (2 / 3, 0.0, 2 / 3), (1.0, 0.25, 0.0, 0.75))
"""Heun's third-order rule; its stages stop at two thirds of the step."""
SINGLE: Tableau = ((1.0, 1.0),)


def runge_kutta(
    trajectory: Trajectory,
    z: Tensor,
    rule: Tableau,
    last: Tableau,
    eta: float = 0.0,
    noise: NoiseSource | None = None,
) -> Iterator[Tensor]:
    """`rule` on every step but the last, where `last` does not ask at the end; both in φ."""
    down, back = renoising(trajectory, eta)
    here, count = trajectory.angles[:-1], trajectory.steps
    rules = [rule] * (count - 1) + [last]
    sizes = down - here
    first = trajectory.step_nodes()
    # without new noise, stages at a step's end are asked at the grid's own times, to the last bit
    ends = [not eta and i + 1 < count for i in range(count)]
    inner = [
        here[i] + row[0] * sizes[i]
        for i in range(count)
        for row in rules[i][:-1]
        if not (ends[i] and row[0] == 1.0)
    ]
    asked = iter(trajectory.between(torch.stack(inner)) if inner else [])
    stages: list[list[Node]] = [
        [first[i], *(first[i + 1] if ends[i] and row[0] == 1.0 else next(asked) for row in rules[i][:-1])]
        for i in range(count)
    ]
    steps = trajectory.column(sizes)
    turns = rotation(trajectory, here, down)

    def states(z: Tensor) -> Iterator[Tensor]:
        for i, (nodes, tableau) in enumerate(zip(stages, rules, strict=True)):
            slopes: list[Tensor] = []
            place = z
            for node, row in zip(nodes, tableau, strict=True):
                slopes.append(trajectory.velocity(node, place))
                if tableau is SINGLE:
                    place = combine((turns[i][0], z), (turns[i][1], slopes[0]))
                else:
                    shares = [(w * steps[i], v) for w, v in zip(row[1:], slopes, strict=True)]
                    place = combine((1.0, z), *shares)
            z = renoised(place, back[i], noise, i)
            yield z

    return states(z)


def heun(
    trajectory: Trajectory, z: Tensor, eta: float = 0.0, noise: NoiseSource | None = None
) -> Iterator[Tensor]:
    """Second order: each step redone with the velocity at its end, the last a rotation. 2n − 1 evaluations.

    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 1, here in φ.
    """
    return runge_kutta(trajectory, z, HEUN, SINGLE, eta, noise)


def midpoint(
    trajectory: Trajectory, z: Tensor, eta: float = 0.0, noise: NoiseSource | None = None
) -> Iterator[Tensor]:
    """Second order: the velocity half-way carries the whole step. 2n evaluations."""
    return runge_kutta(trajectory, z, MIDPOINT, MIDPOINT, eta, noise)


def rk4(
    trajectory: Trajectory, z: Tensor, eta: float = 0.0, noise: NoiseSource | None = None
) -> Iterator[Tensor]:
    """Fourth order (Kutta 1901); the last step uses three stages. 4n − 1 evaluations."""
    return runge_kutta(trajectory, z, KUTTA, OPEN_THIRD, eta, noise)


def churn(
    trajectory: Trajectory,
    z: Tensor,
    noise: NoiseSource | None = None,
    amount: float = 0.4,
    least: float = 0.05,
    most: float = 50.0,
) -> Iterator[Tensor]:
    """EDM's stochastic sampler: noise is raised by `amount` before each Heun step. 2n − 1 evaluations.

    Args:
        amount: γ: s/a grows to (1 + γ)·s/a, at most √2 − 1.
        least, most: s/a between which noise is raised.
    Raises:
        Refused: for an amount outside [0, √2 − 1].
    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 2.
    """
    if not 0 <= amount <= math.sqrt(2) - 1 + 1e-9:
        raise Refused(f"amount is {amount:g}; churn raises s/a by a share between 0 and √2 − 1 = 0.4142.")
    here = trajectory.angles[:-1]
    ratio = here.tan()
    inside = (ratio >= least) & (ratio <= most)
    top = float(trajectory.theory.angle(trajectory.theory.t_noise))
    lifted = torch.where(inside, torch.atan((1 + amount) * ratio).clamp(max=top), here)
    up = trajectory.weights(torch.stack(rising(here, lifted), -1))
    asked = trajectory.step_nodes()
    raised = trajectory.between(lifted)
    nodes = [r if bool(moved.any()) else n for n, r, moved in zip(asked, raised, inside, strict=True)]
    sizes = [trajectory.weight(h) for h in trajectory.angles[1:] - lifted]
    turns = rotation(trajectory, lifted, trajectory.angles[1:])

    def states(z: Tensor) -> Iterator[Tensor]:
        for i, node in enumerate(nodes):
            z = renoised(z, up[i], noise, i)
            if i + 1 < len(nodes):
                z = _heun_step(trajectory, z, node, asked[i + 1], sizes[i])
            else:
                z = combine((turns[i][0], z), (turns[i][1], trajectory.velocity(node, z)))
            yield z

    return states(z)


def restart(
    trajectory: Trajectory,
    z: Tensor,
    noise: NoiseSource | None = None,
    low: float = 0.3,
    high: float = 1.5,
    repeats: int = 1,
    parts: int = 3,
) -> Iterator[Tensor]:
    """Heun, and once past `low`, back up to `high` with new noise and down again.

    Asks 2n − 1 + 2·repeats·parts times.

    Args:
        low, high: ratios s/a; the walk restarts at the grid's time nearest to `low`.
        repeats: how often.
        parts: Heun steps of each way down.
    Raises:
        Refused: unless 0 < low < high, and repeats and parts are at least 1.
    Source: Xu et al. 2023, arXiv:2306.14878.
    """
    if not (0 < low < high and repeats >= 1 and parts >= 1):
        raise Refused(f"Restart needs 0 < low ({low:g}) < high ({high:g}), repeats and parts at least 1.")
    inner = trajectory.angles[1:-1] if trajectory.steps > 1 else trajectory.angles[:1]
    turn_at = int((inner.mean(1).tan().log() - math.log(low)).abs().argmin()) + (
        1 if trajectory.steps > 1 else 0
    )
    bottom = trajectory.angles[turn_at]
    top = (
        torch.atan(torch.full_like(bottom, high)).maximum(bottom).clamp(max=float(trajectory.angles[0].max()))
    )
    up = [trajectory.weight(c) for c in rising(bottom, top)]
    leg = top + (bottom - top) * torch.linspace(0, 1, parts + 1, dtype=torch.float64)[:, None]
    stops = trajectory.between(leg)
    sizes = [trajectory.weight(h) for h in leg.diff(dim=0)]
    nodes, count = trajectory.step_nodes(), trajectory.steps
    strides = trajectory.column(trajectory.angles.diff(dim=0))
    turns = rotation(trajectory, trajectory.angles[:-1], trajectory.angles[1:])

    def states(z: Tensor) -> Iterator[Tensor]:
        for i, node in enumerate(nodes):
            if i == turn_at:
                for again in range(repeats):
                    z = renoised(z, up, noise, again)
                    for start, end, size in zip(stops, stops[1:], sizes, strict=False):
                        z = _heun_step(trajectory, z, start, end, size)
            if i + 1 < count:
                z = _heun_step(trajectory, z, node, nodes[i + 1], strides[i])
            else:
                z = combine((turns[i][0], z), (turns[i][1], trajectory.velocity(node, z)))
            yield z

    return states(z)


def _heun_step(trajectory: Trajectory, z: Tensor, start: Node, end: Node, size: Weight) -> Tensor:
    v = trajectory.velocity(start, z)
    trial = trajectory.velocity(end, combine((1.0, z), (size, v)))
    return combine((1.0, z), (size / 2, v), (size / 2, trial))


# ----------------------------------------------------------------
# New noise on the way down: solve to a quieter angle than asked, then come back up with fresh noise.
#
# With z at φ_down, ρ·z + √(1 − ρ²)·n lies at φ when cos φ = ρ·cos φ_down. Ancestral sampling, DDIM-η, churn
# and
# restart are this one move, and any solver can make it.


def renoising(trajectory: Trajectory, eta: float) -> tuple[Tensor, list[list[Weight]]]:
    """Angles [steps, 1 or B] to solve down to, and the way back up: (ρ, √(1 − ρ²)) per step.

    η = 1 is ancestral sampling; with the rotation it is DDIM-η (Song et al. 2020, arXiv:2010.02502, eq. 16).
    """
    here, there = trajectory.angles[:-1], trajectory.angles[1:]
    if not eta:
        return there, [[1.0, 0.0] for _ in range(trajectory.steps)]
    fresh = (1 - (there.tan() / here.tan()).square()).clamp(min=0).sqrt() * there.sin() * eta
    kept = (1 - fresh.square()).sqrt()
    down = torch.acos((there.cos() / kept).clamp(max=1))
    return torch.where(fresh > 0, down, there), trajectory.weights(torch.stack([kept, fresh], -1))


def rising(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(ρ, √(1 − ρ²)) of the noise that lifts z from angle `low` to `high`."""
    kept = high.cos() / low.cos()
    return kept, (1 - kept.square()).clamp(min=0).sqrt()


def renoised(z: Tensor, back: list[Weight], noise: NoiseSource | None, step: int) -> Tensor:
    """ρ·z + √(1 − ρ²)·n, or z where nothing is drawn."""
    if noise is None or (isinstance(back[1], float) and back[1] == 0.0):
        return z
    return combine((back[0], z), (back[1], noise(z, step)))
