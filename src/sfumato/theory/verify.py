"""Verification: a theory is tried on data whose perfect denoiser is known; its curves are told as numbers.

No training, no plotting: seconds on a laptop, and lists that a page or a terminal can draw.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import Refused
from sfumato.theory import noise, oracle
from sfumato.theory.catalog import get
from sfumato.theory.convert import translate
from sfumato.theory.definition import Theory, as_float64, to_lists
from sfumato.theory.grids import grid, grids
from sfumato.theory.schedule_search import fit
from sfumato.theory.solvers.solver import evaluations, integrate, methods, solve, widest_step
from sfumato.theory.types import Denoise

SMOOTH = oracle.mixture([[0.9, -0.3], [-0.6, 0.8], [-0.2, -0.9]], 0.3)
"""Overlapping modes, on which orders show at few steps."""


@dataclass(frozen=True)
class Finding:
    """One thing that was tried: what was promised, what was found, whether that is well."""

    name: str
    ok: bool
    promised: str
    found: str


@dataclass(frozen=True)
class Verification:
    """Everything `verify` tried on a theory."""

    theory: str
    findings: list[Finding] = field(default_factory=list[Finding])

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "theory": self.theory,
            "ok": self.ok,
            "findings": [vars(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        rows = [f"{'ok ' if f.ok else 'NO '} {f.name}: {f.found} ({f.promised})" for f in self.findings]
        return "\n".join([f'Theory "{self.theory}"', *rows])


def verify(theory: Theory, samples: int = 32) -> Verification:
    """Invertible where asked, exact at the ends, change of theory, and the measured order of every solver."""
    report = theory.check()
    findings = [Finding("definitions", report.ok, "sound at every asked time", str(report).split("\n")[0])]
    if not report.ok:
        findings += [Finding("definitions", False, "sound", problem) for problem in report.problems[1:]]
        return Verification(theory.name, findings)
    x_T = noise.normal((2,), 0, range(samples), purpose="verify").double()
    wanted = SMOOTH.reference(x_T, theory)
    findings += [*_ends(theory), _changed(theory)]
    denoise = SMOOTH.denoiser(theory)
    for name, method in methods().items():
        if method.needs_noise or method.own_times or method.eta == 1:
            continue
        for order in method.orders or (None,):
            expected = method.expected_order(order or method.default_order)
            grids = [grid("two-sided", theory, n) for n in (32, 64)]
            coarse, fine = (_miss(denoise, x_T, theory, g, wanted, name, order) for g in grids)
            wide, narrow = (widest_step(theory, g, name) for g in grids)
            measured = math.log(coarse / fine) / math.log(wide / narrow) if fine > 1e-12 else math.inf
            ok = measured > expected - 0.35 or fine < 1e-9
            title = f"{name} {order}" if order else name
            findings.append(
                Finding(title, ok, f"order {expected}", f"order {measured:.2f}, error {fine:.1e} at 64")
            )
    return Verification(theory.name, findings)


def _ends(theory: Theory) -> list[Finding]:
    a, s = (float(level) for level in theory.data(as_float64(theory.t_data)))
    left = s / math.hypot(a, s)
    a, s = (float(level) for level in theory.data(as_float64(theory.t_noise)))
    kept = a / math.hypot(a, s)
    return [
        Finding("data end", left < 0.02, "no noise left, s/r < 0.02", f"s/r = {left:.2e}"),
        Finding("noise end", kept < 0.1, "no data left, a/r < 0.1", f"a/r = {kept:.2e}"),
    ]


def _changed(theory: Theory) -> Finding:
    """The theory's perfect denoiser, brought to TrigFlow, is TrigFlow's."""
    circle = get("trigflow")
    low, high = (float(theory.angle(end)) for end in (theory.t_data, theory.t_noise))
    t = torch.linspace(low + 0.05 * (high - low), high - 0.05 * (high - low), 32, dtype=torch.float64)
    x_t = circle.mix(SMOOTH.sample(32), noise.normal((2,), 1, range(32)).double(), t)
    found = translate(SMOOTH.denoiser(theory), theory, circle)(x_t, t)
    miss = float((found - SMOOTH.denoiser(circle)(x_t, t)).abs().max())
    return Finding("change of theory", miss < 1e-8, "exact to 1e-8", f"{miss:.1e}")


def _miss(
    denoise: Denoise,
    x_T: Tensor,
    theory: Theory,
    times: Tensor | int,
    wanted: Tensor,
    solver: str,
    order: int | None,
) -> float:
    found = integrate(denoise, x_T, theory, times, solver, order)
    return float((found - wanted).square().mean().sqrt())


# ---------------------------------------------------------------- curves


def trajectories(theory: Theory, samples: int = 24, steps: int = 60, seed: int = 0) -> dict[str, Any]:
    """Paths in one dimension, from noise to two modes: {"t": [steps + 1], "x": [samples][steps + 1]}."""
    data = oracle.mixture([[-1.0], [0.8]], 0.01, [0.4, 0.6])
    x_T = noise.normal((1,), seed, range(samples), purpose="trajectories").double()
    times = grid("cosine", theory, steps)
    states = [theory.mix(torch.zeros_like(x_T), x_T, theory.t_noise)]
    states += list(solve(data.denoiser(theory), x_T, theory, times, "auto"))
    return {"t": to_lists(times), "x": to_lists(torch.stack(states, 1)[..., 0])}


def errors(
    theory: Theory,
    solvers: Sequence[str] = ("auto", "euler", "heun", "dpm++", "unipc"),
    budgets: Sequence[int] = (5, 8, 10, 15, 20, 30, 50),
    data: oracle.Mixture | None = None,
    samples: int = 128,
) -> dict[str, list[float]]:
    """Endpoint error of each solver at each number of evaluations, as `trimmed_rms` measures it."""
    data = data or oracle.ring()
    x_T = noise.normal((data.dimension,), 0, range(samples), purpose="errors").double()
    wanted, denoise = data.reference(x_T, theory), data.denoiser(theory)
    return {
        name: [trimmed_rms(integrate(denoise, x_T, theory, budget, name) - wanted) for budget in budgets]
        for name in solvers
    }


def trimmed_rms(miss: Tensor, keep: float = 0.98) -> float:
    """Root mean square of a miss [B, …] over the best 98 % of samples: a few change mode and would rule."""
    each = miss.flatten(1).square().mean(1).sort()[0]
    return float(each[: max(1, round(keep * len(each)))].mean().sqrt())


def compare(
    theory: Theory, budget: int = 20, samples: int = 128, data: oracle.Mixture | None = None
) -> list[dict[str, Any]]:
    """Every solver on every grid at about `budget` evaluations, the best first.

    Rows of solver, grid, evaluations, error, seconds; a combination that cannot work has "refused" with its
    sentence instead of an error. benchmarks/theory_oracle.py sets the schedulers of diffusers beside them.
    """
    data = data or oracle.ring()
    x_T = noise.normal((data.dimension,), 0, range(samples), purpose="errors").double()
    wanted, denoise = data.reference(x_T, theory), data.denoiser(theory)
    fitted = fit(denoise, noise.normal((data.dimension,), 1, range(32), purpose="pilot").double(), theory)
    rows: list[dict[str, Any]] = []
    for name, method in methods().items():
        if method.needs_noise or method.own_times or method.eta == 1:
            continue
        steps = max(n for n in range(1, budget + 1) if n == 1 or evaluations(name, n) <= budget)
        for kind in [*(k for k in grids() if k != "custom"), "fitted"]:
            row: dict[str, Any] = {"solver": name, "grid": kind, "evaluations": evaluations(name, steps)}
            began = time.perf_counter()
            try:
                times = fitted.grid(theory, steps) if kind == "fitted" else grid(kind, theory, steps)
                row["error"] = trimmed_rms(integrate(denoise, x_T, theory, times, name) - wanted)
            except Refused as refusal:
                row["refused"] = str(refusal)
            row["seconds"] = time.perf_counter() - began
            rows.append(row)
    return sorted(rows, key=lambda row: row.get("error", math.inf))
