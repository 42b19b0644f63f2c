"""Multistep walks: earlier answers, carried on as a polynomial, say where the next step goes.

What is carried differs: the velocity v (Adams), the data x_0 (DPM-Solver++, UniPC) or the noise x_T (DEIS).
Held constant, x_0 and x_T both give the rotation of the derived step; polynomials are integrated exactly:

    v:    z(s) = z(p) + ∫ v dθ
    x_0:  z(s) = sin s/sin p · z(p) + sin s ∫ x_0 d(cot θ)
    x_T:  z(s) = cos s/cos p · z(p) + cos s ∫ x_T d(tan θ)         integrals from p to s
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from sfumato.theory.definition import eigh
from sfumato.theory.solvers.one_step import renoised, renoising
from sfumato.theory.trajectory import Trajectory, Weight, combine
from sfumato.theory.types import NoiseSource

SOFT = 0.1
"""How far from the ends log((s + δ·a)/(a + δ·s)) follows log(s/a): the log-SNR, with both ends finite."""


@dataclass(slots=True)
class StepCoefficients:
    """One step: z ← keep·z + Σ w_j·y_j over past answers, newest first.

    Before it the last one is redone with the newest answer, or all of them from the very start.
    """

    keep: Weight = 1.0
    past: list[Weight] = field(default_factory=list[Weight])
    redo_keep: Weight = 1.0
    redo: list[Weight] = field(default_factory=list[Weight])
    from_start: bool = False


@lru_cache
def gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [−1, 1], exact for polynomials up to degree 2·count − 1 (Golub & Welsch 1969)."""
    k = torch.arange(1, count, dtype=torch.float64)
    off = k / (4 * k * k - 1).sqrt()
    nodes, vectors = eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, 2 * vectors[0].square()


def coordinate(kind: str, angle: Tensor) -> Tensor:
    """Where polynomials live: φ itself, and the softened log-SNR for x_0, as DPM-Solver++ has it."""
    if kind != "data":
        return angle
    sin, cos = angle.sin(), angle.cos()
    return ((sin + SOFT * cos) / (cos + SOFT * sin)).log()


