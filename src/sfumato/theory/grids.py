"""Grids: where on the way from noise to data the network is asked.

A grid is [steps + 1] float64 times of a theory, from t_noise to t_data; the last is reached and not asked.
All but `linear` are written in the noise-to-signal ratio, so that every theory takes every grid.
"""

import inspect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sfumato.errors import Refused, nearest, one_of
from sfumato.theory.definition import Theory, as_float64
from sfumato.theory.types import AnyFloats


def linear(theory: Theory, steps: int) -> Tensor:
    """[steps + 1] even in the theory's own time.

    Raises (as every grid here):
        Refused: unless `steps` is a whole number, at least 1.
    """
    return torch.linspace(theory.t_noise, theory.t_data, _count(steps) + 1, dtype=torch.float64)


def shifted(theory: Theory, steps: int, shift: float = 3.0) -> Tensor:
    """Even in flow time s/(a + s), then s/a multiplied by `shift`; above 1 more steps go to the noise.

    Raises:
        Refused: unless shift is above 0.
    Source: Esser et al. 2024, arXiv:2403.03206, section 5.3.2.
    """
    if not shift > 0:
        raise Refused(f"shift is {shift:g}; it multiplies the noise-to-signal ratio and must be above 0.")
    u = torch.linspace(1, 0, _count(steps) + 1, dtype=torch.float64)
    u = shift * u / (1 + (shift - 1) * u)
    low, high = (_flow_time(theory.angle(end)) for end in (theory.t_data, theory.t_noise))
    flow = low + (high - low) * u
    return _at_angles(theory, torch.atan2(flow, 1 - flow))


def resolution_shift(
    tokens: int, low: tuple[int, float] = (256, 0.5), high: tuple[int, float] = (4096, 1.15)
) -> float:
    """The shift for a picture of `tokens` tokens: log shift is a line through two (tokens, log shift) points.

    Source: the reference code of FLUX.1.
    """
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return math.exp(low[1] + slope * (tokens - low[0]))


def karras(
    theory: Theory, steps: int, rho: float = 7.0, lowest: float = 0.002, highest: float | None = None
) -> Tensor:
    """Noise-to-signal ratios s/a even in their ρ-th root, from `highest` to `lowest`, then the data.

    Args:
        rho: crowding near the data; 1 spaces the ratios evenly.
        lowest, highest: s/a in the data's own units; the first time is t_noise whatever `highest`.
    Raises:
        Refused: unless 0 < lowest < highest.
    Source: Karras et al. 2022, arXiv:2206.00364, eq. 5.
    """
    low, high, nodes = _range(theory, lowest, highest, _count(steps))
    ratio = torch.linspace(high ** (1 / rho), low ** (1 / rho), nodes, dtype=torch.float64) ** rho
    return _at_ratios(theory, ratio[:steps])


def log_snr(theory: Theory, steps: int, lowest: float = 0.002, highest: float | None = None) -> Tensor:
    """Even in log(a²/s²) between the ratios s/a `highest` and `lowest`, then the data.

    Raises:
        Refused: unless 0 < lowest < highest.
    Source: Lu et al. 2022, arXiv:2206.00927.
    """
    low, high, nodes = _range(theory, lowest, highest, _count(steps))
    ratio = torch.linspace(math.log(high), math.log(low), nodes, dtype=torch.float64).exp()
    return _at_ratios(theory, ratio[:steps])


def beta(theory: Theory, steps: int, alpha: float = 0.6, beta: float = 0.6) -> Tensor:
    """Quantiles of the Beta(alpha, beta) distribution over the theory's time, crowded at both ends.

    Raises:
        Refused: unless alpha and beta are above 0.
    Source: Lee et al. 2024, arXiv:2407.12173.
    """
    if not (alpha > 0 and beta > 0):
        raise Refused(f"alpha {alpha:g} and beta {beta:g} must be above 0.")
    # with t = sin²θ the density is sin^(2α−1)·cos^(2β−1), which is summed on a fine midpoint lattice
    edges = torch.linspace(0, math.pi / 2, 20001, dtype=torch.float64)
    theta = (edges[1:] + edges[:-1]) / 2
    mass = (theta.sin() ** (2 * alpha - 1) * theta.cos() ** (2 * beta - 1)).cumsum(0)
    mass = torch.cat([mass.new_zeros(1), mass / mass[-1]])
    wanted = torch.linspace(1, 0, _count(steps) + 1, dtype=torch.float64)
    u = interpolate(wanted, mass, edges).sin().square()
    u[0], u[-1] = 1, 0
    return theory.t_data + (theory.t_noise - theory.t_data) * u


