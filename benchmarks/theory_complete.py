"""Every theory on every solver on every grid: worked, refused with a sentence, or wrong, which must be none.

    python benchmarks/theory_complete.py

"Worked" means finite, and closer to the exact end at four times the steps. Beside ours, every scheduler of
diffusers with every kind of times and prediction it lists.
"""

from collections import Counter

import torch

from sfumato.errors import Refused
from sfumato.theory import Theory, get, integrate, methods, names, noise, times
from sfumato.theory.verify import SMOOTH

torch.set_num_threads(1)


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


def ours() -> Counter[str]:
    x_T = noise.normal((2,), 0, range(16)).double()
    count: Counter[str] = Counter()
    for theory in theories():
        denoise = SMOOTH.denoiser(theory)
        wanted = SMOOTH.reference(x_T, theory)
        for name, method in methods().items():
            for order in method.orders or (None,):
                for kind in (k for k in times.grids() if k != "custom"):
                    random = method.draws or method.eta == 1
                    try:
                        misses = [
                            integrate(
                                denoise,
                                x_T,
                                theory,
                                times.grid(kind, theory, n),
                                name,
                                order,
                                noise=noise.of(0),
                            )
                            - wanted
                            for n in (12, 48)
                        ]
                    except Refused:
                        count["refused"] += 1
                        continue
                    coarse, fine = (float(miss.square().mean().sqrt()) for miss in misses)
                    good = fine < 5 if random else fine < max(0.7 * coarse, 2e-3)
                    count["worked" if good else "wrong"] += 1
                    if not good:
                        print(
                            f"wrong: {theory.name}, {name} {order or ''}, {kind}: {coarse:.1e} → {fine:.1e}"
                        )
    return count


def theirs() -> Counter[str]:
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
                    scheduler = make.from_config({**make().config, "prediction_type": answer, **kind, **flow})
                    taken = all(
                        scheduler.config.get(k) == v
                        for k, v in {"prediction_type": answer, **kind, **flow}.items()
                    )
                    scheduler.set_timesteps(12)
                    x = torch.randn(4, 1, 2, 2) * float(getattr(scheduler, "init_noise_sigma", 1.0))
                    for t in scheduler.timesteps:
                        x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
                    fine = bool(x.isfinite().all())
                    count[
                        "worked"
                        if fine and taken
                        else "not finite"
                        if not fine
                        else "option dropped silently"
                    ] += 1
                except (ValueError, NotImplementedError, ImportError) as refusal:
                    count["refused"] += 1 if str(refusal) else 0
                except (IndexError, RuntimeError, AttributeError, TypeError, AssertionError):
                    count["crashed"] += 1
    return count


def main() -> None:
    found = ours()
    print("sfumato:", ", ".join(f"{k} {v}" for k, v in sorted(found.items())), "of", found.total())
    try:
        found = theirs()
        print("diffusers:", ", ".join(f"{k} {v}" for k, v in sorted(found.items())), "of", found.total())
    except ImportError:
        print("diffusers is not installed")


if __name__ == "__main__":
    main()
