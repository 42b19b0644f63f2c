"""Oracles: data whose perfect denoiser is known in closed form, so that all error is the solver's.

For a Gaussian mixture the posterior means E[x_0 | x_t] and E[x_T | x_t] are exact at every (a, s), and
with them the answer of a perfect network of any theory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import Refused
from sfumato.theory import noise
from sfumato.theory.definition import Theory, as_float64, eigh
from sfumato.theory.trajectory import initial_state
from sfumato.theory.types import AnyFloats, Denoise, TimeLike

Numbers = AnyFloats | Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True, eq=False)
class Mixture:
    """K Gaussians in D dimensions with covariances C_k = U_k diag(l_k) U_kᵀ; float64."""

    means: Tensor
    spectra: Tensor
    bases: Tensor
    weights: Tensor

    @property
    def dimension(self) -> int:
        """D, numbers a sample."""
        return self.means.shape[1]

    def posterior(self, x_t: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(E[x_0 | x_t], E[x_T | x_t]) for x_t [B, D], a and s [] or [B]; finite unless both are 0."""
        if self.is_isotropic:
            return self._isotropic_posterior(x_t, a.reshape(-1, 1), s.reshape(-1, 1))
        a, s = a.reshape(-1, 1, 1), s.reshape(-1, 1, 1)
        variance = a * a * self.spectra + s * s  # [B, K, D]
        turned = torch.einsum("bkd,kde->bke", x_t[:, None] - a * self.means, self.bases)
        fit = self.weights.log() - 0.5 * (turned.square() / variance + variance.log()).sum(-1)
        scaled = fit.softmax(-1)[..., None] * turned / variance
        x_T = s[:, 0] * torch.einsum("bke,kde->bd", scaled, self.bases)
        turned_back = a[:, 0] * torch.einsum("bke,kde->bd", scaled * self.spectra, self.bases)
        return fit.softmax(-1) @ self.means + turned_back, x_T

    @cached_property
    def is_isotropic(self) -> bool:
        """Whether every covariance is a multiple of the identity: no directions to turn into."""
        return bool((self.spectra == self.spectra[:, :1]).all())

    def _isotropic_posterior(self, x_t: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        level = self.spectra[:, 0]
        variance = a * a * level + s * s  # [B, K]
        off = x_t[:, None] - a[..., None] * self.means
        fit = self.weights.log() - 0.5 * (off.square().sum(-1) / variance + self.dimension * variance.log())
        share = fit.softmax(-1)
        scaled = share / variance
        x_T = s * (scaled[..., None] * off).sum(1)
        return share @ self.means + a * ((scaled * level)[..., None] * off).sum(1), x_T

    def denoiser(self, theory: Theory) -> Denoise:
        """A perfect network of `theory`: denoise(x_t [B, …] with D numbers a sample, t) → out like x_t.

        Raises (when called):
            Refused: for samples that do not hold D numbers.
        """

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            if x_t[0].numel() != self.dimension:
                raise Refused(f"A sample holds {x_t[0].numel()} numbers, this mixture {self.dimension}.")
            moment = as_float64(t)
            x_0, x_T = self.posterior(x_t.reshape(len(x_t), -1).double(), *theory.data(moment))
            p, q = (c.reshape(-1, 1) for c in theory.model(moment))
            return (p * x_0 + q * x_T).reshape(x_t.shape).to(x_t.dtype)

        return denoise

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """`count` draws [count, D], float64."""
        rows = range(count)
        ladder = self.weights.cumsum(0)[:-1].contiguous()
        mode = torch.searchsorted(ladder, noise.uniform(seed, rows, purpose="mode"))
        unit = noise.normal((self.dimension,), seed, rows, purpose="mixture").double()
        return self.means[mode] + torch.einsum(
            "be,bde->bd", unit * self.spectra[mode].sqrt(), self.bases[mode]
        )

    def velocity(self, z: Tensor, angle: float) -> Tensor:
        """v = cos φ·E[x_T] − sin φ·E[x_0], the canonical dz/dφ at z [B, D]."""
        a, s = torch.tensor(math.cos(angle)).double(), torch.tensor(math.sin(angle)).double()
        x_0, x_T = self.posterior(z, math.cos(angle) + 0 * a, math.sin(angle) + 0 * s)
        return math.cos(angle) * x_T - math.sin(angle) * x_0

    def endpoint(self, z: Tensor, start: float, end: float = 0.0, tolerance: float = 1e-11) -> Tensor:
        """The exact flow of z = x/r [B, D] from angle `start` to `end` (Gragg–Bulirsch–Stoer, order 16)."""
        here, size = start, (end - start) / 16
        z = z.double()
        while abs(end - here) > 1e-15:
            size = math.copysign(min(abs(size), abs(end - here)), end - start)
            reached, error = self._extrapolate(z, here, size)
            if error <= tolerance or abs(size) < 1e-7:
                here, z = here + size, reached
            size *= min(3.0, max(0.2, 0.8 * (tolerance / max(error, 1e-300)) ** (1 / 15)))
        return z

    def reference(self, x_T: AnyFloats, theory: Theory, t: TimeLike | None = None) -> Tensor:
        """x at t_data reached from x_T by the exact flow; x_T is read as in `solve`, at t or t_noise."""
        begin = theory.t_noise if t is None else float(as_float64(t))
        z = initial_state(x_T.double(), theory, begin).reshape(len(x_T), -1)
        end = float(theory.angle(theory.t_data))
        r = float(torch.hypot(*theory.data(as_float64(theory.t_data))))
        return r * self.endpoint(z, float(theory.angle(begin)), end).reshape(x_T.shape)

    def _extrapolate(self, z: Tensor, here: float, size: float) -> tuple[Tensor, float]:
        """One step by the modified midpoint rule with 2, 4, …, 16 parts, extrapolated to none."""
        first, row = self.velocity(z, here), []
        error = math.inf
        for k in range(1, 9):
            parts = 2 * k
            h = size / parts
            old, new = z, z + h * first
            for m in range(1, parts):
                old, new = new, old + 2 * h * self.velocity(new, here + m * h)
            better = [0.5 * (old + new + h * self.velocity(new, here + size))]
            for j, coarse in enumerate(row, start=1):
                ratio = (k / (k - j)) ** 2
                better.append(better[-1] + (better[-1] - coarse) / (ratio - 1))
            if row:
                error = float((better[-1] - better[-2]).abs().amax())
            row = better
        return row[-1], error


def mixture(means: Numbers, covariances: Numbers | float, weights: Numbers | None = None) -> Mixture:
    """A Gaussian mixture whose denoisers are exact.

    Args:
        means: [K, D].
        covariances: [K, D, D] matrices, [K, D] or [K] variances, or one variance for all.
        weights: [K], by default equal; scaled to sum to 1.
    Raises:
        Refused: for shapes that do not fit, covariances that are not positive definite, weights ≤ 0.
    """
    center = torch.as_tensor(means, dtype=torch.float64)
    if center.ndim != 2 or not center.numel():
        raise Refused(f"means has shape {tuple(center.shape)}; it must be [modes, dimensions].")
    modes, size = center.shape
    cover = torch.as_tensor(covariances, dtype=torch.float64)
    if cover.shape == (modes, size, size):
        spectra, bases = eigh(cover)
    elif cover.shape in ((), (modes,), (modes, size)):
        spectra = (cover.reshape(-1, 1) if cover.ndim < 2 else cover).expand(modes, size)
        bases = torch.eye(size, dtype=torch.float64).expand(modes, size, size)
    else:
        raise Refused(
            f"covariances has shape {tuple(cover.shape)}; for {modes} modes in {size} dimensions it must be "
            f"[{modes}, {size}, {size}], [{modes}, {size}] or [{modes}]."
        )
    share = (torch.ones(modes) if weights is None else torch.as_tensor(weights)).double()
    if share.shape != (modes,) or not bool((share > 0).all()):
        raise Refused(f"weights must be {modes} positive numbers, one per mode.")
    if not bool((spectra > 0).all()):
        raise Refused("covariances must be positive definite: every variance above 0.")
    return Mixture(center, spectra.contiguous(), bases.contiguous(), share / share.sum())


def ring(modes: int = 8, radius: float = 1.4, deviation: float = 0.1) -> Mixture:
    """Modes on a circle in the plane."""
    turn = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
    return mixture(radius * torch.stack([turn.cos(), turn.sin()], -1), deviation**2)


def random_mixture(
    modes: int, dimensions: int, seed: int, mean_std: float = 0.7, least: float = 0.003
) -> Mixture:
    """Modes, orientations, spectra (log-uniform from `least` to 0.5) and weights drawn from a seed."""
    rows = range(modes)
    means = mean_std * noise.normal((dimensions,), seed, rows, purpose="means").double()
    frame = noise.normal((dimensions, dimensions), seed, rows, purpose="frames").double()
    linalg: Any = torch.linalg  # its functions have no types
    bases: Tensor = linalg.qr(frame)[0]
    level = noise.normal((dimensions,), seed, rows, purpose="spectra").double()
    chance = 0.5 * (1 + torch.erf(level / math.sqrt(2)))
    spectra = (math.log(least) + (math.log(0.5) - math.log(least)) * chance).exp()
    weights = noise.uniform(seed, rows, purpose="weights") + 0.1
    return Mixture(means, spectra, bases, weights / weights.sum())
