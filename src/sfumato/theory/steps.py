"""The walks: each plans its coefficients in float64, then asks the network and moves z.

Euler is the derived step itself, a rotation of (z, v); the multistep walks integrate v as a polynomial
in φ (Adams), optionally redoing each step with the answer that the next one needs anyway.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .course import Course, Weight, combine, scaled
from .shapes import Renoise


def rotation(course: Course, start: Tensor, end: Tensor) -> list[list[Weight]]:
    """(cos Δφ, sin Δφ): z and v turned from `start` to `end` while (x_0, x_T) stay."""
    turn = end - start
    return course.weights(torch.stack([turn.cos(), turn.sin()], -1))


def renoising(course: Course, eta: float) -> tuple[Tensor, list[list[Weight]]]:
    """Angles to solve down to, and how to come back up with new noise: (ρ, √(1 − ρ²)).

    With z at φ_down, ρ·z + √(1 − ρ²)·n lies at φ_next when cos φ_next = ρ·cos φ_down. η = 1 is ancestral
    sampling, and for the rotation this is DDIM-η (arXiv:2010.02502, eq. 16).
    """
    here, there = course.angles[:-1], course.angles[1:]
    fresh = (1 - (there.tan() / here.tan()).square()).clamp(min=0).sqrt() * there.sin() * eta
    kept = (1 - fresh.square()).sqrt()
    down = torch.acos((there.cos() / kept).clamp(max=1))
    return torch.where(fresh > 0, down, there), course.weights(torch.stack([kept, fresh], -1))


def renoised(z: Tensor, back: list[Weight], noise: Renoise | None, step: int) -> Tensor:
    """ρ·z + √(1 − ρ²)·n, or z where nothing is drawn."""
    if noise is None or (isinstance(back[1], float) and back[1] == 0.0):
        return z
    return combine((back[0], z), (back[1], noise(z, step)))


def euler(course: Course, z: Tensor, eta: float = 0.0, noise: Renoise | None = None) -> Iterator[Tensor]:
    """First order: the theory's own step, exact for a single data point. One evaluation a step."""
    nodes = course.asked()
    down, back = renoising(course, eta)
    turns = rotation(course, course.angles[:-1], down)
    # x and out straight to z at the next node: cos·z + sin·v with v read from (out, z)
    merged = [
        (cos + sin * node.from_z, sin * node.from_out, r)
        for (cos, sin), node, r in zip(turns, nodes, course.radii[1:], strict=True)
    ]

    def walk(z: Tensor) -> Iterator[Tensor]:
        for i, (node, (keep, add, _)) in enumerate(zip(nodes, merged, strict=True)):
            out = course.answer(node.t, scaled(node.r, z))
            z = renoised(combine((keep, z), (add, out)), back[i], noise, i)
            yield z

    return walk(z)


def heun(course: Course, z: Tensor, eta: float = 0.0, noise: Renoise | None = None) -> Iterator[Tensor]:
    """Second order: each step redone with the velocity at its end; the last is a single rotation.

    Two evaluations a step, one for the last, so that the end is not asked.
    """
    nodes = course.asked()
    down, back = renoising(course, eta)
    turns = rotation(course, course.angles[:-1], down)
    trials = nodes[1:] if not eta else course.between(down[:-1])
    steps = course.weights((down - course.angles[:-1])[..., None])

    def walk(z: Tensor) -> Iterator[Tensor]:
        for i, node in enumerate(nodes):
            v = course.velocity(node, z)
            trial = combine((turns[i][0], z), (turns[i][1], v))
            if i < len(trials):
                half = steps[i][0] / 2
                trial = combine((1.0, z), (half, v), (half, course.velocity(trials[i], trial)))
            z = renoised(trial, back[i], noise, i)
            yield z

    return walk(z)


def adams(start: Tensor, end: Tensor, nodes: Tensor) -> Tensor:
    """∫ of the Lagrange basis on `nodes` [..., k] from start [...] to end [...]: weights [..., k]."""
    size = (end - start)[..., None]
    place = (nodes - start[..., None]) / size
    power = torch.arange(nodes.shape[-1], dtype=nodes.dtype)
    moments = 1 / (power + 1)
    table = place[..., None, :] ** power[:, None]
    return torch.linalg.solve(table, moments.expand(*place.shape)) * size


