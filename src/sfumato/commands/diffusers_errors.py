"""The schedulers of diffusers on the exact problem that our solvers are compared on, if installed."""

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sfumato.theory import Theory, get, noise, oracle
from sfumato.theory.verify import trimmed_rms

TABLE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def rows(theory: Theory, budget: int, samples: int = 128) -> list[dict[str, Any]]:
    """Rows as `verify.compare` gives them; none without diffusers, or where it has nothing for this path.

    Each scheduler is told the exact answer and judged by the exact flow from its own first state, so that
    neither its ends nor its rounding of times are held against it. One that ends in nan has no error.
    """
    space = _space(theory)
    if not space or importlib.util.find_spec("diffusers") is None:
        return []
    data = oracle.ring()
    x_T = noise.normal((data.dimension,), 0, range(samples), purpose="errors").double()
    found = []
    for name, grid, make in _schedulers(space, theory):
        row: dict[str, Any] = {"solver": f"diffusers {name}", "grid": grid}
        miss, count = _drive(make(budget), space, data, x_T, budget)
        row["evaluations"] = count
        if bool(miss.isfinite().all()):
            row["error"] = trimmed_rms(miss)
        else:
            row["refused"] = "it ends in nan"
        found.append(row)
    return found


def _space(theory: Theory) -> str:
    """Which of diffusers' paths the theory walks: flow, edm, vp, or none of them."""
    t = theory.t_data + (theory.t_noise - theory.t_data) * torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    a, s = theory.data(t)
    if torch.allclose(a + s, torch.ones_like(a)):
        return "flow"
    if torch.allclose(a, torch.ones_like(a)):
        return "edm"
    table = get("ddpm-epsilon")
    same = theory.t_noise == 1 and torch.allclose(theory.angle(t), table.angle(t), atol=1e-6)
    return "vp" if same else ""


def _schedulers(space: str, theory: Theory) -> Iterator[tuple[str, str, Callable[[int], Any]]]:
    kit = importlib.import_module("diffusers")
    kit.utils.logging.set_verbosity_error()
    if space == "flow":
        s = float(theory.data(torch.tensor((theory.t_noise + theory.t_data) / 2, dtype=torch.float64))[1])
        shift = s / (1 - s)
        flow = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
        yield "FlowMatchEuler", "its own", lambda n: kit.FlowMatchEulerDiscreteScheduler(shift=shift)
        yield "FlowMatchHeun", "its own", lambda n: kit.FlowMatchHeunDiscreteScheduler(shift=shift)
        for order in (2, 3):
            yield f"DPM++ {order}", "its own", _made(kit.DPMSolverMultistepScheduler, order, flow)
            yield f"UniPC {order}", "its own", _made(kit.UniPCMultistepScheduler, order, flow)
    elif space == "edm":
        yield "EDM Euler", "its own", lambda n: kit.EDMEulerScheduler()
        for order in (2, 3):
            yield f"EDM DPM++ {order}", "its own", _made(kit.EDMDPMSolverMultistepScheduler, order, {})
    else:
        for order in (2, 3):
            for grid, key in (
                ("its own", None),
                ("karras", "use_karras_sigmas"),
                ("log-snr", "use_lu_lambdas"),
            ):
                how = TABLE | ({key: True} if key else {})
                yield f"DPM++ {order}", grid, _made(kit.DPMSolverMultistepScheduler, order, how)
            yield (
                f"UniPC {order}",
                "karras",
                _made(kit.UniPCMultistepScheduler, order, {**TABLE, "use_karras_sigmas": True}),
            )


def _made(kind: Any, order: int, how: dict[str, Any]) -> Callable[[int], Any]:
    return lambda n: kind(solver_order=order, **how)


def _levels(space: str, value: float) -> tuple[float, float]:
    """(a, s) behind a scheduler's sigma."""
    if space == "flow":
        return 1 - value, value
    r = math.hypot(1, value) if space == "vp" else 1.0
    return 1 / r, value / r


def _drive(scheduler: Any, space: str, data: oracle.Mixture, x_T: Tensor, budget: int) -> tuple[Tensor, int]:
    """A scheduler's end minus the exact flow from its own start, and how often it asked."""
    scheduler.set_timesteps((budget + 1) // 2 if "Heun" in type(scheduler).__name__ else budget)
    x = start = x_T * float(getattr(scheduler, "init_noise_sigma", 1.0))
    first: tuple[float, float] | None = None
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        a, s = _levels(space, float(scheduler.sigmas[scheduler.step_index or 0]))
        plain = scaled * math.hypot(s, 0.5) if space == "edm" else scaled
        angle, r = math.atan2(s, a), math.hypot(a, s)
        v = data.velocity(plain / r, angle)
        x_0 = math.cos(angle) * plain / r - math.sin(angle) * v
        e = math.sin(angle) * plain / r + math.cos(angle) * v
        edm = (x_0 - 0.25 / (s * s + 0.25) * plain) * math.sqrt(s * s + 0.25) / (0.5 * s) if s else x_0
        x = scheduler.step({"flow": e - x_0, "edm": edm}.get(space, e), t, x).prev_sample
        first = first or (a, s)
    assert first is not None
    wanted = data.endpoint(start / math.hypot(*first), math.atan2(first[1], first[0]))
    return x - wanted, len(scheduler.timesteps)