def carried(
    kind: str, start: Tensor, end: Tensor, nodes: Tensor, pace: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(keep [...], weights [..., k]) of a step from start to end [...] with answers at nodes [..., k].

    Where new noise brings the state back up afterwards, what is seen falls, in log(s/a), by a share `pace` of
    the step: answers are carried on only to where the network will be asked next.
    """
    x, share = gauss_legendre(12 if kind == "velocity" else 32)
    low, high = _measure(kind, start), _measure(kind, end)
    half = (high - low)[..., None] / 2
    theta = _measure(kind, low[..., None] + half * (1 + x), back=True)
    seen = theta
    if pace is not None:
        here = start[..., None].tan()
        seen = (here * (theta.tan() / here) ** pace[..., None]).atan()
    basis = lagrange(coordinate(kind, seen), coordinate(kind, nodes))  # [..., k, points]
    inner = (basis * (half * share)[..., None, :]).sum(-1)
    if kind == "velocity":
        return torch.ones_like(end), inner
    at_end = lagrange(end[..., None], nodes)[..., 0]
    if kind == "noise":  # at pure noise z is x_T
        noise = torch.where(end[..., None].cos() < 1e-6, at_end, end.cos()[..., None] * inner)
        return end.cos() / start.cos(), noise
    # at the data z is x_0; in φ, for the log-SNR of the data end is too far to reach
    data = torch.where(end[..., None] < 1e-6, at_end, end.sin()[..., None] * inner)
    return end.sin() / start.sin(), data


def _measure(kind: str, at: Tensor, back: bool = False) -> Tensor:
    """Where a carried answer is summed evenly: φ for v, a/s for x_0, s/a for x_T; and back to φ.

    In φ a step that ends close to either end would weigh its last hair by 1/sin²θ or 1/cos²θ.
    """
    if kind == "velocity":
        return at
    if kind == "data":
        return torch.atan2(torch.ones_like(at), at) if back else 1 / at.clamp(min=1e-6).tan()
    return at.atan() if back else at.clamp(max=math.pi / 2 - 1e-9).tan()


def lagrange(at: Tensor, nodes: Tensor) -> Tensor:
    """Polynomials, 1 at one node and 0 at the others: at [..., m], nodes [..., k] → [..., k, m]."""
    count = nodes.shape[-1]
    rows: list[Tensor] = []
    for j in range(count):
        row = torch.ones_like(at)
        for m in range(count):
            if m != j:
                row = row * (at - nodes[..., m : m + 1]) / (nodes[..., j : j + 1] - nodes[..., m : m + 1])
        rows.append(row)
    return torch.stack(rows, -2)


def plan(
    trajectory: Trajectory,
    kind: str,
    order: int,
    corrected: int,
    ends: Tensor | None = None,
    plain: bool = True,
    whole: bool = False,
) -> list[StepCoefficients]:
    """Every step's coefficients, before the first.

    Args:
        kind: what is carried on.
        order: answers a step uses.
        corrected: answers that redo the step before with the newest among them; 0 redoes only the first
            step, without which the start would cap the order at 2.
        ends: angles [steps, 1 or B] to step to, where they are not the grid's.
        plain: whether the states are x_t, not z = x_t/r.
        whole: whether an order above 3 redoes its first steps from the very start, each time with all answers
            there are; what the first steps, of low order, have lost would else cap the order at 3.
    """
    r = trajectory.lengths if plain else torch.ones_like(trajectory.lengths)
    angles, count = trajectory.angles, trajectory.steps
    goal = angles[1:] if ends is None else ends
    legs = [StepCoefficients() for _ in range(count)]

    def history(rows: list[int], terms: int) -> Tensor:
        return torch.stack([angles[[i - j for i in rows]] for j in range(terms)], -1)

    for terms in range(1, order + 1):
        used = [min(i + 1, order) for i in range(count)]
        if ends is not None:  # new noise reaches x_0 last; the end is not extrapolated
            used[-1] = 1
        rows = [i for i in range(count) if used[i] == terms]
        if not rows:
            continue
        turn = goal[rows] - angles[rows]
        if terms == 1 and kind != "velocity":  # x_0 and x_T held: cos Δ·z + sin Δ·v, see `states`
            keep, past = turn.cos(), turn.sin()[..., None]
        else:
            pace = None
            if ends is not None:
                here, there, below = (at[rows].tan().log() for at in (angles[:-1], angles[1:], goal))
                pace = (here - there) / (here - below)
            keep, past = carried(kind, angles[rows], goal[rows], history(rows, terms), pace)
        after = r[[i + 1 for i in rows]]
        keep, past = keep * after / r[rows], past * after[..., None]
        for i, k, w in zip(rows, trajectory.column(keep), trajectory.weights(past), strict=True):
            legs[i].keep, legs[i].past = k, w
    _redo(trajectory, kind, legs, r, [_redone(i, order, corrected, whole) for i in range(count)])
    return legs


def _redone(step: int, order: int, corrected: int, whole: bool) -> tuple[int, bool]:
    """(answers that redo what came before a step, whether from the very start)."""
    start = whole and order > 3 and 1 < step < order
    if start:
        return step + 1, True
    if corrected:
        return min(step + 1, corrected), False
    return (2 if step == 1 and order > 2 else 0), False


def _redo(
    trajectory: Trajectory, kind: str, legs: list[StepCoefficients], r: Tensor, how: list[tuple[int, bool]]
) -> None:
    angles = trajectory.angles
    for terms, start in sorted({(terms, start) for terms, start in how[1:] if terms > 1}):
        rows = [i for i in range(1, len(legs)) if how[i] == (terms, start)]
        before = [0 if start else i - 1 for i in rows]
        nodes = torch.stack([angles[[i - j for i in rows]] for j in range(terms)], -1)
        of = "velocity" if terms == 2 else kind  # from pure noise x_T alone says nothing of the data, v does
        keep, past = carried(of, angles[before], angles[rows], nodes)
        keep, past = keep * r[rows] / r[before], past * r[rows][..., None]
        for i, k, w in zip(rows, trajectory.column(keep), trajectory.weights(past), strict=True):
            legs[i].redo_keep, legs[i].redo, legs[i].from_start = k, w, start


def reading(trajectory: Trajectory, kind: str) -> Tensor:
    """(of out, of x_t) [steps, 1 or B, 2]: what is carried on, from the answer and the state."""
    sin, cos = trajectory.angles[:-1].sin(), trajectory.angles[:-1].cos()
    of_z, of_v = {"velocity": (0 * sin, 1 + 0 * cos), "data": (cos, -sin), "noise": (sin, cos)}[kind]
    of_out, of_x = trajectory.velocity_coefficients()
    return torch.stack([of_v * of_out, of_z / trajectory.lengths[:-1] + of_v * of_x], -1)


def walk_on(
    trajectory: Trajectory,
    x: Tensor,
    kind: str,
    order: int,
    corrected: int = 0,
    eta: float = 0.0,
    noise: NoiseSource | None = None,
) -> Iterator[Tensor]:
    """The walk behind every name below, in x_t itself.

    One evaluation a step; a fourth order asks once more at the start.
    """
    down, back = renoising(trajectory, eta)
    legs = plan(trajectory, kind, order, corrected, down if eta else None, whole=not eta)
    reads, speeds = (trajectory.weights(reading(trajectory, of)) for of in (kind, "velocity"))
    fresh = [trajectory.radii[i + 1] * ours for i, (_, ours) in enumerate(back)]
    told = trajectory.network_times(trajectory.times[:-1])
    again = order > 3 and not eta

    moved = [  # where v itself is needed: the step turns by it, or the next one redoes this one with it
        len(leg.past) == 1 or len(after.redo) == 2
        for leg, after in zip(legs, [*legs[1:], StepCoefficients()], strict=True)
    ]

    def states(x: Tensor) -> Iterator[Tensor]:
        past: list[Tensor] = []
        v = before = begun = x
        for i, (t, leg) in enumerate(zip(told, legs, strict=True)):
            asked = (trajectory.answer(t, x), x)
            y = combine(*zip(reads[i], asked, strict=True))
            if i and leg.redo and not eta:
                first = len(leg.redo) == 2
                newest = combine(*zip(speeds[i], asked, strict=True)) if first else y
                earlier = [v] if first else past
                base = begun if leg.from_start else before
                x = combine((leg.redo_keep, base), *zip(leg.redo, [newest, *earlier], strict=False))
                if i == 1 and again:
                    asked = (trajectory.answer(t, x), x)
                    y = combine(*zip(reads[i], asked, strict=True))
            past = [y, *past][: max(order, corrected)]
            if moved[i]:
                v = y if kind == "velocity" else combine(*zip(speeds[i], asked, strict=True))
            before = x
            x = combine((leg.keep, x), *zip(leg.past, [v] if len(leg.past) == 1 else past, strict=False))
            x = renoised(x, [back[i][0], fresh[i]], noise, i)
            yield x

    return states(x)


def adams(trajectory: Trajectory, z: Tensor, order: int = 2) -> Iterator[Tensor]:
    """Adams–Bashforth: v as a polynomial in φ. Order 1 is the rotation (Euler, DDIM)."""
    return walk_on(trajectory, z, "velocity" if order > 1 else "data", order)


def dpm(
    trajectory: Trajectory, z: Tensor, order: int = 2, eta: float = 0.0, noise: NoiseSource | None = None
) -> Iterator[Tensor]:
    """x_0 as a polynomial in log-SNR; with eta > 0 its stochastic sibling.

    Source: Lu et al. 2022, arXiv:2211.01095 (DPM-Solver++), with exact integrals.
    """
    return walk_on(trajectory, z, "data", order, 0, eta, noise)


def deis(
    trajectory: Trajectory, z: Tensor, order: int = 2, eta: float = 0.0, noise: NoiseSource | None = None
) -> Iterator[Tensor]:
    """x_T as a polynomial in φ; at pure noise, where x_T says nothing of the data, order 3 errs like order 2.

    Source: Zhang & Chen 2022, arXiv:2204.13902, tAB with φ as time.
    """
    return walk_on(trajectory, z, "noise", order, 0, eta, noise)


def unipc(trajectory: Trajectory, z: Tensor, order: int = 2) -> Iterator[Tensor]:
    """DPM-Solver++ whose every step is redone with the next answer, one order higher.

    Source: Zhao et al. 2023, arXiv:2302.04867, with exact integrals.
    """
    return walk_on(trajectory, z, "data", order, order + 1)
