"""Two definitions make a theory: what x_t holds, and what the network answers.

    x_t = C_t   · (x_0, x_T)      C_t   = (a_t, s_t)      the data definition
    out = C^ε_t · (x_0, x_T)      C^ε_t = (p_t, q_t)      the model definition

Training target, denoising step and the split into (x_0, x_T) are one 2×2 solve of these rows, which
exists while det = a·q − s·p ≠ 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sfumato.errors import Refused
from sfumato.theory.types import AnyFloats, CoefficientFunction, TimeLike

SINGULAR = 1e-6
"""|sin| of the angle between the rows C_t and C^ε_t below which the split is no longer defined."""


def as_float64(t: TimeLike) -> Tensor:
    """t as float64, where formulas are evaluated (on the CPU for devices that lack float64).

    Raises:
        Refused: what is no real number, nor a tensor or list of them.
    """
    if isinstance(t, Tensor) and not t.is_complex():
        return t.to("cpu" if t.device.type == "mps" else t.device, torch.float64)
    try:
        if isinstance(t, Tensor):
            raise TypeError("complex")
        return torch.as_tensor(t, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Refused(f"{t!r} is no time: give a real number, or a tensor with one per sample.") from error


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device; from host to GPU by way of pinned memory, so that nobody waits for the copy."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def broadcast_like(coefficient: Tensor, like: Tensor) -> Tensor:
    """A scalar or [B] turned to [1 or B, 1, …, 1] with the dtype and device of `like` [B, …]."""
    placed = upload(coefficient.to(like.dtype), like.device)
    return placed if placed.ndim == 0 else placed.reshape(-1, *[1] * (like.ndim - 1))


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., D] and eigenvectors [..., D, D] of symmetric matrices."""
    linalg: Any = torch.linalg  # its functions have no types
    values, vectors = linalg.eigh(matrices)
    return values, vectors


def to_lists(values: Tensor) -> list[Any]:
    """The values as Python's numbers, in lists of lists where there are several axes."""
    return cast(Any, values).tolist()


class CoefficientPair:
    """A user's pair of coefficients; what it returns is checked and brought to the shape of t."""

    def __init__(self, definition: CoefficientFunction, title: str) -> None:
        self.definition, self.title = definition, title

    def __call__(self, t: TimeLike) -> tuple[Tensor, Tensor]:
        """t of any shape → two tensors of that shape.

        Raises:
            Refused: unless the definition returns two coefficients with the shape of t.
        """
        t = t if isinstance(t, Tensor) and t.is_floating_point() else as_float64(t)
        try:
            pair = cast(object, self.definition(t))
        except Exception as error:
            raise Refused(
                f"{self.title} failed on t of shape {tuple(t.shape)}: {error}. Write it with torch functions "
                f"that take a float tensor of any shape."
            ) from error
        if not isinstance(pair, tuple | list):
            raise Refused(f"{self.title} must return two coefficients, not a {type(pair).__name__}.")
        pair = cast("tuple[object, ...] | list[object]", pair)
        if len(pair) != 2:
            raise Refused(f"{self.title} must return two coefficients, not {len(pair)}.")
        return self._fit(pair[0], t), self._fit(pair[1], t)

    def _fit(self, value: object, t: Tensor) -> Tensor:
        if not isinstance(value, Tensor | float | int) or (isinstance(value, Tensor) and value.is_complex()):
            kind = "complex numbers" if isinstance(value, Tensor) else type(value).__name__
            raise Refused(f"{self.title} returns {kind}; coefficients are real tensors or numbers.")
        tensor = torch.as_tensor(value, dtype=t.dtype, device=t.device)
        if tensor.ndim and tensor.shape != t.shape:
            raise Refused(
                f"{self.title} returns shape {tuple(tensor.shape)} for t of shape {tuple(t.shape)}; "
                f"return one coefficient per time."
            )
        return tensor.expand(t.shape)


def default_clock(t: Tensor) -> Tensor:
    """The clock of a theory that brings none: 1000 × the way from data to noise."""
    return 1000 * t


