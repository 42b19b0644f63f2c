"""The one canonical coordinate: whatever the theory, a solver sees dz/dφ = v on [0, π/2].

    z = x/r,   r = √(a² + s²),   φ = atan2(s, a),   v = cos φ·x_T − sin φ·x_0

v is bounded and has no singular end. A theory enters as a reader from the network's answer to v, once per
asked time, and all its coefficients are known before the first step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from sfumato.errors import Refused
from sfumato.theory.definition import Theory, as_float64, to_lists
from sfumato.theory.types import Denoise, Grid, Samples

Weight = float | Tensor
"""A coefficient: a number for the whole batch, or [B, 1, …] when every sample has its own times."""


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A time at which the network is asked, and how its answer is read there."""

    t: Tensor
    r: Weight
    from_out: Weight
    from_z: Weight


class Trajectory:
    """A grid of a theory, seen from the batch that travels it.

    Args:
        denoise: the network, as the theory's model definition says.
        theory: what x_t and the answer mean.
        times: [N + 1], or [B, N + 1] with a row per sample.
        like: the batch of states; its dtype, device and shape are kept.
    """

    def __init__(self, denoise: Denoise, theory: Theory, times: Grid, like: Samples) -> None:
        self.denoise, self.theory, self.like = denoise, theory, like
        self.times = times.reshape(-1, times.shape[-1]).T  # [N + 1, 1 or B]
        self.angles = theory.angle(self.times)
        self.steps = len(self.times) - 1
        self.lengths = torch.hypot(*theory.data(self.times))
        self.radii = self.column(self.lengths)

    def weight(self, coefficient: Tensor) -> Weight:
        """[1] or [B] float64 → a number or a tensor that multiplies states."""
        if coefficient.shape[0] == 1:
            return float(coefficient)
        return coefficient.to(self.like.device, self.like.dtype).reshape(-1, *[1] * (self.like.ndim - 1))

    def column(self, table: Tensor) -> list[Weight]:
        """[steps, 1 or B] → one weight per step."""
        return [row[0] for row in self.weights(table[..., None])]

    def weights(self, table: Tensor) -> list[list[Weight]]:
        """[steps, 1 or B, terms] → weights per step and term; 1 but for rounding is 1, and costs nothing."""
        table = torch.where((table - 1).abs() < 1e-14, 1.0, table)
        if table.shape[1] == 1:
            return to_lists(table[:, 0])
        return [[self.weight(column) for column in row.T] for row in table]

    def velocity_coefficients(self) -> tuple[Tensor, Tensor]:
        """(of out, of x) [steps, 1 or B] float64: v = of_out·out + of_x·x_t at every asked time.

        Raises:
            Refused: where the theory is singular, before anything is sampled.
        """
        r, from_out, from_z = self.theory.velocity_coefficients(self.times[:-1])
        return from_out, from_z / r

    def network_times(self, times: Tensor) -> list[Tensor]:
        """Times [n, 1 or B] as the network is told them: n tensors [B]."""
        width = self.like.dtype if self.like.dtype == torch.float64 else torch.float32
        if self.like.device.type == "mps":
            width = torch.float32
        return list(times.to(self.like.device, width).expand(-1, len(self.like)).contiguous())

    def step_nodes(self) -> list[Node]:
        """The grid's nodes without its end."""
        return self.nodes(self.times[:-1])

    def between(self, angles: Tensor) -> list[Node]:
        """Nodes at angles [n, 1 or B] that need not lie on the grid."""
        return self.nodes(self.theory.time_of(angles))

    def nodes(self, times: Tensor) -> list[Node]:
        """Nodes at times [n, 1 or B].

        Raises:
            Refused: where the theory is singular, before anything is sampled.
        """
        coefficients = self.weights(torch.stack(self.theory.velocity_coefficients(times), -1))
        return [Node(t, *row) for t, row in zip(self.network_times(times), coefficients, strict=True)]

    def velocity(self, node: Node, z: Samples) -> Tensor:
        """v at z: the network asked once."""
        return combine((node.from_out, self.answer(node.t, scaled(node.r, z))), (node.from_z, z))

    def answer(self, t: Tensor, x: Tensor) -> Tensor:
        """The network's answer in the state's dtype.

        Raises:
            Refused: unless it is one tensor of the state's shape.
        """
        out = cast(object, self.denoise(x, t))  # a user's
        if not isinstance(out, Tensor) or out.shape != x.shape:
            seen = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise Refused(
                f"denoise answers with {seen} to a state of shape {tuple(x.shape)}; they must agree."
            )
        return out if out.dtype == x.dtype else out.to(x.dtype)


def scaled(weight: Weight, x: Tensor) -> Tensor:
    """weight·x, and x itself for 1."""
    return x if isinstance(weight, float) and weight == 1.0 else weight * x


def combine(*terms: tuple[Weight, Tensor]) -> Tensor:
    """The weighted sum of tensors, one pass a term; what has weight 0, or is scaled by 1, is free."""
    kept = [(w, x) for w, x in terms if isinstance(w, Tensor) or w != 0.0] or [terms[0]]
    whole = [i for i, (w, _) in enumerate(kept) if isinstance(w, float) and w == 1.0]
    first = kept.pop(whole[0] if whole else 0)
    total = _added(first[1], *kept.pop(0)) if whole and kept else scaled(*first)
    for weight, x in kept:  # `total` is a tensor of our own by now
        if isinstance(weight, Tensor):
            total.addcmul_(x, weight)
        else:
            total.add_(x, alpha=weight)
    return total


def _added(total: Tensor, weight: Weight, x: Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return torch.addcmul(total, x, weight)
    return torch.add(total, x, alpha=weight)


def initial_state(x_T: Samples, theory: Theory, t: float | Sequence[float] | Tensor) -> Tensor:
    """z at the start of a grid.

    At t_noise, x_T is unit noise: the state is x_T itself where the path keeps the variance (a² + s² = 1)
    and s·x_T where it does not (EDM); a state that already has this size is recognised. At any other time
    x_T is the state x_t.
    """
    moment = torch.as_tensor(t, dtype=torch.float64)
    if bool((moment == theory.t_noise).all()):
        a, s = (float(level) for level in theory.data(as_float64(theory.t_noise)))
        r = math.hypot(a, s)
        is_state = r > 4 and float(x_T.double().square().mean()) > r
        return x_T if abs(r - 1) < 1e-9 else x_T / r if is_state else x_T * (s / r)
    r = torch.hypot(*theory.data(moment)).to(x_T.device, x_T.dtype)
    return x_T / (r if r.ndim == 0 else r.reshape(-1, *[1] * (x_T.ndim - 1)))
