"""Times to train at, and how much each counts.

A density maps u, even in (0, 1), to times of a theory; u may come from anywhere, so that draws are
reproducible (noise.uniform) or stratified over a batch. Each is written once, on a coordinate of its own,
and cut to the times a theory has. A weighting is written for the loss its paper weighs and carried to the
theory's own answer:

    ‖out − out*‖² = (det/det_of)² · ‖of − of*‖²     for the same x_t and t
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import Refused, nearest, one_of
from sfumato.theory import noise
from sfumato.theory.definition import Theory, as_float64
from sfumato.theory.types import AnyFloats

Curve = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Distribution:
    """A distribution of one number y that grows with the noise: share below y, its inverse, its slope."""

    cdf: Curve
    quantile: Curve
    pdf: Curve


@dataclass(frozen=True)
class Density:
    """A distribution of training times.

    Args:
        name: as the catalogue has it.
        distribution: of the coordinate.
        coordinate: "time" (the theory's own, 0 at data and 1 at noise) or "ratio" (log s/a).
    """

    name: str
    distribution: Distribution
    coordinate: str

    def __call__(self, theory: Theory, u: AnyFloats) -> Tensor:
        """u [B] in (0, 1), even → t [B] float64, distributed as this density says."""
        share = as_float64(u)
        if not bool(((share >= 0) & (share <= 1)).all()):
            raise Refused("u must lie between 0 and 1; noise.uniform or times.stratified draw it.")
        low, high = self._ends(theory)
        y = self.distribution.quantile(low + (high - low) * share)
        if self.coordinate == "time":
            return theory.t_data + (theory.t_noise - theory.t_data) * y
        return theory.time_at(-2 * y)

    def pdf(self, theory: Theory, t: AnyFloats) -> Tensor:
        """How densely times are drawn at t [B], per unit of t; it integrates to 1 over the theory's times."""
        low, high = self._ends(theory)
        with torch.enable_grad():
            moment = as_float64(t).detach().requires_grad_()
            y = self._coordinate(theory, moment)
            (slope,) = torch.autograd.grad(y.sum(), moment)
        return (self.distribution.pdf(y) * slope.abs() / (high - low)).detach()

    def _coordinate(self, theory: Theory, t: Tensor) -> Tensor:
        if self.coordinate == "time":
            return (t - theory.t_data) / (theory.t_noise - theory.t_data)
        return -theory.log_snr(t) / 2

    def _ends(self, theory: Theory) -> tuple[Tensor, Tensor]:
        low, high = (self._coordinate(theory, as_float64(end)) for end in (theory.t_data, theory.t_noise))
        return self.distribution.cdf(low), self.distribution.cdf(high)


# ---------------------------------------------------------------- distributions


def _even(low: float, high: float) -> Distribution:
    return Distribution(
        cdf=lambda y: ((y - low) / (high - low)).clamp(0, 1),
        quantile=lambda u: low + (high - low) * u,
        pdf=lambda y: torch.where((y >= low) & (y <= high), 1 / (high - low), 0.0),
    )


def _normal(mean: float, std: float) -> Distribution:
    if not std > 0:
        raise Refused(f"std is {std:g}; it must be above 0.")
    return Distribution(
        cdf=lambda y: 0.5 * torch.erfc((mean - y) / (std * math.sqrt(2))),
        quantile=lambda u: mean + std * math.sqrt(2) * torch.erfinv(2 * u - 1),
        pdf=lambda y: torch.exp(-0.5 * ((y - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi)),
    )


def uniform() -> tuple[Distribution, str]:
    """Even in the theory's own time."""
    return _even(0.0, 1.0), "time"


def logit_normal(mean: float = 0.0, std: float = 1.0) -> tuple[Distribution, str]:
    """log(s/a) is normal; in flow matching t is logit-normal.

    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1.
    """
    return _normal(mean, std), "ratio"


def log_normal(mean: float = -1.2, std: float = 1.2) -> tuple[Distribution, str]:
    """EDM's: log σ is normal. Source: Karras et al. 2022, arXiv:2206.00364, table 1."""
    return _normal(mean, std), "ratio"


def log_snr(lowest: float = 0.002, highest: float = 80.0) -> tuple[Distribution, str]:
    """Even in log-SNR between two ratios s/a.

    Raises:
        Refused: unless 0 < lowest < highest.
    Source: Kingma et al. 2021, arXiv:2107.00630.
    """
    if not 0 < lowest < highest:
        raise Refused(f"lowest {lowest:g} and highest {highest:g} must satisfy 0 < lowest < highest.")
    return _even(math.log(lowest), math.log(highest)), "ratio"


def cosmap() -> tuple[Distribution, str]:
    """Even in the angle φ = atan(s/a). Source: Esser et al. 2024, arXiv:2403.03206, section 3.1."""
    half = math.pi / 2
    return Distribution(
        cdf=lambda y: y.exp().atan() / half,
        quantile=lambda u: (half * u).tan().log(),
        pdf=lambda y: 1 / (half * 2 * y.cosh()),
    ), "ratio"


def mode(scale: float = 1.29) -> tuple[Distribution, str]:
    """Flow time 1 − u − scale·(cos²(πu/2) − 1 + u): crowded in the middle, positive at both ends.

    Raises:
        Refused: for a scale at which times would turn back.
    Source: Esser et al. 2024, arXiv:2403.03206, eq. 20.
    """
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise Refused(f"scale is {scale:g}; it must lie between −1 and {2 / (math.pi - 2):.3f}.")
    half = math.pi / 2

    def flow(u: Tensor) -> Tensor:  # rising in u: the paper's formula at 1 − u
        return u - scale * ((half * u).sin().square() - u)

    def cdf(y: Tensor) -> Tensor:
        wanted, low, high = torch.sigmoid(y), torch.zeros_like(y), torch.ones_like(y)
        for _ in range(60):
            middle = (low + high) / 2
            below = flow(middle) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high

    def pdf(y: Tensor) -> Tensor:
        u, share = cdf(y.detach()), torch.sigmoid(y)
        return share * (1 - share) / (1 + scale - scale * half * (math.pi * u).sin())

    return Distribution(cdf, lambda u: torch.logit(flow(u)), pdf), "ratio"


_DENSITIES: dict[str, Callable[..., tuple[Distribution, str]]] = {
    "uniform": uniform,
    "logit-normal": logit_normal,
    "log-normal": log_normal,
    "log-snr": log_snr,
    "cosmap": cosmap,
    "mode": mode,
}


def densities() -> list[str]:
    """The names `density` knows."""
    return list(_DENSITIES)


def density(name: str, **args: float) -> Density:
    """The density with this name.

    Raises:
        Refused: for a name or an argument that is not known, with the nearest that is.
    """
    make = _DENSITIES[one_of("Training density", name.replace("_", "-"), _DENSITIES)]
    return Density(name, *make(**_known(f'Density "{name}"', make, args)))


def stratified(seed: int, batch: int, step: int, rows: range | None = None) -> Tensor:
    """u [rows] in (0, 1): one draw in each of `batch` equal parts, dealt out at random over the global batch.

    Args:
        rows: this process's rows of the global batch, all by default.
    Raises:
        Refused: for a batch below 1.
    """
    if batch < 1:
        raise Refused(f"batch is {batch}; stratified times need at least 1.")
    part = noise.permutation(batch, seed, "strata", step).double()
    jitter = noise.uniform(seed, range(batch), step, "strata")
    u = (part + jitter) / batch
    return u if rows is None else u[list(rows)]


# ---------------------------------------------------------------- weightings

Weighting = Callable[[Theory, Tensor], Tensor]


def _on_data(weigh: Curve) -> Weighting:
    """weigh(log-SNR) of the x_0 loss, as a weight of the theory's own."""
    return lambda theory, t: _of_model_loss(theory, t, weigh, on_data=True)


def _on_noise(weigh: Curve) -> Weighting:
    return lambda theory, t: _of_model_loss(theory, t, weigh, on_data=False)


def _of_model_loss(theory: Theory, t: Tensor, weigh: Curve, on_data: bool) -> Tensor:
    a, s, _, _, det = theory.coefficients(t)
    return weigh(theory.log_snr(t)) * ((s if on_data else a) / det).square()


def unit() -> Weighting:
    """1 on the theory's own answer."""
    return lambda theory, t: torch.ones_like(as_float64(t))


def min_snr(gamma: float = 5.0) -> Weighting:
    """min(SNR, γ) on x_0. Source: Hang et al. 2023, arXiv:2303.09556."""
    return _on_data(lambda log_snr: log_snr.exp().clamp(max=gamma))


def edm(sigma_data: float = 0.5) -> Weighting:
    """(σ² + σ_d²)/(σ·σ_d)² on x_0: 1 on EDM's own answer. Source: Karras et al. 2022, arXiv:2206.00364."""
    return _on_data(lambda log_snr: log_snr.exp() + 1 / sigma_data**2)


def sigmoid(bias: float = 2.0) -> Weighting:
    """sigmoid(bias − log-SNR) on the noise. Source: Kingma & Gao 2023, arXiv:2303.00848."""
    return _on_noise(lambda log_snr: torch.sigmoid(bias - log_snr))


def p2(gamma: float = 1.0, k: float = 1.0) -> Weighting:
    """1/(k + SNR)^γ on the noise. Source: Choi et al. 2022, arXiv:2204.00227."""
    return _on_noise(lambda log_snr: (k + log_snr.exp()) ** -gamma)


def debiased() -> Weighting:
    """1/√SNR on the noise. Source: Yu et al. 2023, arXiv:2310.08442."""
    return _on_noise(lambda log_snr: torch.exp(-log_snr / 2))


_WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "unit": unit,
    "min-snr": min_snr,
    "edm": edm,
    "sigmoid": sigmoid,
    "p2": p2,
    "debiased": debiased,
}


def weightings() -> list[str]:
    """The names `weighting` knows."""
    return list(_WEIGHTINGS)


def weighting(name: str, **args: float) -> Weighting:
    """weigh(theory, t [B]) → [B]: what a sample's squared error of the theory's own answer is multiplied by.

    Raises:
        Refused: for a name or an argument that is not known, with the nearest that is.
    """
    make = _WEIGHTINGS[one_of("Weighting", name.replace("_", "-"), _WEIGHTINGS)]
    return make(**_known(f'Weighting "{name}"', make, args))


def _known(title: str, make: Callable[..., object], args: dict[str, float]) -> dict[str, float]:
    known = list(inspect.signature(make).parameters)
    given: dict[str, object] = {**args}
    for word, value in given.items():
        if word not in known:
            raise Refused(f'{title} takes no argument "{word}".{nearest(word, known) if known else ""}')
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Refused(f"{title}: {word} is {value!r}; it must be a number.")
        if title.startswith("Weighting") and word != "bias" and not value > 0:
            raise Refused(f"{title}: {word} is {value:g}; it must be above 0.")
    return args
