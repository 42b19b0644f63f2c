"""Adaptive walk: a tolerance goes in, the number of evaluations comes out; every sample takes its own steps.

A third-order rule with stages at 0, 1/2 and 3/4 of the step, so that the data end is never asked, beside
the second-order midpoint rule it contains (Bogacki & Shampine 1989). Own steps keep a picture independent
of its batch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sfumato.errors import Refused
from sfumato.theory.trajectory import Trajectory, Weight, combine

PROBE = 65


def adaptive(
    trajectory: Trajectory, z: Tensor, tolerance: float = 1e-3, most: int = 1000
) -> Iterator[Tensor]:
    """Third order between the grid's ends; yields x_t [B, …] after every round of three evaluations.

    Args:
        tolerance: error a step may make, root mean square over a sample, in units of the data.
        most: rounds after which the walk gives up.
    Raises:
        Refused: for a tolerance ≤ 0, and where the tolerance is not met within `most` rounds.
    """
    if not tolerance > 0:
        raise Refused(f"tolerance is {tolerance:g}; it is the error a step may make and must be above 0.")
    start, end = (trajectory.angles[i].expand(len(z)).clone() for i in (0, -1))
    inner = torch.linspace(0, 1, PROBE, dtype=torch.float64)[1:-1, None]
    trajectory.between(start + (end - start) * inner)  # a singular time between the ends is refused now
    trajectory.step_nodes()

    def states(z: Tensor) -> Iterator[Tensor]:
        here, size = start.clone(), 0.05 * (end - start)
        done = torch.zeros(len(z), dtype=torch.bool)
        for _ in range(most):
            size = torch.where((end - here).abs() < size.abs() * 1.001, end - here, size)
            asked = torch.stack([here, here + size / 2, here + 0.75 * size])
            z_new, miss = _trial(trajectory, z, asked, trajectory.weight(size))
            taken = (miss <= tolerance) & ~done
            grow = (0.9 * (tolerance / miss.clamp(min=1e-12)) ** (1 / 3)).clamp(0.2, 4.0)
            z = torch.where(taken.to(z.device).reshape(-1, *[1] * (z.ndim - 1)), z_new, z)
            reached = (end - here - size).abs() < 1e-12
            here = torch.where(taken & ~reached, here + size, here)
            done = done | (taken & reached)
            size = torch.where(done, size, size * grow)
            at = torch.where(done, end, here)
            yield trajectory.weight(torch.hypot(*trajectory.theory.data(trajectory.theory.time_of(at)))) * z
            if bool(done.all()):
                return
        raise Refused(
            f"A tolerance of {tolerance:g} was not met within {most} rounds. Raise it, or raise `most`; "
            f"float32 states meet nothing below about 1e-6."
        )

    return states(z)


def _trial(trajectory: Trajectory, z: Tensor, asked: Tensor, size: Weight) -> tuple[Tensor, Tensor]:
    nodes = trajectory.between(asked)
    k1 = trajectory.velocity(nodes[0], z)
    k2 = trajectory.velocity(nodes[1], combine((1.0, z), (size / 2, k1)))
    k3 = trajectory.velocity(nodes[2], combine((1.0, z), (0.75 * size, k2)))
    new = combine((1.0, z), (2 / 9 * size, k1), (1 / 3 * size, k2), (4 / 9 * size, k3))
    miss = (new - combine((1.0, z), (size, k2))).flatten(1).double().square().mean(1).sqrt().cpu()
    return new, miss
