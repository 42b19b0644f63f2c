"""Error per network evaluation on data whose perfect denoiser is known: ours beside diffusers.

    python benchmarks/theory_oracle.py [--budgets 5,10,20] [--samples 256] [--out runs/oracle.json]

Every peer is told the exact noise level of its state and is judged against the exact flow from its own
start to its own end, so that only the solver's own error counts. Errors are root mean squares over the
best 98 % of samples, with the plain ones in brackets. Peers that are not installed are left out.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.theory import Theory, get, guidance, integrate, noise, oracle, times
from sfumato.theory.oracle import Mixture
from sfumato.theory.verify import trimmed

torch.set_num_threads(1)


@dataclass(frozen=True)
class Problem:
    """Data, and how they are asked for: with `keep`, guided by `scale` towards some of the modes."""

    name: str
    data: Mixture
    keep: tuple[int, ...] = ()
    scale: float = 1.0

    def prompted(self) -> Mixture:
        keep, data = list(self.keep), self.data
        share = data.weights[keep] / data.weights[keep].sum()
        return Mixture(data.means[keep], data.spectra[keep], data.bases[keep], share)

    def denoiser(self, theory: Theory) -> Callable[[Tensor, Tensor], Tensor]:
        plain = self.data.denoiser(theory)
        if not self.keep:
            return plain
        return guidance.classifier_free(self.prompted().denoiser(theory), plain, self.scale)

    def endpoint(self, z: Tensor, angle: float) -> Tensor:
        """The exact flow to the data, from z = x/r at an angle."""
        if not self.keep:
            return self.data.endpoint(z, angle, tolerance=1e-9)
        plain, prompted, scale = self.data, self.prompted(), self.scale

        class Guided(Mixture):
            def velocity(self, z: Tensor, angle: float) -> Tensor:
                return torch.lerp(plain.velocity(z, angle), prompted.velocity(z, angle), scale)

        return Guided(plain.means, plain.spectra, plain.bases, plain.weights).endpoint(
            z, angle, tolerance=1e-9
        )


def problems() -> list[Problem]:
    ring, wide = oracle.ring(), oracle.random_mixture(5, 64, 11, spread=0.6, least=0.0015)
    return [
        Problem("ring, 2-D 8 modes", ring),
        Problem("random, 64-D 5 modes", wide),
        Problem("random, 16-D 12 modes", oracle.random_mixture(12, 16, 21, spread=0.8)),
        Problem("sharp, 4-D 20 modes", oracle.random_mixture(20, 4, 31, spread=0.9, least=0.0002)),
        Problem("two far modes, 8-D", oracle.random_mixture(2, 8, 41, spread=1.3)),
        Problem("ring guided by 4", ring, (0, 1, 2), 4.0),
        Problem("random 16-D guided by 5", oracle.random_mixture(6, 16, 51), (0, 3), 5.0),
    ]


SETTINGS = {
    "flow, shift 1": get("flow-matching"),
    "flow, shift 3": get("flow-matching", shift=3.0),
    "VP, noise": get("ddpm-epsilon"),
    "EDM": get("edm"),
}


def peers(setting: str) -> Iterator[tuple[str, Callable[[int], object], str]]:
    """(name, scheduler of n steps, space of its states) of diffusers for a setting."""
    try:
        import diffusers
    except ImportError:
        return
    diffusers.utils.logging.set_verbosity_error()
    if setting.startswith("flow"):
        shift = float(setting[-1])
        flow = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
        yield "FlowMatchEuler", lambda n: diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), "flow"
        for order in (2, 3):
            yield (
                f"DPM++{order}M",
                lambda n, o=order: diffusers.DPMSolverMultistepScheduler(solver_order=o, **flow),
                "flow",
            )
            yield (
                f"UniPC{order}",
                lambda n, o=order: diffusers.UniPCMultistepScheduler(solver_order=o, **flow),
                "flow",
            )
        yield "FlowMatchHeun", lambda n: diffusers.FlowMatchHeunDiscreteScheduler(shift=shift), "flow"
    elif setting == "EDM":
        yield "EDMEuler", lambda n: diffusers.EDMEulerScheduler(), "edm"
        for order in (2, 3):
            yield (
                f"EDM-DPM++{order}M",
                lambda n, o=order: diffusers.EDMDPMSolverMultistepScheduler(solver_order=o),
                "edm",
            )
    else:
        vp = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
        yield "Euler", lambda n: diffusers.EulerDiscreteScheduler(**vp), "ve"
        for order in (2, 3):
            for grid in ("use_karras_sigmas", "use_lu_lambdas"):
                yield (
                    f"DPM++{order}M {grid[4:10]}",
                    lambda n, o=order, g=grid: diffusers.DPMSolverMultistepScheduler(
                        solver_order=o, **{g: True}, **vp
                    ),
                    "vp",
                )
            yield (
                f"UniPC{order} karras",
                lambda n, o=order: diffusers.UniPCMultistepScheduler(
                    solver_order=o, use_karras_sigmas=True, **vp
                ),
                "vp",
            )


def levels(space: str, value: float) -> tuple[float, float]:
    if space == "flow":
        return 1 - value, value
    r = math.hypot(1, value) if space == "vp" else 1.0
    return 1 / r, value / r


def drive(scheduler: object, space: str, problem: Problem, x_T: Tensor, budget: int) -> Tensor | None:
    """A scheduler's end minus the exact flow from its own start; None where it asks more than `budget`."""
    circle = get("trigflow")
    exact = problem.denoiser(circle)
    half = (budget + 1) // 2 if "Heun" in type(scheduler).__name__ else budget
    scheduler.set_timesteps(half)
    if len(scheduler.timesteps) > budget:
        return None
    x = start = x_T * float(getattr(scheduler, "init_noise_sigma", 1.0))
    first: tuple[float, float] | None = None
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        a, s = levels(space, float(scheduler.sigmas[scheduler.step_index or 0]))
        plain = (
            seen * math.hypot(s, 0.5)
            if space == "edm"
            else seen * math.hypot(a, s)
            if space == "ve"
            else seen
        )
        angle, r = math.atan2(s, a), math.hypot(a, s)
        v = exact(plain / r, torch.full((len(x),), angle, dtype=torch.float64))
        x_0, e = (
            math.cos(angle) * plain / r - math.sin(angle) * v,
            math.sin(angle) * plain / r + math.cos(angle) * v,
        )
        edm = (x_0 - 0.25 / (s * s + 0.25) * plain) * math.sqrt(s * s + 0.25) / (0.5 * s)
        x = scheduler.step({"flow": e - x_0, "edm": edm}.get(space, e), t, x).prev_sample
        first = first or (a, s)
    assert first is not None
    z = start / math.hypot(*first)
    return x - problem.endpoint(z, math.atan2(first[1], first[0]))