def adams_tables(angles: Tensor, order: int) -> tuple[list[Tensor], list[Tensor]]:
    """Predictor and corrector weights of every step, [1 or B, terms], newest velocity first.

    The predictor of step i uses the velocities at i, i − 1, …; the corrector redoes step i − 1 with those
    and the one at i. Both start with what there is.
    """
    count = len(angles) - 1
    predict: list[Tensor] = [torch.empty(0)] * count
    correct: list[Tensor] = [torch.empty(0)] * count
    for terms in range(1, order + 2):
        late = range(order - 1, count) if terms == order else [terms - 1] if terms < order else []
        rows = [i for i in late if i < count]
        if rows:
            nodes = torch.stack([torch.stack([angles[i - j] for j in range(terms)], -1) for i in rows])
            made = adams(angles[rows], angles[[i + 1 for i in rows]], nodes)
            for i, weights in zip(rows, made, strict=True):
                predict[i] = weights
        late = range(order, count) if terms == order + 1 else [terms - 1] if 1 < terms <= order else []
        rows = [i for i in late if 0 < i < count]
        if rows:
            nodes = torch.stack([torch.stack([angles[i - j] for j in range(terms)], -1) for i in rows])
            made = adams(angles[[i - 1 for i in rows]], angles[rows], nodes)
            for i, weights in zip(rows, made, strict=True):
                correct[i] = weights
    return predict, correct


def multistep(course: Course, z: Tensor, order: int = 2) -> Iterator[Tensor]:
    """Adams–Bashforth in φ with variable steps, started by its own free corrector.

    One evaluation a step. Order 1 is the rotation (Euler, DDIM).
    """
    if order == 1:
        return euler(course, z)
    nodes = course.asked()
    predict, correct = adams_tables(course.angles, order)
    forward = [[course.weight(w) for w in table.T] for table in predict]
    redo = [course.weight(w) for w in correct[1].T] if course.steps > 1 and order > 2 else []

    def walk(z: Tensor) -> Iterator[Tensor]:
        past: list[Tensor] = []
        first = z
        for i, node in enumerate(nodes):
            v = course.velocity(node, z)
            past = [v, *past][:order]
            if i == 1 and redo:  # the Euler step that started the walk would cap the order at 2
                z = combine((1.0, first), *zip(redo, past, strict=True))
            z = combine((1.0, z), *zip(forward[i], past, strict=True))
            yield z

    return walk(z)


def trusted(course: Course, z: Tensor, order: int = 2) -> Iterator[Tensor]:
    """The default: Adams in φ, every step redone with the next answer, both within a trust region.

    One evaluation a step. Per sample the corrector may move a state by at most 0.3, and the higher-order
    part of a predictor by at most 0.7, of the first-order step, which holds where strong guidance bends
    the velocity faster than the grid can follow.
    """
    nodes = course.asked()
    predict, correct = adams_tables(course.angles, order)
    forward = [[course.weight(w) for w in table.T] for table in predict]
    redo = [[course.weight(w) for w in table.T] if table.numel() else [] for table in correct]
    sizes = [course.weight(h) for h in course.angles.diff(dim=0)]

    def walk(z: Tensor) -> Iterator[Tensor]:
        past: list[Tensor] = []
        before = z
        for i, node in enumerate(nodes):
            v = course.velocity(node, z)
            if i:
                better = combine((1.0, before), *zip(redo[i], [v, *past], strict=True))
                z = within(z, better, z - before, 0.3, sizes[i - 1])
            past, before = [v, *past][:order], z
            plain = combine((1.0, z), (sizes[i], v))
            if i:
                bent = combine((1.0, z), *zip(forward[i], past, strict=True))
                plain = within(plain, bent, plain - z, 0.7, sizes[i])
            z = plain
            yield z

    return walk(z)


def within(base: Tensor, new: Tensor, unit: Tensor, share: float, turn: Weight) -> Tensor:
    """`new`, but per sample no further from `base` than share·max(|unit|, |turn|), in root mean square."""
    axes = tuple(range(1, base.ndim))
    move = new - base
    least = abs(turn)
    unit_size = torch.linalg.vector_norm(unit, dim=axes, keepdim=True)
    count = base[0].numel() ** 0.5
    room = share * torch.maximum(
        unit_size, torch.as_tensor(least * count, dtype=base.dtype, device=base.device)
    )
    size = torch.linalg.vector_norm(move, dim=axes, keepdim=True)
    return base + move * (room / size.clamp(min=1e-12)).clamp(max=1)
