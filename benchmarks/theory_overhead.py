"""What a solver costs outside the network, for each evaluation, beside the schedulers of diffusers.

    python benchmarks/theory_overhead.py [--out FOLDER]

Planning included, as a user pays it; CPU time, the median of interleaved runs, so that a busy minute meets
both libraries alike.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sfumato.theory import get, integrate

torch.set_num_threads(1)
BUDGET, REPEATS = 50, 5
X_T, ANSWER = torch.randn(2, 1, 4, 128, 128).unbind()
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.0}
PAIRS: list[tuple[str, str, int | None, str, str, dict[str, Any]]] = [
    ("flow-matching", "euler", None, "FlowMatchEuler", "FlowMatchEulerDiscreteScheduler", {}),
    ("flow-matching", "heun", None, "FlowMatchHeun", "FlowMatchHeunDiscreteScheduler", {}),
    ("flow-matching", "dpm++", 2, "DPM++2M", "DPMSolverMultistepScheduler", {"solver_order": 2, **FLOW}),
    ("flow-matching", "dpm++", 3, "DPM++3M", "DPMSolverMultistepScheduler", {"solver_order": 3, **FLOW}),
    ("flow-matching", "unipc", 2, "UniPC 2", "UniPCMultistepScheduler", {"solver_order": 2, **FLOW}),
    ("flow-matching", "unipc", 3, "UniPC 3", "UniPCMultistepScheduler", {"solver_order": 3, **FLOW}),
    ("flow-matching", "deis", 2, "DEIS 2", "DEISMultistepScheduler", {"solver_order": 2, **FLOW}),
    ("flow-matching", "auto", None, "UniPC 3", "UniPCMultistepScheduler", {"solver_order": 3, **FLOW}),
    ("ddpm-epsilon", "euler", None, "DDIM", "DDIMScheduler", {"clip_sample": False}),
    ("ddpm-epsilon", "heun", None, "Heun", "HeunDiscreteScheduler", {}),
    ("ddpm-epsilon", "dpm++", 2, "DPM++2M", "DPMSolverMultistepScheduler", {"solver_order": 2}),
    ("ddpm-epsilon", "unipc", 2, "UniPC 2", "UniPCMultistepScheduler", {"solver_order": 2}),
    ("ddpm-epsilon", "multistep", 4, "PNDM", "PNDMScheduler", {"skip_prk_steps": True}),
    ("ddpm-epsilon", "auto", None, "UniPC 3", "UniPCMultistepScheduler", {"solver_order": 3}),
]


def fused() -> int:
    for _ in range(BUDGET):
        torch.add(X_T, ANSWER, alpha=0.1)
    return BUDGET


def ours(theory: str, solver: str, order: int | None) -> Callable[[], int]:
    made = get(theory)  # once, as diffusers' scheduler is
    return lambda: counted(lambda net: integrate(net, X_T, made, BUDGET, solver, order))


def theirs(title: str, options: dict[str, Any]) -> Callable[[], int]:
    import diffusers

    made, twice = getattr(diffusers, title)(**options), "Heun" in title

    def run(net: Callable[[Any, Any], torch.Tensor]) -> None:
        made.set_timesteps((BUDGET + 1) // 2 if twice else BUDGET)
        x = X_T
        for t in made.timesteps:
            x = made.step(net(made.scale_model_input(x, t), t) if twice else net(x, t), t, x).prev_sample

    def all_of_it() -> int:
        return counted(run)

    if not hasattr(made, "scale_model_input"):
        made.scale_model_input = lambda x, t: x
    return all_of_it


def counted(run: Callable[[Callable[[Any, Any], torch.Tensor]], object]) -> int:
    """How often the network was asked."""
    asked = 0

    def net(x: Any, t: Any) -> torch.Tensor:
        nonlocal asked
        asked += 1
        return ANSWER

    run(net)
    return asked


def timed(run: Callable[[], int]) -> float:
    """Microseconds of CPU an evaluation."""
    began = time.process_time()
    asked = run()
    return 1e6 * (time.process_time() - began) / asked


def measured() -> list[tuple[str, float, str, float]]:
    rows = []
    for theory, solver, order, name, title, options in PAIRS:
        both = ours(theory, solver, order), theirs(title, options)
        for run in both:
            run()
        found = list(zip(*((timed(both[0]), timed(both[1])) for _ in range(REPEATS)), strict=True))
        mine, other = (statistics.median(times) for times in found)
        rows.append((f"{solver} {order or ''} ({theory})", mine, name, other))
        print(f"{mine:6.0f} µs  {rows[-1][0]:28} {other:6.0f} µs  {name}", flush=True)
    return rows


def report(rows: list[tuple[str, float, str, float]], floor: float) -> str:
    import diffusers

    said = (__doc__ or "").split("\n\n")[2].strip()
    lines = ["| sfumato | µs | diffusers | µs | ratio |", "|---|---|---|---|---|"]
    lines += [f"| {a} | {mine:.0f} | {b} | {other:.0f} | {mine / other:.2f} |" for a, mine, b, other in rows]
    how = (
        f"Microseconds an evaluation; 4×128×128 float32, {BUDGET} evaluations, median of {REPEATS} runs, one "
        f"thread of {platform.machine()}, torch {torch.__version__}, diffusers {diffusers.__version__}. "
        f"One fused multiply-add over the latent: {floor:.0f} µs. `auto` stands beside the nearest in order."
    )
    title = "# What a solver costs outside the network"
    return "\n".join([title, "", said, "", how, "", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="a folder for theory_overhead.md")
    out = parser.parse_args().out
    floor = statistics.median(timed(fused) for _ in range(REPEATS))
    print(f"{floor:6.0f} µs  one fused multiply-add")
    rows = measured()
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "theory_overhead.md").write_text(report(rows, floor))


if __name__ == "__main__":
    main()