def ours(theory: Theory, problem: Problem, x_T: Tensor, wanted: Tensor, budget: int) -> dict[str, Tensor]:
    denoise = problem.denoiser(theory)
    pilot = times.fit(denoise, noise.normal(x_T.shape[1:], 99, range(32)).double(), theory)
    return {
        "sfumato auto": integrate(denoise, x_T, theory, budget) - wanted,
        "sfumato fitted": integrate(denoise, x_T, theory, pilot.grid(theory, budget)) - wanted,
    }


def run(budgets: list[int], samples: int, only: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for problem in problems():
        if only not in problem.name:
            continue
        x_T = noise.normal((problem.data.dimension,), 2024, range(samples), purpose="benchmark").double()
        for setting, theory in SETTINGS.items():
            begin = float(theory.angle(theory.t_noise))
            scale = 1.0 if setting != "EDM" else math.sin(begin)
            wanted = problem.endpoint(x_T * scale, begin)
            for budget in budgets:
                found = ours(theory, problem, x_T, wanted, budget)
                for name, make, space in peers(setting):
                    miss = drive(make(budget), space, problem, x_T, budget)
                    if miss is not None and bool(miss.isfinite().all()):
                        found[name] = miss
                errors = {k: (trimmed(m), float(m.square().mean().sqrt())) for k, m in found.items()}
                rows.append({"problem": problem.name, "setting": setting, "budget": budget, "errors": errors})
                print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, object]) -> str:
    errors: dict[str, tuple[float, float]] = row["errors"]  # type: ignore[assignment]
    rivals = {k: v for k, v in errors.items() if not k.startswith("sfumato")}
    best = min(rivals, key=lambda k: rivals[k][0]) if rivals else ""
    tell = lambda name: f"{errors[name][0]:.1e} ({errors[name][1]:.1e})"  # noqa: E731
    text = f"{row['problem']:24s} {row['setting']:14s} {row['budget']:3d}  "
    text += f"auto {tell('sfumato auto')}  fitted {tell('sfumato fitted')}"
    if best:
        text += f"  best peer {best} {tell(best)}  ratio {errors['sfumato auto'][0] / errors[best][0]:.2f}"
        text += f" {errors['sfumato fitted'][0] / errors[best][0]:.2f}"
    return text


def summary(rows: list[dict[str, object]]) -> str:
    ratios: dict[str, list[float]] = {"sfumato auto": [], "sfumato fitted": []}
    for row in rows:
        errors: dict[str, tuple[float, float]] = row["errors"]  # type: ignore[assignment]
        rivals = [v[0] for k, v in errors.items() if not k.startswith("sfumato")]
        for name in ratios if rivals else ():
            ratios[name].append(errors[name][0] / min(rivals))
    tell = []
    for name, found in ratios.items():
        found.sort()
        if found:
            won = sum(r <= 1 for r in found)
            tell.append(
                f"{name}: median ratio {found[len(found) // 2]:.2f}, "
                f"at or below the best peer in {won} of {len(found)}"
            )
    return "\n".join(tell)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--budgets", default="5,8,10,15,20,30,50")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--only", default="", help="part of a problem's name")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    rows = run([int(n) for n in args.budgets.split(",")], args.samples, args.only)
    print(summary(rows))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
