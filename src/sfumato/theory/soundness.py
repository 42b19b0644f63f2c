"""What can be wrong with a theory, in sentences: the check behind `Theory.check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import Refused
from .shapes import Moment

if TYPE_CHECKING:
    from .definition import Theory


def problems_of(theory: Theory, times: Moment | None) -> list[str]:
    """One sentence per problem, the gravest first; an empty list when the theory is sound."""
    from .definition import exact

    try:
        t = _everywhere(theory) if times is None else exact(times).flatten()
        if not len(t):
            return ["There is no time to check at; give some, or leave them out."]
        theory.within(t)
        asked = t[t != theory.t_data]
        problems = _shapes(theory, t) or _levels(theory, t)
        if not problems:
            problems = _order(theory, t) + _split(theory, asked) + _told(theory, asked)
        if not problems and times is None:
            problems = _between(theory, t) + _jump(theory, t)
    except Refused as refusal:
        return [str(refusal)]
    return problems


def _everywhere(theory: Theory) -> Tensor:
    """257 even times and two in every gap, at uneven places that no ripple is likely to share."""
    even = torch.linspace(theory.t_noise, theory.t_data, 257, dtype=torch.float64)
    inside = [even[:-1] + even.diff() * share for share in (0.3819660, 0.7236068)]
    return torch.cat([torch.stack([even[:-1], *inside], 1).flatten(), even[-1:]])


def _shapes(theory: Theory, t: Tensor) -> list[str]:
    """A definition answers each time by itself, whatever the shape it is asked in."""
    problems: list[str] = []
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
    towards_noise = t.sort(descending=theory.t_noise < theory.t_data)[0]
    towards_noise = torch.cat([towards_noise[:1], towards_noise[1:][towards_noise.diff() != 0]])
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
    problems: list[str] = []
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


def _sine(theory: Theory, t: Tensor) -> Tensor:
    """The sine of the angle between C_t and C^ε_t: 0 where the split is singular."""
    (a, s), (p, q) = theory.data(t), theory.model(t)
    return (a * q - s * p) / (torch.hypot(a, s) * torch.hypot(p, q))


def _between(theory: Theory, t: Tensor) -> list[str]:
    """Times between those looked at where the rows become one mixture: the sine dips to 0 or crosses it."""
    sine = _sine(theory, t[:-1])
    size = sine.abs()
    dips = (size[1:-1] <= size[:-2]) & (size[1:-1] <= size[2:]) & (size[1:-1] < 0.1)
    crossed = sine[1:-1].sign() != sine[2:].sign()
    at = (dips | crossed).nonzero()[:, 0]
    if not len(at):
        return []
    low, high = t[at], t[(at + 3).clamp(max=len(t) - 2)]
    for _ in range(90):  # golden section, in every dip at once
        left, right = low + 0.381966 * (high - low), low + 0.618034 * (high - low)
        better = _sine(theory, left).abs() < _sine(theory, right).abs()
        low, high = torch.where(better, low, left), torch.where(better, right, high)
    bottom = (low + high) / 2
    deep = _sine(theory, bottom).abs() < 1e-5
    return [
        f'Theory "{theory.name}" is singular near t = {where:g}: there x_t and out are the same mixture of '
        f"x_0 and x_T (det = a·q − s·p is 0). Change the model definition there."
        for where in map(float, bottom[deep][:1])
    ]


def _jump(theory: Theory, t: Tensor) -> list[str]:
    """A gap in φ: no time has the noise inside it, and neither grids nor other theories find one."""
    widest = int(theory.angle(t).diff().abs().argmax())
    low, high = t[widest], t[widest + 1]
    for _ in range(13):  # 2⁴ finer each time, down to neighbouring floats
        ladder = low + (high - low) * torch.linspace(0, 1, 17, dtype=torch.float64)
        widest = int(theory.angle(ladder).diff().abs().argmax())
        low, high = ladder[widest], ladder[widest + 1]
    ends = [float(angle) for angle in theory.angle(torch.stack([low, high])).sort()[0]]
    if ends[1] - ends[0] < 1e-4:
        return []
    return [
        f"At t = {high.item():g} φ jumps from {ends[0]:.6g} to {ends[1]:.6g}; no time has the noise between. "
        f"Make data(t) continuous."
    ]


def _told(theory: Theory, asked: Tensor) -> list[str]:
    problems: list[str] = []
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
        elif name == "input_scale" and bool((told == 0).any()):
            where = asked[told == 0][0].item()
            problems.append(
                f'Theory "{theory.name}": input_scale(t) is 0 at t = {where:g}, where the network would see '
                f"nothing. Keep it away from 0."
            )
    return problems
