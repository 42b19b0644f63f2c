"""Every theory on every solver on every grid: worked, refused with a sentence, or wrong, which must be none.

    python benchmarks/theory_complete.py [--only flow]

"Worked" means finite and converging at the promised order (or already within 1e-3 of the exact end) when 12,
48, 192 or 1536 steps are doubled; where noise is drawn, means and widths of the data. Beside ours: schedulers
of diffusers with every kind of times and prediction they may list (finite), k-diffusion and azula (nearer the
exact end of their own range at 48 steps than at 12).
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable

import torch
from theory_peers import End, load_k_diffusion
from torch import Tensor

from sfumato.errors import Refused
from sfumato.theory import Theory, get, integrate, methods, names, noise, times
from sfumato.theory.shapes import Denoise
from sfumato.theory.verify import SMOOTH

torch.set_num_threads(1)
FLOOR = 1e-3
"""Below it a grid's own first and last step, which do not shrink as the others do, hide the order."""


def theories() -> list[Theory]:
    own = Theory(
        data=lambda t: (torch.cos(t) ** 2, torch.sin(t) ** 2),
        model=lambda t: (-torch.sin(2 * t), torch.sin(2 * t)),
        t_noise=1.5,
        name="one of one's own",
    )
    return [
        *map(get, names()),
        own,
        get("flow-matching", shift=3.0),
        get("ddpm-velocity", zero_terminal_snr=True),
        get("ddpm-epsilon", zero_terminal_snr=True),
        get("ddpm-x0", betas="cosine"),
        get("ddpm-epsilon", betas="scaled-linear"),
    ]


def ours(only: str = "") -> Counter[str]:
    x_T = noise.normal((2,), 0, range(16)).double()
    many = noise.normal((2,), 1, range(256)).double()
    count: Counter[str] = Counter()
    for theory in (one for one in theories() if only in one.name):
        denoise, wanted = SMOOTH.denoiser(theory), None
        for name, method in methods().items():
            for order in method.orders or (None,):
                for kind in (k for k in times.grids() if k != "custom"):
                    try:
                        if method.draws or method.eta == 1:
                            good, said = resembles(theory, denoise, many, kind, name, order)
                        else:
                            wanted = SMOOTH.reference(x_T, theory) if wanted is None else wanted
                            good, said = converges(theory, denoise, x_T, wanted, kind, name, order)
                    except Refused:
                        count["refused"] += 1
                        continue
                    count["worked" if good else "wrong"] += 1
                    if not good:
                        print(f"wrong: {theory.name}, {name} {order or ''}, {kind}: {said}", flush=True)
        print(theory.name, dict(count), flush=True)
    return count


def converges(
    theory: Theory, denoise: Denoise, x_T: Tensor, wanted: Tensor, kind: str, name: str, order: int | None
) -> tuple[bool, str]:
    """Whether halving a step divides the error as promised, from 12 steps on or, if too few, later."""
    promise, said = methods()[name].promise(order or methods()[name].usual), ""
    for steps in (12, 48, 192, 1536):
        coarse, fine = (
            float((integrate(denoise, x_T, theory, grid, name, order) - wanted).square().mean().sqrt())
            for grid in (times.grid(kind, theory, n) for n in (steps, 2 * steps))
        )
        said = f"order {promise}: {coarse:.1e} → {fine:.1e} at {2 * steps}"
        if fine < FLOOR or math.log2(coarse / fine) > promise - 0.5:
            return True, said
    return False, said


def resembles(
    theory: Theory, denoise: Denoise, x_T: Tensor, kind: str, name: str, order: int | None
) -> tuple[bool, str]:
    """Whether what is drawn with fresh noise has the data's means and widths, at 48 steps or at 400."""
    data, said = SMOOTH.sample(4096), ""
    for steps in (48, 400):
        grid = times.grid(kind, theory, steps)
        found = integrate(denoise, x_T, theory, grid, name, order, noise=noise.of(0))
        off = float((found.mean(0) - data.mean(0)).abs().max())
        wide = float((found.std(0) / data.std(0) - 1).abs().max())
        said = f"at {steps} steps the mean is off by {off:.2f}, the width by {wide:.0%}"
        if off < 0.2 and wide < 0.2:
            return True, said
    return False, said


def judged(run: Callable[[int], End], count: Counter[str], title: str) -> None:
    """Count a peer's combination: its error at 12 and 48 steps, between its own two ends."""
    try:
        errors = []
        for steps in (12, 48):
            end = run(steps)
            start, stop = (math.atan2(s, a) for a, s in (end.start, end.end))
            exact = SMOOTH.endpoint(end.start_x.double() / math.hypot(*end.start), start, stop, 1e-7)
            errors.append(float((end.x - math.hypot(*end.end) * exact).square().mean().sqrt()))
    except Exception as crash:  # a peer may fail in any way
        count["crashed" if not isinstance(crash, ValueError) else "refused"] += 1
        return
    if not all(map(math.isfinite, errors)):
        count["not finite"] += 1
    elif errors[1] < max(0.7 * errors[0], 2e-3):
        count["worked"] += 1
    else:
        count["wrong"] += 1
        print(f"{title}: {errors[0]:.1e} → {errors[1]:.1e}", flush=True)


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


def diffusers_schedulers() -> Counter[str]:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    count: Counter[str] = Counter()
    kinds = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
    answers = ["epsilon", "sample", "v_prediction", "flow_prediction"]
    for title in ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "EulerDiscrete",  # noqa: E501
                  "HeunDiscrete", "LMSDiscrete", "DDIM", "IPNDM", "PNDM"):  # fmt: skip
        make = getattr(diffusers, f"{title}Scheduler")
        for answer in answers:
            for kind in kinds:
                flow = {"use_flow_sigmas": True} if answer == "flow_prediction" else {}
                try:
                    scheduler = make(prediction_type=answer, **kind, **flow)
                    scheduler.set_timesteps(12)
                    x = torch.randn(4, 1, 2, 2) * float(getattr(scheduler, "init_noise_sigma", 1.0))
                    for t in scheduler.timesteps:
                        x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
                    count["worked" if bool(x.isfinite().all()) else "not finite"] += 1
                except (ValueError, NotImplementedError, ImportError, TypeError):
                    count["refused"] += 1
                except (IndexError, RuntimeError, AttributeError, AssertionError):
                    count["crashed"] += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="part of a theory's name; then ours alone")
    only = parser.parse_args().only
    lines = ["| library | combinations | worked | refused | wrong | else |", "|---|---|---|---|---|---|"]
    for title, tried in (
        ("diffusers", diffusers_schedulers),
        ("k-diffusion", k_diffusion),
        ("azula", azula),
        ("sfumato", lambda: ours(only)),
    ):
        if only and title != "sfumato":
            continue
        try:
            found = tried()
        except ImportError as missing:
            print(f"left out: {title} ({missing})")
            continue
        other = ", ".join(f"{k} {v}" for k, v in found.items() if k not in ("worked", "refused", "wrong"))
        cells = [title, found.total(), found["worked"], found["refused"], found["wrong"], other or "none"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
