"""The default walk: Adams in φ, each step redone with the next answer, leaning only as far as trusted.

The velocity is bounded and, for data of unit variance, close to zero, so its polynomial in φ goes far.
Where data part into modes, and under strong guidance, it bends faster than the grid can follow; there the
high-order parts are shrunk, sample by sample, by how large they are beside the first-order step.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sfumato.theory.solvers.multistep import plan
from sfumato.theory.trajectory import Trajectory, Weight, combine

PREDICTED, CORRECTED = 0.1, 0.04
"""Shares of the first-order step, per step of the grid up to 20, at which a prediction's higher-order part
and a correction are halved: the denser the grid, the further polynomials are trusted."""


def damped_adams(trajectory: Trajectory, z: Tensor) -> Iterator[Tensor]:
    """One evaluation a step. Predictions of order 2, 3 from 12 steps on, 4 from 25; corrections one above.

    Of a prediction or correction d beside the first-order step u,
    d / (1 + |d| / (share·|u|)) is used, per sample, with |u| at least the angle turned.
    """
    nodes = trajectory.step_nodes()
    predict, correct = (2, 3) if trajectory.steps < 12 else (3, 4) if trajectory.steps < 25 else (4, 5)
    legs = plan(trajectory, "velocity", predict, correct, plain=False)
    predicted, corrected = (share * min(trajectory.steps, 20) for share in (PREDICTED, CORRECTED))
    sizes = trajectory.column(trajectory.angles.diff(dim=0))

    def states(z: Tensor) -> Iterator[Tensor]:
        past: list[Tensor] = []
        before = z
        for i, (node, leg) in enumerate(zip(nodes, legs, strict=True)):
            v = trajectory.velocity(node, z)
            past = [v, *past][:5]
            if i:
                made = z - before
                move = combine((-1.0, made), *zip(leg.redo, past, strict=False))
                z = damped_step(z, move, made, corrected, sizes[i - 1])
            before = z
            if i:
                bend = combine((leg.past[0] - sizes[i], v), *zip(leg.past[1:], past[1:], strict=False))
                z = damped_step(
                    combine((1.0, z), (sizes[i], v)),
                    bend,
                    v,
                    predicted * abs(sizes[i]),
                    1.0,
                )
            else:
                z = combine((1.0, z), (sizes[0], v))
            yield z

    return states(z)


def damped_step(base: Tensor, move: Tensor, unit: Tensor, share: Weight, least: Weight) -> Tensor:
    """base + move / (1 + |move| / (share · max(|unit|, |least|))), sizes in root mean square per sample."""
    axes = tuple(range(1, base.ndim))
    count = base[0].numel() ** 0.5
    exact = torch.promote_types(base.dtype, torch.float32)
    linalg: Any = torch.linalg  # its functions have no types
    size: Tensor = linalg.vector_norm(unit, dim=axes, keepdim=True, dtype=exact)
    floor = abs(least) * count
    room: Tensor = share * (size.clamp(min=floor) if isinstance(floor, float) else torch.maximum(size, floor))
    part: Tensor = room / (room + linalg.vector_norm(move, dim=axes, keepdim=True, dtype=exact))
    return torch.addcmul(base, move, part.to(base.dtype))