def cosine(theory: Theory, steps: int) -> Tensor:
    """Even in the angle φ = atan2(s, a)."""
    high, low = (float(theory.angle(end)) for end in (theory.t_noise, theory.t_data))
    return _at_angles(theory, torch.linspace(high, low, _count(steps) + 1, dtype=torch.float64))


NEAR_DATA, NEAR_NOISE = 0.3, 0.4
"""δ and ε of `two_sided`: levels s/a below δ, and a/s below ε, are no longer spread by their logarithm."""
EARLY, LATE = 0.2, 0.45
"""What the first and the last step of `two_sided` give up: the one knows no past, the other is not redone."""


def two_sided(theory: Theory, steps: int, data: float = NEAR_DATA, noise: float = NEAR_NOISE) -> Tensor:
    """Even in log((s + δ·a)/(a + ε·s)), reaching both ends, the first and the last step shortened; ours.

    Args:
        data, noise: δ and ε in (0, 1), how early the crowding ends on either side.
    Raises:
        Refused: for δ or ε outside (0, 1).
    """
    if not (0 < data < 1 and 0 < noise < 1):
        raise Refused(f"data {data:g} and noise {noise:g} must lie between 0 and 1.")
    ends = torch.stack([theory.angle(end) for end in (theory.t_noise, theory.t_data)])
    high, low = (float(end) for end in progress(ends, data, noise))
    return _at_angles(theory, angle_at(high + (low - high) * node_positions(_count(steps)), data, noise))


def node_positions(steps: int) -> Tensor:
    """Where the nodes of a grid stand between 0 and 1: evenly, but for a shorter first and last step."""
    i = torch.arange(steps + 1, dtype=torch.float64)
    where = (i - EARLY) / max(steps - EARLY - LATE, 1e-9)
    where[0], where[-1] = 0, 1
    return where


def progress(angle: Tensor, delta: float = NEAR_DATA, epsilon: float = NEAR_NOISE) -> Tensor:
    """The share of the way at angles φ, 0 at noise and 1 at data: what `two_sided` spaces evenly."""
    a, s = angle.cos(), angle.sin()
    top, bottom = -math.log(epsilon), math.log(delta)
    return (top - ((s + delta * a) / (a + epsilon * s)).log()) / (top - bottom)


def angle_at(share: Tensor, delta: float = NEAR_DATA, epsilon: float = NEAR_NOISE) -> Tensor:
    """The angle at a share of the way: the inverse of `progress`."""
    top, bottom = -math.log(epsilon), math.log(delta)
    g = (top + (bottom - top) * share).exp()
    return torch.atan2((g - delta).clamp(min=0), (1 - epsilon * g).clamp(min=0))


def time_of_step(step: int | Sequence[int] | Tensor, steps: int = 1000) -> Tensor:
    """The time (n + 1)/N of a discrete model's trained step n, 0 … N − 1; float64, like `step` in shape.

    Raises:
        Refused: for what is no whole number from 0 to N − 1.
    """
    n = torch.as_tensor(step)
    if n.is_floating_point() or n.is_complex() or bool(((n < 0) | (n >= steps)).any()):
        raise Refused(
            f"A trained step is a whole number from 0 to {steps - 1}; between them, t itself is meant."
        )
    return (n.double() + 1) / steps


