"""Released libraries' own combinations of schedule, answer, times and solver: which work, which do not.

A combination is run at 12 and 48 steps on data whose perfect denoiser is known and judged against the exact
flow between its own two ends. It is told the exact level of every state. "Worked" is finite and an error that
falls to 0.7 of itself or below 2e-3; where it does not, once more from 48 to 192: less than is asked of ours.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from theory_peers import End, load_k_diffusion

from sfumato.theory import noise
from sfumato.theory.verify import SMOOTH


def judged(run: Callable[[int], End], count: Counter[str], title: str) -> None:
    """Count a combination: its error at 12 and 48 steps, and 192 where that says nothing yet."""
    errors: list[float] = []
    for steps in (12, 48, 192):
        try:
            end = run(steps)
        except Exception as crash:  # a peer may fail in any way
            said = isinstance(crash, ValueError | TypeError | NotImplementedError | ImportError)
            count["refused" if said else "crashed"] += 1
            return
        start, stop = (math.atan2(s, a) for a, s in (end.start, end.end))
        exact = SMOOTH.endpoint(end.start_x.double() / math.hypot(*end.start), start, stop, 1e-7)
        errors.append(float((end.x - math.hypot(*end.end) * exact).square().mean().sqrt()))
        if not math.isfinite(errors[-1]):
            count["not finite"] += 1
            return
        if len(errors) > 1 and errors[-1] < max(0.7 * errors[-2], 2e-3):
            count["worked"] += 1
            return
    count["wrong"] += 1
    print(f"{title}: {', '.join(f'{error:.1e}' for error in errors)}", flush=True)


def k_diffusion() -> Counter[str]:
    load_k_diffusion()
    import k_diffusion.sampling as K

    x = noise.normal((2,), 0, range(16)).double()
    still = {"eta": 0.0, "noise_sampler": lambda *_: 0.0}
    samplers = {
        K.sample_euler: {}, K.sample_heun: {}, K.sample_dpm_2: {}, K.sample_lms: {}, K.sample_dpmpp_2m: {},
        K.sample_dpmpp_2s_ancestral: still, K.sample_dpmpp_2m_sde: still, K.sample_dpmpp_3m_sde: still,
    }  # fmt: skip
    grids = {
        "karras": lambda n: K.get_sigmas_karras(n, 0.002, 80),
        "exponential": lambda n: K.get_sigmas_exponential(n, 0.002, 80),
        "polyexponential": lambda n: K.get_sigmas_polyexponential(n, 0.002, 80),
        "vp": lambda n: K.get_sigmas_vp(n),
    }
    count: Counter[str] = Counter()
    for sample, options in samplers.items():
        for name, grid in grids.items():

            def run(steps: int, s=sample, o=options, g=grid) -> End:
                sigmas = g(steps).double()
                start = x * sigmas[0]
                net = lambda x, v: SMOOTH.posterior(x, torch.tensor(1.0).double(), v[0].double())[0]  # noqa: E731
                end = s(net, start, sigmas, disable=True, **o)
                return End(end, start, (1.0, float(sigmas[0])), (1.0, float(sigmas[-1])))

            judged(run, count, f"k-diffusion {sample.__name__}, {name}")
    return count


def azula() -> Counter[str]:
    import azula.noise as N
    import azula.sample as S
    from azula.denoise import Denoiser, DiracPosterior

    x = noise.normal((2,), 0, range(16)).double()

    class Known(Denoiser):
        def __init__(self, schedule: object) -> None:
            super().__init__()
            self.schedule = schedule

        def forward(self, x: torch.Tensor, t: torch.Tensor, **_: object) -> object:
            a, s = self.schedule(t)
            return DiracPosterior(mean=SMOOTH.posterior(x, a.double(), s.double())[0])

    count: Counter[str] = Counter()
    schedules = ["VPSchedule", "VESchedule", "CosineSchedule", "RectifiedSchedule", "DecaySchedule"]
    names_ = ["DDIM", "Euler", "Heun", *(f"{k}AB" for k in ("z", "v", "zE", "xE", "RE"))]
    for schedule in (s for s in schedules if hasattr(N, s)):
        for name in names_:
            for order in (2, 3, 4) if name.endswith("AB") else (None,):

                def run(steps: int, c=schedule, k=name, o=order) -> End:
                    made = getattr(N, c)()
                    how = {"eta": 0.0} if k == "DDIM" else {"order": o} if o else {}
                    sampler = getattr(S, f"{k}Sampler")(
                        Known(made), steps=steps, silent=True, dtype=torch.float64, **how
                    )
                    start, end = (
                        tuple(map(float, made(t)))
                        for t in (torch.ones(()).double(), torch.zeros(()).double())
                    )
                    begun = x * math.hypot(*start)
                    return End(sampler(begun), begun, start, end)

                judged(run, count, f"azula {name}{order or ''}, {schedule}")
    return count


ANSWERS: dict[str, Callable[..., Any]] = {
    "epsilon": lambda x_0, e, a, s: e,
    "sample": lambda x_0, e, a, s: x_0,
    "v_prediction": lambda x_0, e, a, s: a * e - s * x_0,
    "flow_prediction": lambda x_0, e, a, s: e - x_0,
}
TIMES = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})
SCHEDULERS = (
    "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "EulerDiscrete",
    "HeunDiscrete", "LMSDiscrete", "DDIM", "PNDM",
)  # fmt: skip


def diffusers_schedulers() -> Counter[str]:
    """Nine schedulers × four answers × four kinds of times, each with its defaults otherwise."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    count: Counter[str] = Counter()
    x = noise.normal((2,), 0, range(16)).double()
    for title in SCHEDULERS:
        for answer, kind in ((a, k) for a in ANSWERS for k in TIMES):
            flow = {"use_flow_sigmas": True} if answer == "flow_prediction" else {}

            def run(steps: int, t=title, a=answer, k=kind, f=flow) -> End:
                still = {"clip_sample": False} if t == "DDIM" else {}
                make = getattr(diffusers, f"{t}Scheduler")
                made = make(prediction_type=a, **k, **f, **still)
                made.set_timesteps(steps)
                return _scheduled(made, x, ANSWERS[a], bool(f))

            judged(run, count, f"diffusers {title}, {answer}, {' '.join(kind) or 'own times'}")
    return count


