"""Released solvers, each run as its users run it, on data whose perfect denoiser is known.

A peer is handed unit noise and a budget of network evaluations and hands back its end, with the (a, s) it
started and ended at, so that it is judged against the exact flow between its own two ends. It is told the
exact noise level of every state. Libraries that are not installed are left out.
"""

import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Level = tuple[float, float]
Posterior = Callable[[Tensor, float, float], tuple[Tensor, Tensor]]
"""(x, a, s) → (E[x_0 | x], E[x_T | x])"""
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
RATIOS = ((1 / torch.cumprod(1 - BETAS, 0)) - 1).sqrt()
"""s/a of the 1000 steps of DDPM's linear betas."""


@dataclass(frozen=True)
class End:
    """Where a peer came from and where it got to."""

    x: Tensor
    start_x: Tensor
    start: Level
    end: Level


Run = Callable[[Posterior, Tensor, int], End | None]
"""(posterior, unit noise, budget) → its end, or None where the budget does not suffice."""


def peers(setting: str) -> Iterator[tuple[str, Run]]:
    """(name, run) of every installed peer for "flow 1", "flow 3", "VP" or "EDM"."""
    for library in (_diffusers, _k_diffusion, _azula, _flow_matching):
        try:
            yield from library(setting)
        except ImportError as missing:
            print(f"left out: {library.__name__[1:]} ({missing})", file=sys.stderr)


def path(setting: str, steps: int) -> list[Level]:
    """The customary grid of a setting, `steps` steps ending at s = 0."""
    i = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if setting.startswith("flow"):
        shift = float(setting[-1])
        s = shift * (1 - i) / (1 + (shift - 1) * (1 - i))
        return [(1 - v, v) for v in s.tolist()]
    if setting == "VP":
        at = (999 * (1 - i[:-1])).tolist()
        return [*(_vp(_ratio(t)) for t in at), (1.0, 0.0)]
    ramp = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), steps, dtype=torch.float64) ** 7
    return [*((1.0, v) for v in ramp.tolist()), (1.0, 0.0)]


def _ratio(t: float) -> float:
    low = min(int(t), 998)
    logs = RATIOS[low : low + 2].log().tolist()
    return math.exp(logs[0] + (t - low) * (logs[1] - logs[0]))


def _vp(ratio: float) -> Level:
    r = math.hypot(1.0, ratio)
    return 1 / r, ratio / r


# ---------------------------------------------------------------- diffusers


def _diffusers(setting: str) -> Iterator[tuple[str, Run]]:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    if setting.startswith("flow"):
        shift = float(setting[-1])
        flow = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
        make: dict[str, Callable[[], Any]] = {
            "FlowMatchEuler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
            "FlowMatchHeun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=shift),
        }
        for order in (2, 3):
            make[f"DPM++{order}M"] = lambda o=order: diffusers.DPMSolverMultistepScheduler(
                solver_order=o, **flow
            )
            make[f"UniPC{order}"] = lambda o=order: diffusers.UniPCMultistepScheduler(solver_order=o, **flow)
        space = "flow"
    elif setting == "EDM":
        make = {"EDMEuler": diffusers.EDMEulerScheduler}
        for order in (2, 3):
            make[f"EDM-DPM++{order}M"] = lambda o=order: diffusers.EDMDPMSolverMultistepScheduler(
                solver_order=o
            )
        space = "edm"
    else:
        vp = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
        make = {}
        for order in (2, 3):
            for kind in ("use_karras_sigmas", "use_lu_lambdas"):
                make[f"DPM++{order}M {kind.split('_')[1]}"] = lambda o=order, k=kind: (
                    diffusers.DPMSolverMultistepScheduler(solver_order=o, **{k: True}, **vp)
                )
            make[f"UniPC{order} karras"] = lambda o=order: diffusers.UniPCMultistepScheduler(
                solver_order=o, use_karras_sigmas=True, **vp
            )
            make[f"UniPC{order}"] = lambda o=order: diffusers.UniPCMultistepScheduler(solver_order=o, **vp)
        space = "vp"
    for name, one in make.items():
        yield f"diffusers {name}", _scheduler(one, space, "Heun" in name)


def _scheduler(make: Callable[[], Any], space: str, twice: bool) -> Run:
    def run(posterior: Posterior, noise: Tensor, budget: int) -> End | None:
        scheduler = make()
        scheduler.set_timesteps((budget + 1) // 2 if twice else budget)
        if len(scheduler.timesteps) > budget:
            return None
        x = start = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
        first: Level | None = None
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            a, s = _level(space, float(scheduler.sigmas[scheduler.step_index or 0]))
            plain = seen * math.hypot(s, 0.5) if space == "edm" else seen
            x_0, e = posterior(plain.double(), a, s)
            out = {"flow": e - x_0, "vp": e}.get(space)
            if out is None:
                out = (x_0 - 0.25 / (s * s + 0.25) * plain) * math.sqrt(s * s + 0.25) / (0.5 * s)
            x = scheduler.step(out.to(x.dtype), t, x).prev_sample
            first = first or (a, s)
        assert first is not None
        return End(x, start, first, _level(space, float(scheduler.sigmas[-1])))

    return run


def _level(space: str, value: float) -> Level:
    return (1 - value, value) if space == "flow" else _vp(value) if space == "vp" else (1.0, value)


# ---------------------------------------------------------------- k-diffusion


def load_k_diffusion() -> None:
    """Import its samplers without the rest of it."""
    if "k_diffusion" not in sys.modules:  # its __init__ imports far more than its samplers need
        found = importlib.util.find_spec("k_diffusion")
        if found is None:
            raise ImportError("not installed")
        package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
        package.__path__ = list(found.submodule_search_locations or [])
        utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]
        package.utils = utils
        sys.modules.update({"k_diffusion": package, "k_diffusion.utils": utils})