@dataclass(frozen=True)
class Report:
    """What `Theory.check` found; `ok` when nothing is wrong."""

    problems: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        return "ok" if self.ok else "\n".join(self.problems)


@dataclass(frozen=True, eq=False)
class Theory:
    """A data definition and a model definition; everything else follows.

    Args:
        data: t → (a, s), with a·x_0 + s·x_T = x_t.
        model: t → (p, q), with p·x_0 + q·x_T = the network's answer.
        t_noise, t_data: where the noise and the data are; the network is never asked at t_data.
        name: what messages call it.
        clock: t → what the network is told about time; by default 1000 × the way from data to noise.
        input_scale: t → what the network's input is multiplied by; by default 1.
    """

    data: CoefficientFunction
    model: CoefficientFunction
    t_noise: float | int = 1.0
    t_data: float | int = 0.0
    name: str = "a theory of one's own"
    clock: Callable[[Tensor], Tensor] = default_clock
    input_scale: Callable[[Tensor], Tensor] = torch.ones_like

    def __post_init__(self) -> None:
        for role in ("data", "model"):
            if not callable(getattr(self, role)):
                raise Refused(
                    f'Theory "{self.name}": {role} must be a function of t that returns two coefficients.'
                )
        for role in ("clock", "input_scale"):
            if not callable(getattr(self, role)):
                raise Refused(
                    f'Theory "{self.name}": {role} must be a function of t, as lambda t: 1000 * t is.'
                )
        ends = as_float64(self.t_noise), as_float64(self.t_data)
        if any(end.numel() != 1 for end in ends):
            raise Refused(f'Theory "{self.name}": t_noise and t_data must be one number each.')
        t_noise, t_data = (float(end) for end in ends)
        if not (math.isfinite(t_noise) and math.isfinite(t_data)) or t_noise == t_data:
            raise Refused(
                f'Theory "{self.name}": t_noise {t_noise:g} and t_data {t_data:g} must be finite and differ.'
            )
        put = object.__setattr__
        put(self, "t_noise", t_noise)
        put(self, "t_data", t_data)
        put(self, "data", CoefficientPair(self.data, f'Theory "{self.name}": data(t)'))
        put(self, "model", CoefficientPair(self.model, f'Theory "{self.name}": model(t)'))
        if self.clock is default_clock:

            def linear_clock(t: Tensor) -> Tensor:
                return (t - t_data) * (1000 / (t_noise - t_data))

            put(self, "clock", linear_clock)

    # ---------------------------------------------------------------- the four forms of one solve

    def mix(self, x_0: AnyFloats, x_T: AnyFloats, t: TimeLike) -> Tensor:
        """a_t·x_0 + s_t·x_T. Shapes: x [B, …], t a number or [B]."""
        self._check_same_shape(x_0, x_T, "x_0", "x_T")
        a, s = (broadcast_like(c, x_0) for c in self.data(self._valid_time(t, x_0)))
        return a * x_0 + s * x_T

    def target(self, x_0: AnyFloats, x_T: AnyFloats, t: TimeLike) -> Tensor:
        """p_t·x_0 + q_t·x_T: what a perfect network answers."""
        self._check_same_shape(x_0, x_T, "x_0", "x_T")
        p, q = (broadcast_like(c, x_0) for c in self.model(self._valid_time(t, x_0)))
        return p * x_0 + q * x_T

    def split(self, x_t: AnyFloats, out: AnyFloats, t: TimeLike) -> tuple[Tensor, Tensor]:
        """(x_0, x_T) behind a state and the network's answer.

        Raises:
            Refused: where det = 0; the message names the time and the remedy.
        """
        self._check_same_shape(x_t, out, "x_t", "out")
        a, s, p, q, det = self.coefficients(self._valid_time(t, x_t))
        x0_x, x0_o, xT_x, xT_o = (broadcast_like(c / det, x_t) for c in (q, -s, -p, a))
        return x0_x * x_t + x0_o * out, xT_x * x_t + xT_o * out

    def step(self, x_t: AnyFloats, out: AnyFloats, t: TimeLike, s: TimeLike) -> Tensor:
        """x_s = C_s·(x_0, x_T): from time t to any time s with one answer (DDIM, for every theory)."""
        self._check_same_shape(x_t, out, "x_t", "out")
        keep, add = self.step_weights(self._valid_time(t, x_t), self._valid_time(s, x_t))
        return broadcast_like(keep, x_t) * x_t + broadcast_like(add, x_t) * out

    # ---------------------------------------------------------------- coefficients

    def coefficients(self, t: TimeLike) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(a, s, p, q, det) in float64.

        Raises:
            Refused: where det vanishes or is not finite, and outside the theory's times.
        """
        t = self.clamp_time(as_float64(t))
        (a, s), (p, q) = self.data(t), self.model(t)
        det = a * q - s * p
        self._check_invertible(t, a, s, p, q, det)
        return a, s, p, q, det

    def singular(self, t: TimeLike) -> Tensor:
        """Where the split is not defined: a boolean per time, of the shape of t."""
        t = self.clamp_time(as_float64(t))
        (a, s), (p, q) = self.data(t), self.model(t)
        return _parallel(a, s, p, q, a * q - s * p)

    def step_weights(self, t: TimeLike, s: TimeLike) -> tuple[Tensor, Tensor]:
        """(w_x, w_out) with x_s = w_x·x_t + w_out·out: C_s·[C_t; C^ε_t]⁻¹."""
        a, n, p, q, det = self.coefficients(t)
        a_next, n_next = self.data(self.clamp_time(as_float64(s)))
        return (a_next * q - n_next * p) / det, (a * n_next - n * a_next) / det

    def velocity_coefficients(self, t: TimeLike) -> tuple[Tensor, Tensor, Tensor]:
        """(r, k_out, k_z) with z = x/r and v = k_out·out + k_z·z, the canonical velocity dz/dφ.

        v = cos φ·x_T − sin φ·x_0 = (r·out − (a·p + s·q)·z) / det.
        """
        a, s, p, q, det = self.coefficients(t)
        r = torch.hypot(a, s)
        return r, r / det, -(a * p + s * q) / det

    def angle(self, t: TimeLike) -> Tensor:
        """φ = atan2(s, a): 0 at data, π/2 at pure noise, the same for every theory. Radians, float64.

        Raises:
            Refused: outside the theory's times.
        """
        return self._angle(self.clamp_time(as_float64(t)))

    def log_snr(self, t: TimeLike) -> Tensor:
        """log(a²/s²): +inf where there is no noise, −inf where there is no signal. Nats, float64.

        Raises:
            Refused: outside the theory's times.
        """
        return self._log_snr(self.clamp_time(as_float64(t)))

    def time_at(self, log_snr: TimeLike) -> Tensor:
        """The time with this log-SNR, the nearest end where there is none. Any shape, float64.

        Raises:
            Refused: for what is not a number.
        """
        return self._search(lambda t: -self._log_snr(t), -self._number(log_snr, "log-SNR"))

    def time_of(self, angle: TimeLike) -> Tensor:
        """The time with this angle φ, the nearest end where there is none. Any shape, float64.

        Raises:
            Refused: for what is not a number.
        """
        return self._search(self._angle, self._number(angle, "angle"))

    def convert(
        self, out: AnyFloats, x_t: AnyFloats, t: TimeLike, to: "Theory"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(out', x'_t, t'): the same (x_0, x_T) at the same signal-to-noise, as `to` writes it.

        Raises:
            Refused: where this theory is singular, or `to` has no time with this signal-to-noise.
        """
        t = self._valid_time(t, x_t)
        self._check_reached(t, to)
        there = to.time_at(self.log_snr(t))
        x_0, x_T = self.split(x_t, out, t)
        ratio = torch.hypot(*to.data(there)) / torch.hypot(*self.data(t))
        return to.target(x_0, x_T, there), broadcast_like(ratio, x_t) * x_t, there

    # ---------------------------------------------------------------- the check

    def check(self, times: TimeLike | None = None) -> Report:
        """Is the theory sound at these times (by default 257 from t_noise to t_data)?

        Finds definitions that fail or have wrong shapes, negative or vanishing coefficients, times at
        which the split is singular, an angle that does not rise towards noise, a step that does not
        reproduce C_s, a clock or input scale that is not finite. t_data is not asked and not checked.
        """

        return Report(problems_of(self, times))

    # ---------------------------------------------------------------- helpers

    def _angle(self, t: Tensor) -> Tensor:
        a, s = self.data(t)
        return torch.atan2(s, a)

    def _log_snr(self, t: Tensor) -> Tensor:
        a, s = self.data(t)
        return 2 * (a.log() - s.log())

    def _number(self, wanted: TimeLike, what: str) -> Tensor:
        value = as_float64(wanted)
        if bool(value.isnan().any()):
            raise Refused(f'"{self.name}" has no time whose {what} is not a number.')
        return value

    def _search(self, rising: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
        """The t with rising(t) = wanted: ever finer ladders, until neighbouring floats are left."""
        low = torch.full(wanted.shape, self.t_data, dtype=torch.float64, device=wanted.device)
        high = torch.full_like(low, self.t_noise)
        if wanted.numel() == 0:
            return low
        bits = 9 if wanted.numel() <= 8 else 6
        fractions = torch.linspace(0, 1, 2**bits + 1, dtype=torch.float64, device=wanted.device)
        for _ in range(-(-64 // bits)):
            ladder = low[..., None] + (high - low)[..., None] * fractions
            ladder[..., -1] = high
            below = (rising(ladder[..., 1:-1]) < wanted[..., None]).sum(-1, keepdim=True)
            low, high = ladder.gather(-1, below)[..., 0], ladder.gather(-1, below + 1)[..., 0]
        ends = torch.stack([low, high], -1)
        miss = (rising(ends) - wanted[..., None]).abs().nan_to_num(0.0)  # inf − inf: this end is meant
        found = ends.gather(-1, miss.argmin(-1, keepdim=True))[..., 0]
        first, last = (rising(found.new_tensor(end)) for end in (self.t_data, self.t_noise))
        return torch.where(wanted >= last, self.t_noise, torch.where(wanted <= first, self.t_data, found))

    def _valid_time(self, t: TimeLike, x: Tensor) -> Tensor:
        t = as_float64(t)
        if t.ndim > 1 or (t.ndim == 1 and (x.ndim == 0 or t.shape[0] not in (1, x.shape[0]))):
            raise Refused(
                f"Time of shape {tuple(t.shape)} does not fit x of shape {tuple(x.shape)}: "
                f"give one time, or one per sample."
            )
        return self.clamp_time(t)

    def clamp_time(self, t: Tensor) -> Tensor:
        """t, where float32 rounded an end outwards at the end itself.

        Raises:
            Refused: times that the theory does not have. (On a GPU that check would wait for it: not there.)
        """
        low, high = sorted((self.t_data, self.t_noise))
        if t.device.type != "cpu":
            return t.clamp(low, high)
        slack = 1e-6 * (high - low)
        outside = ~((t >= low - slack) & (t <= high + slack))
        if bool(outside.any()):
            where = t[outside].flatten()[0].item()
            trained = " A trained step n of N is t = (n + 1)/N." if high == 1 and where > 1 else ""
            ends = f"whose times lie between {low:g} and {high:g}."
            raise Refused(f'Time {where:g} is outside "{self.name}", {ends}{trained}')
        return t.clamp(low, high)

    def _check_same_shape(self, one: Tensor, other: Tensor, name: str, other_name: str) -> None:
        for x, called in ((cast(object, one), name), (cast(object, other), other_name)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise Refused(f"{called} is {kind}; it must be a floating-point tensor [B, …].")
        if one.shape != other.shape:
            raise Refused(
                f"{name} has shape {tuple(one.shape)}, {other_name} {tuple(other.shape)}; make them equal."
            )

    def _check_reached(self, t: Tensor, to: "Theory") -> None:
        angle = self.angle(t)
        low, high = (float(to.angle(end)) for end in (to.t_data, to.t_noise))
        outside = (angle < low - 1e-9) | (angle > high + 1e-9)
        if bool(outside.any()):
            where = t.flatten()[outside.flatten()][0].item()
            raise Refused(
                f'At t = {where:g} of "{self.name}" the log-SNR is {self.log_snr(where):.3g}, '
                f'which "{to.name}" never reaches. Stay within {to.log_snr(to.t_noise):.3g} and '
                f"{to.log_snr(to.t_data):.3g}."
            )

    def _check_invertible(self, t: Tensor, a: Tensor, s: Tensor, p: Tensor, q: Tensor, det: Tensor) -> None:
        bad = _parallel(a, s, p, q, det)
        if not bool(bad.any()):
            return
        at = int(bad.flatten().nonzero()[0])
        where, signal, noise, on_data, on_noise = (float(c.flatten()[at]) for c in (t, a, s, p, q))
        raise Refused(
            f'Theory "{self.name}" is singular at t = {where:g}: {_why(signal, noise, on_data, on_noise)}'
        )


def _parallel(a: Tensor, s: Tensor, p: Tensor, q: Tensor, det: Tensor) -> Tensor:
    """Where the rows (a, s) and (p, q) do not tell x_0 from x_T."""
    size = torch.hypot(a, s) * torch.hypot(p, q)
    return ~torch.isfinite(det) | ~(det.abs() > SINGULAR * size)


def _why(a: float, s: float, p: float, q: float) -> str:
    seen = f"x_t = {a:.3g}·x_0 + {s:.3g}·x_T and out = {p:.3g}·x_0 + {q:.3g}·x_T"
    if not all(map(math.isfinite, (a, s, p, q))):
        return f"{seen} is not finite. Keep this time out of the grid, or change the definition there."
    if a < 1e-3 * s:
        return f"{seen} do not tell x_0. Start a little before it, or predict velocity or x_0 there."
    if s < 1e-3 * a:
        return f"{seen} do not tell x_T. Keep this time out of the grid, or predict velocity or noise there."
    return f"{seen} are the same mixture. Change the model definition there."


# ----------------------------------------------------------------
# What can be wrong with a theory, in sentences: the check behind `Theory.check`.


def problems_of(theory: Theory, times: TimeLike | None) -> list[str]:
    """One sentence per problem, the gravest first; an empty list when the theory is sound."""

    try:
        t = _everywhere(theory) if times is None else as_float64(times).flatten()
        if not len(t):
            return ["There is no time to check at; give some, or leave them out."]
        theory.clamp_time(t)
        asked = t[t != theory.t_data]
        problems = _shapes(theory, t) or _levels(theory, t)
        if not problems:
            problems = _order(theory, t) + _split(theory, asked) + _clock_and_input_scale(theory, asked)
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
    toward_noise = t.sort(descending=theory.t_noise < theory.t_data)[0]
    toward_noise = torch.cat([toward_noise[:1], toward_noise[1:][toward_noise.diff() != 0]])
    angle = theory.angle(toward_noise)
    flat = angle.diff() <= 0
    if not bool(flat.any()):
        return []
    i = int(flat.nonzero()[0])
    here, there = toward_noise[i].item(), toward_noise[i + 1].item()
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
            theory.coefficients(t)
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


def _clock_and_input_scale(theory: Theory, asked: Tensor) -> list[str]:
    problems: list[str] = []
    for name in ("clock", "input_scale"):
        try:
            found = getattr(theory, name)(asked)
        except Exception as error:
            problems.append(f'Theory "{theory.name}": {name}(t) failed: {error}.')
            continue
        if not isinstance(found, Tensor) or found.shape != asked.shape:
            problems.append(f'Theory "{theory.name}": {name}(t) must return a tensor of the shape of t.')
        elif not bool(torch.isfinite(found).all()):
            where = asked[~torch.isfinite(found)][0].item()
            problems.append(
                f'Theory "{theory.name}": {name}(t) is not finite at the asked time t = {where:g}.'
            )
        elif name == "input_scale" and bool((found == 0).any()):
            where = asked[found == 0][0].item()
            problems.append(
                f'Theory "{theory.name}": input_scale(t) is 0 at t = {where:g}, where the network would see '
                f"nothing. Keep it away from 0."
            )
    return problems