def _scheduled(made: Any, x: torch.Tensor, answer: Callable[..., Any], flow: bool) -> End:
    """A scheduler's own loop; ratios s/a where it keeps sigmas, ᾱ by the time where it does not."""
    whole = (
        "scale_model_input" in type(made).__dict__ and "Discrete" in type(made).__name__
    )  # states x_0 + σ·ε
    x = start_x = x * float(getattr(made, "init_noise_sigma", 1.0))
    levels: list[tuple[float, float]] = []
    for t in made.timesteps:
        seen = made.scale_model_input(x, t)
        a, s = _level(made, t, flow)
        x_0, e = SMOOTH.posterior(seen.double(), torch.tensor(a).double(), torch.tensor(s).double())
        x = made.step(answer(x_0, e, a, s), t, x).prev_sample
        levels.append((a, s))
    first, end = levels[0], _end(made, flow)
    if whole:
        first, end = ((1.0, s / a) for a, s in (first, end))
    return End(x, start_x, first, end)


def _level(made: Any, t: Any, flow: bool) -> tuple[float, float]:
    if hasattr(made, "sigmas"):
        return _of_ratio(float(made.sigmas[made.step_index or 0]), flow)
    return _of_kept(float(made.alphas_cumprod[int(t)]))


def _end(made: Any, flow: bool) -> tuple[float, float]:
    if hasattr(made, "sigmas"):
        return _of_ratio(float(made.sigmas[-1]), flow)
    return _of_kept(float(made.final_alpha_cumprod))


def _of_kept(kept: float) -> tuple[float, float]:
    return math.sqrt(kept), math.sqrt(1 - kept)


def _of_ratio(sigma: float, flow: bool) -> tuple[float, float]:
    r = math.hypot(1.0, sigma)
    return (1 - sigma, sigma) if flow else (1 / r, sigma / r)
