"""What a solver step costs outside the network: a 4×128×128 latent on the CPU, beside diffusers.

python benchmarks/theory_overhead.py
"""

import statistics
import time

import torch

from sfumato.theory import get, integrate

torch.set_num_threads(1)
STEPS = 50


def microseconds(run, repeats: int = 15) -> float:
    """CPU time per step, planning and all: the median of several runs."""
    return 1e6 * statistics.median(timed(run) for _ in range(repeats)) / STEPS


def timed(run) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def fused(x: torch.Tensor, answer: torch.Tensor) -> None:
    for _ in range(STEPS):
        torch.add(x, answer, alpha=0.1)


def main() -> None:
    x_T = torch.randn(1, 4, 128, 128)
    answer = torch.randn(1, 4, 128, 128)
    rows = [
        (
            "one fused multiply-add",
            microseconds(lambda: fused(x_T, answer)),
        )
    ]
    for name in ("flow-matching", "ddpm-epsilon"):
        theory = get(name)
        for solver, order in (("euler", None), ("multistep", 2), ("dpm++", 2), ("unipc", 3), ("auto", None)):
            rows.append((
                f"sfumato {solver} {order or ''} ({name})",
                microseconds(
                    lambda t=theory, s=solver, o=order: integrate(lambda x, t: answer, x_T, t, STEPS, s, o)
                ),
            ))  # fmt: skip
    try:
        import diffusers
    except ImportError:
        diffusers = None
    if diffusers is not None:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        for title, scheduler in (
            ("FlowMatchEuler", diffusers.FlowMatchEulerDiscreteScheduler()),
            ("DDIM", diffusers.DDIMScheduler(clip_sample=False)),
            ("DPM++2M flow", diffusers.DPMSolverMultistepScheduler(solver_order=2, **flow)),
            ("UniPC3 flow", diffusers.UniPCMultistepScheduler(solver_order=3, **flow)),
        ):

            def run(scheduler=scheduler) -> None:
                scheduler.set_timesteps(STEPS)
                x = x_T
                for t in scheduler.timesteps:
                    x = scheduler.step(answer, t, x).prev_sample

            rows.append((f"diffusers {title}", microseconds(run)))
    for name, cost in rows:
        print(f"{cost:8.0f} µs a step  {name}")


if __name__ == "__main__":
    main()