def custom(theory: Theory, times: Sequence[float] | AnyFloats) -> Tensor:
    """One's own times [N + 1] or [B, N + 1], checked; float64.

    Raises:
        Refused: fewer than two times, times outside the theory, times that do not go strictly one way.
    """
    t = as_float64(torch.as_tensor(times, dtype=torch.float64))
    if t.ndim not in (1, 2) or t.shape[-1] < 2:
        raise Refused(f"A grid has at least two times; this one has shape {tuple(t.shape)}.")
    low, high = sorted((theory.t_data, theory.t_noise))
    for row in t.reshape(-1, t.shape[-1]):
        outside = ~((row >= low - 1e-9) & (row <= high + 1e-9))
        if bool(outside.any()):
            raise Refused(
                f'Time {row[outside][0].item():g} is outside "{theory.name}", '
                f"whose times lie between {low:g} and {high:g}."
            )
        way = row.diff()
        if not (bool((way > 0).all()) or bool((way < 0).all())):
            raise Refused("A grid must go one way, without repeats: from noise to data, or back to invert.")
    return t.clamp(low, high)


_GRIDS: dict[str, Callable[..., Tensor]] = {
    "linear": linear,
    "shifted": shifted,
    "karras": karras,
    "log-snr": log_snr,
    "beta": beta,
    "cosine": cosine,
    "two-sided": two_sided,
    "custom": custom,
}


def grids() -> list[str]:
    """The names `grid` knows."""
    return list(_GRIDS)


def grid(name: str, theory: Theory, steps: int, **args: object) -> Tensor:
    """The grid with this name (`custom` takes times=[…] and no steps).

    Raises:
        Refused: for a name or an argument that is not known, with the nearest that is.
    """
    make = _GRIDS[one_of("Grid", name.replace("_", "-"), _GRIDS)]
    known = [word for word in inspect.signature(make).parameters if word not in ("theory", "steps")]
    for word in args:
        if word not in known:
            raise Refused(f'Grid "{name}" takes no argument "{word}".{nearest(word, known) if known else ""}')
    return make(theory, **args) if make is custom else make(theory, steps, **args)


# ---------------------------------------------------------------- helpers


def interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The line through the points (x, y), x rising, read at `at`; constant beyond the ends."""
    i = torch.searchsorted(x.contiguous(), at.contiguous()).clamp(1, len(x) - 1)
    gap = (x[i] - x[i - 1]).clamp(min=1e-300)
    part = ((at - x[i - 1]) / gap).clamp(0, 1)
    return y[i - 1] + part * (y[i] - y[i - 1])


def _count(steps: object) -> int:
    if not isinstance(steps, int) or steps < 1:
        raise Refused(f"steps is {steps}; a grid needs a whole number of steps, at least 1.")
    return steps


def _flow_time(angle: Tensor) -> Tensor:
    return angle.sin() / (angle.sin() + angle.cos())


def _range(theory: Theory, lowest: float, highest: float | None, steps: int) -> tuple[float, float, int]:
    """Ratios s/a between which nodes are spread, and how many; the data come after them.

    Where the theory never gets as clean as `lowest`, its own end is the last of them.
    """
    top = math.tan(min(float(theory.angle(theory.t_noise)), 1.5707))
    high = min(highest or 80.0, top)
    if not 0 < lowest < high:
        raise Refused(
            f"The lowest noise-to-signal ratio {lowest:g} must lie between 0 and the highest, {high:g}."
        )
    bottom = math.tan(float(theory.angle(theory.t_data)))
    return (lowest, high, steps) if lowest > bottom else (bottom, high, steps + 1)


def _at_ratios(theory: Theory, ratio: Tensor) -> Tensor:
    t = theory.time_at(-2 * ratio.log())
    return _ended(theory, torch.cat([t, t.new_tensor([theory.t_data])]))


def _at_angles(theory: Theory, angles: Tensor) -> Tensor:
    return _ended(theory, theory.time_at(-2 * torch.log(angles.tan())))


def _ended(theory: Theory, t: Tensor) -> Tensor:
    t[0], t[-1] = theory.t_noise, theory.t_data
    return t