def _k_diffusion(setting: str) -> Iterator[tuple[str, Run]]:
    load_k_diffusion()
    import k_diffusion.sampling as K

    still: dict[str, Any] = {"eta": 0.0, "noise_sampler": lambda *_: 0.0}
    table = {
        "heun": (K.sample_heun, {}, 2),
        "lms4": (K.sample_lms, {}, 1),
        "dpmpp_2m": (K.sample_dpmpp_2m, {}, 1),
        "dpmpp_2m_sde heun": (K.sample_dpmpp_2m_sde, {**still, "solver_type": "heun"}, 1),
        "dpmpp_3m_sde": (K.sample_dpmpp_3m_sde, still, 1),
    }
    for name, (sample, options, stages) in table.items():
        yield f"k-diffusion {name}", _k_run(setting, sample, options, stages)


def _k_run(setting: str, sample: Callable[..., Tensor], options: dict[str, Any], stages: int) -> Run:
    flow = setting.startswith("flow")

    def run(posterior: Posterior, noise: Tensor, budget: int) -> End | None:
        levels = path(setting, budget if stages == 1 else (budget + 1) // 2)
        sigmas = torch.tensor([s if flow else s / a for a, s in levels], dtype=torch.float64)
        to = (lambda v: (1 - v, v)) if flow else (lambda v: (1.0, v))
        top = float(sigmas[0])
        x = noise * (top if setting != "VP" else math.hypot(1.0, top))
        end = sample(lambda x, s: posterior(x, *to(float(s[0])))[0], x, sigmas, disable=True, **options)
        return End(end, x, to(top), to(0.0))

    return run


# ---------------------------------------------------------------- azula


def _azula(setting: str) -> Iterator[tuple[str, Run]]:
    import azula.noise
    import azula.sample
    from azula.denoise import Denoiser, DiracPosterior

    class Schedule(azula.noise.Schedule):
        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            t = t.double()
            if setting.startswith("flow"):  # its RectifiedSchedule, shifted
                shift = float(setting[-1])
                u = shift * t / (1 + (shift - 1) * t)
                return u * 1e-3 + (1 - u), u + (1 - u) * 1e-3
            if setting == "VP":
                levels = [_vp(_ratio(999 * float(one))) for one in t.reshape(-1)]
                a, s = torch.tensor(levels, dtype=torch.float64).T.reshape(2, *t.shape)
                return a, s
            low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
            return torch.ones_like(t), (low + t * (high - low)) ** 7

    class Known(Denoiser):
        def __init__(self, posterior: Posterior, schedule: Schedule) -> None:
            super().__init__()
            self.posterior, self.schedule = posterior, schedule

        def forward(self, x: Tensor, t: Tensor, **_: Any) -> Any:
            return DiracPosterior(mean=self.posterior(x, *map(float, self.schedule(t)))[0])

    def with_sampler(make: Callable[..., Any]) -> Run:
        def run(posterior: Posterior, noise: Tensor, budget: int) -> End | None:
            schedule = Schedule()
            sampler = make(Known(posterior, schedule), steps=budget, silent=True, dtype=torch.float64)
            ends = torch.ones(()), torch.zeros(())
            start, end = (tuple(map(float, schedule(t))) for t in ends)
            x = noise * (1.0 if setting == "VP" else start[1])
            return End(sampler(x), x, start, end)

        return run

    for order in (2, 3, 4):
        for kind in ("zAB", "vAB", "zEAB", "xEAB"):
            made = getattr(azula.sample, f"{kind}Sampler")
            yield (
                f"azula {kind}{order}",
                with_sampler(lambda net, o=order, m=made, **how: m(net, order=o, **how)),
            )


# ---------------------------------------------------------------- flow_matching


def _flow_matching(setting: str) -> Iterator[tuple[str, Run]]:
    if not setting.startswith("flow"):
        return
    from flow_matching.solver import ODESolver

    shift = float(setting[-1])
    for name, method, stages in (("midpoint", "midpoint", 2), ("heun3", "heun3", 3), ("rk4", "rk4", 4)):

        def run(
            posterior: Posterior, noise: Tensor, budget: int, m: str = method, k: int = stages
        ) -> End | None:
            if budget < k:
                return None
            s = torch.linspace(1, 0, budget // k + 1, dtype=torch.float64)
            times = 1 - shift * s / (1 + (shift - 1) * s)

            def velocity(x: Tensor, t: Tensor, **_: Any) -> Tensor:
                x_0, e = posterior(x, float(t), 1 - float(t))
                return x_0 - e

            x = ODESolver(velocity).sample(noise, step_size=None, method=m, time_grid=times)
            return End(x, noise, (0.0, 1.0), (1.0, 0.0))

        yield f"flow_matching {name}", run
