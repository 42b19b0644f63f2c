"""What can be wrong with a theory, in sentences: the check behind `Theory.check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import Refused

if TYPE_CHECKING:
    from .definition import Theory


def problems_of(theory: Theory, times: Tensor | list[float] | None) -> list[str]:
    """One sentence per problem, the gravest first; an empty list when the theory is sound."""
    from .definition import exact

    if times is None:
        times = torch.linspace(theory.t_noise, theory.t_data, 257, dtype=torch.float64)
    t = exact(torch.as_tensor(times)).flatten()
    low, high = sorted((theory.t_data, theory.t_noise))
    outside = (t < low - 1e-12) | (t > high + 1e-12)
    if bool(outside.any()):
        return [f"t = {t[outside][0].item():g} is outside the theory's times {low:g} to {high:g}."]
    asked = t[t != theory.t_data]
    try:
        problems = _shapes(theory, t) or _levels(theory, t)
        if not problems:
            problems = _order(theory, t) + _split(theory, asked) + _told(theory, asked)
    except Refused as refusal:
        return [str(refusal)]
    return problems


def _shapes(theory: Theory, t: Tensor) -> list[str]:
    """A definition answers each time by itself, whatever the shape it is asked in."""
    problems = []
    some = t[:: max(1, len(t) // 6)]
    for role, definition in (("data", theory.data), ("model", theory.model)):
        flat = torch.stack(definition(some))
        column = torch.stack(definition(some[:, None]))[..., 0]
        single = torch.stack([torch.stack(definition(one)) for one in some], -1)
        for other in (column, single):
            if not torch.allclose(flat, other, rtol=1e-9, atol=1e-12, equal_nan=True):
                problems.append(
                    f'Theory "{theory.name}": {role}(t) depends on the shape of t, or is not the same twice; '
                    f"write it as a plain function of each time."
                )
                break
    return problems


def _levels(theory: Theory, t: Tensor) -> list[str]:
    a, s = theory.data(t)
    r = torch.hypot(a, s)
    faults = (
        (~torch.isfinite(a + s), "is not finite; give every time finite a and s"),
        ((a < -1e-12) | (s < -1e-12), "is negative; a and s are levels, keep them ≥ 0"),
        (r <= 0, "is zero in both parts: x_t would hold nothing; keep a or s above 0"),
    )
    for fault, rule in faults:
        if bool(fault.any()):
            i = int(fault.nonzero()[0])
            return [f"At t = {t[i].item():g} data(t) = ({a[i].item():.3g}, {s[i].item():.3g}) {rule}."]
    return []


def _order(theory: Theory, t: Tensor) -> list[str]:
    towards_noise = t.unique()
    if theory.t_noise < theory.t_data:
        towards_noise = towards_noise.flip(0)
    angle = theory.angle(towards_noise)
    flat = angle.diff() <= 0
    if not bool(flat.any()):
        return []
    i = int(flat.nonzero()[0])
    here, there = towards_noise[i].item(), towards_noise[i + 1].item()
    return [
        f"Between t = {here:g} and {there:g} the noise does not rise against the signal (φ goes from "
        f"{angle[i].item():.6g} to {angle[i + 1].item():.6g}); s/a must grow strictly from t_data to t_noise."
    ]


def _split(theory: Theory, asked: Tensor) -> list[str]:
    """Singular times one by one, then the step against C_s on the times that are left."""
    singular = theory.singular(asked)
    problems = []
    for t in asked[singular][:3]:
        try:
            theory.rows(t)
        except Refused as refusal:
            problems.append(str(refusal))
    if int(singular.sum()) > 3:
        problems.append(f"{int(singular.sum()) - 3} more times are singular.")
    here = asked[~singular]
    if len(here):
        there = torch.cat([here[1:], here[-1:].new_tensor([theory.t_data])])
        x_0, x_T = (
            torch.linspace(-1, 1, len(here), dtype=torch.float64),
            torch.ones(len(here), dtype=torch.float64),
        )
        x_0, x_T = x_0[:, None].to(here.device), x_T[:, None].to(here.device)
        x_t, out = theory.mix(x_0, x_T, here), theory.target(x_0, x_T, here)
        reached, wanted = theory.step(x_t, out, here, there), theory.mix(x_0, x_T, there)
        miss = (reached - wanted).abs() / (1 + wanted.abs())
        if bool((miss > 1e-6).any()):
            i = int(miss.flatten().argmax())
            problems.append(
                f"The step from t = {here[i].item():g} to {there[i].item():g} misses C_s·(x_0, x_T) by "
                f"{miss.max().item():.1e}; the definitions change between calls or lose precision there."
            )
    return problems


def _told(theory: Theory, asked: Tensor) -> list[str]:
    problems = []
    for name in ("clock", "input_scale"):
        try:
            told = getattr(theory, name)(asked)
        except Exception as error:
            problems.append(f'Theory "{theory.name}": {name}(t) failed: {error}.')
            continue
        if not isinstance(told, Tensor) or told.shape != asked.shape:
            problems.append(f'Theory "{theory.name}": {name}(t) must return a tensor of the shape of t.')
        elif not bool(torch.isfinite(told).all()):
            where = asked[~torch.isfinite(told)][0].item()
            problems.append(
                f'Theory "{theory.name}": {name}(t) is not finite at the asked time t = {where:g}.'
            )
    return problems
