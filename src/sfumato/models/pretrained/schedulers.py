"""From a diffusers scheduler's config to our words: a theory, the times to sample at, a solver.

A discrete scheduler's step n of N sits at t = (n + 1)/N; a flow scheduler's σ is t itself.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import Refused, nearest
from sfumato.theory import Theory, get
from sfumato.theory.types import Denoise

CLOCKS = {
    "thousandths": lambda t: 1000 * t,
    "share of noise": lambda t: t,
    "share of signal": lambda t: 1 - t,
    "thousandths of signal": lambda t: 1000 * (1 - t),
}
"""What flow networks are told about a time t, the share of noise."""

ANSWERS = {"epsilon": "ddpm-epsilon", "v_prediction": "ddpm-velocity", "sample": "ddpm-x0"}
SOLVERS = {
    "DDPMScheduler": "ancestral",
    "EulerAncestralDiscreteScheduler": "ancestral",
    "KDPM2AncestralDiscreteScheduler": "ancestral",
    "KDPM2DiscreteScheduler": "midpoint",
    "LCMScheduler": "ancestral",
    "TCDScheduler": "ancestral",
    "CogVideoXDPMScheduler": "sde-multistep",
    "DPMSolverSDEScheduler": "sde-multistep",
    "HeunDiscreteScheduler": "heun",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpm++",
    "DPMSolverSinglestepScheduler": "dpm++",
    "DEISMultistepScheduler": "deis",
    "UniPCMultistepScheduler": "unipc",
    "PNDMScheduler": "multistep",
    "LMSDiscreteScheduler": "multistep",
}
"""Our solver for a scheduler at times of one's own; where none is named, it takes first-order steps: euler.
Exact for first-order and ancestral ones; multistep ones share order and idea, and integrate exactly in φ."""


def solver_of(scheduler: Any) -> tuple[str, int | None]:
    """(our solver, its order or None for the usual) for a scheduler as it is configured."""
    config = scheduler.config
    name = SOLVERS.get(type(scheduler).__name__, "euler")
    if str(config.get("algorithm_type", "")).startswith("sde") or config.get("stochastic_sampling"):
        name = "sde-multistep" if name == "dpm++" else "ancestral"
    order = config.get("solver_order")
    if order == 1 and name in ("dpm++", "deis", "unipc"):
        return "euler", None
    return name, order if name in ("dpm++", "deis", "unipc", "sde-multistep") else None


def init_noise_sigma(scheduler: Any, steps: int) -> float:
    """What unit noise is multiplied by before the first step, seen without the scheduler's own scaling.

    Schedulers that count in σ = s/a start at σ, some at √(1 + σ²); the others take unit noise as it is.
    """
    if is_flow(scheduler) or not hasattr(scheduler, "sigmas"):
        return 1.0
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    first = float(getattr(scheduler, "init_noise_sigma", 1.0))
    return 1.0 if first == 1.0 else first / (1 + float(scheduler.sigmas.max()) ** 2) ** 0.5


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler walks a straight line from data to noise."""
    config = scheduler.config
    flows = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(flows) or type(scheduler).__name__.startswith("FlowMatch")


def flow_theory(clock: str, sign: int = 1) -> Theory:
    """x_t = (1 − t)·x_0 + t·x_T, answered with sign·(x_T − x_0); `clock` is one of CLOCKS."""
    return Theory(
        data=lambda t: (1 - t, t),
        model=lambda t: (-sign * torch.ones_like(t), sign * torch.ones_like(t)),
        name="flow-matching" if sign > 0 else "flow-matching, towards the data",
        clock=CLOCKS[clock],
    )


def table_theory(scheduler: Any) -> Theory:
    """The discrete theory of a scheduler's table of betas and prediction type.

    Raises:
        Refused: a scheduler that has no such table, or an answer that is not known.
    """
    config = scheduler.config
    if not hasattr(scheduler, "alphas_cumprod"):
        raise Refused(
            f"The scheduler {type(scheduler).__name__} has no table of betas, which this network was trained "
            "with. Put the scheduler_config.json of the original model (DDIM, Euler, DPM++, …) in scheduler/."
        )
    answer = config.get("prediction_type", "epsilon")
    if answer not in ANSWERS:
        raise Refused(f'The scheduler\'s prediction_type "{answer}" is not known.{nearest(answer, ANSWERS)}')
    kept = scheduler.alphas_cumprod.double()
    if config.get("rescale_betas_zero_snr"):
        kept[-1] = 0  # some schedulers write a tiny number there
    return get(ANSWERS[answer], betas=1 - kept / torch.cat([kept.new_ones(1), kept[:-1]]))


def with_table(scheduler: Any, said: Mapping[str, Any]) -> Any:
    """The scheduler with what a model's file says of its theory, its table rescaled where that is asked.

    Some classes (PNDM, LMS, Heun, …) do not know `rescale_betas_zero_snr` and keep the table as it was;
    theirs is rescaled here, as diffusers does for those that know it: the last ᾱ is 2⁻²⁴, which divides.

    Source: Lin et al. 2023, arXiv:2305.08891, algorithm 1.
    """
    config = scheduler.config
    if config.get("rescale_betas_zero_snr") and said.get("rescale_betas_zero_snr"):
        said = {name: value for name, value in said.items() if name != "timestep_spacing"}
    if any(config.get(name) != value for name, value in said.items()):
        scheduler = type(scheduler).from_config(config, **said)
        scheduler.register_to_config(**said)  # also what this class does not know
    known = inspect.signature(type(scheduler).__init__).parameters
    if not scheduler.config.get("rescale_betas_zero_snr") or "rescale_betas_zero_snr" in known:
        return scheduler
    root = scheduler.alphas_cumprod.double().sqrt()
    kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    kept[-1] = 2.0**-24
    scheduler.alphas_cumprod = kept.to(scheduler.alphas_cumprod.dtype)
    scheduler.alphas = (kept / torch.cat([kept.new_ones(1), kept[:-1]])).to(scheduler.alphas_cumprod.dtype)
    scheduler.betas = 1 - scheduler.alphas
    for name, value in (("alpha_t", kept.sqrt()), ("sigma_t", (1 - kept).sqrt())):
        if hasattr(scheduler, name):
            setattr(scheduler, name, value.to(scheduler.alphas_cumprod.dtype))
    if hasattr(scheduler, "lambda_t"):
        scheduler.lambda_t = torch.log(scheduler.alpha_t) - torch.log(scheduler.sigma_t)
    return scheduler


def line_of_sigmas(steps: int) -> list[float]:
    """Shares of noise 1 … 1/steps, evenly spaced, before any shift."""
    return torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()


def shift_by_tokens(config: Mapping[str, Any], tokens: int, most: float = 1.15) -> float:
    """μ, the logarithm of the shift: a line in the number of tokens.

    Source: the pipelines' `calculate_shift`, after Esser et al. 2024, arXiv:2403.03206, section 5.3.2.
    """
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", most)
    return low + (tokens - few) * (high - low) / (many - few)


def prepared(scheduler: Any, steps: int, sigmas: Sequence[float] | None, mu: float | None) -> Any:
    """A copy of the scheduler, ready for so many steps.

    Args:
        sigmas: shares of noise the pipeline hands over before the shift; None leaves them to the scheduler.
        mu: the shift for this picture, where the scheduler shifts by picture.
    """
    scheduler = copy.deepcopy(scheduler)
    if steps == 1 and scheduler.config.get("shift_terminal"):  # one step ends at the data, not before it
        scheduler = type(scheduler).from_config(scheduler.config, shift_terminal=None)
    given: dict[str, Any] = {}
    if mu is not None and scheduler.config.get("use_dynamic_shifting"):
        given["mu"] = mu
    if sigmas is not None and type(scheduler).__name__.startswith("FlowMatchEuler"):
        given["sigmas"] = list(sigmas)
    else:
        given["num_inference_steps"] = steps
    scheduler.set_timesteps(**given)
    return scheduler


def times_of(scheduler: Any) -> Tensor:
    """The grid [steps + 1] that a prepared scheduler walks, in the theory's time, falling."""
    if is_flow(scheduler):
        noise = torch.as_tensor(scheduler.sigmas).double()
        noise = 1 - noise if scheduler.config.get("invert_sigmas") else noise
        return torch.unique_consecutive(noise)
    steps = torch.unique_consecutive(torch.as_tensor(scheduler.timesteps).double())
    count = scheduler.config.num_train_timesteps
    return torch.cat([(steps + 1) / count, steps.new_tensor([end_of(scheduler) / count])])


def steps_as_we_do(scheduler: Any, steps: int) -> bool:
    """Whether our solver takes the very steps of this scheduler.

    First-order ones do, unless they clip or step to other times than they ask next. Of those that draw noise
    ours is the same law, but draws its own.
    """
    name, _ = solver_of(scheduler)
    config, kind = scheduler.config, type(scheduler).__name__
    if name in ("ancestral", "sde-multistep") or kind == "FlowMatchEulerDiscreteScheduler":
        return True
    if name != "euler" or config.get("clip_sample") or config.get("thresholding"):
        return False
    if kind in ("DDIMScheduler", "CogVideoXDDIMScheduler"):
        even = config.num_train_timesteps % steps == 0
        return even or config.get("timestep_spacing") == "leading"
    return kind == "EulerDiscreteScheduler" and not config.get("rescale_betas_zero_snr")


def states(denoise: Denoise, noise: Tensor, scheduler: Any, sign: int = 1) -> Iterator[Tensor]:
    """The states of a prepared scheduler that steps itself, from unit noise, one for each step asked for.

    Args:
        denoise: (x_t, t [B]) → answer, in the theory's time. sign: of the answer, towards the noise or not.
    """
    count, evaluations = scheduler.num_inference_steps, len(scheduler.timesteps)
    seen = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
    x = noise * torch.as_tensor(getattr(scheduler, "init_noise_sigma", 1.0)).to(noise)
    total, first = scheduler.config.num_train_timesteps, 0 if is_flow(scheduler) else 1
    for place, timestep in enumerate(scheduler.timesteps):
        t = torch.full((len(x),), (float(timestep) + first) / total, dtype=torch.float64, device=x.device)
        out = sign * denoise(seen(x, timestep), t)
        x = scheduler.step(out, timestep, x, return_dict=False)[0]
        if (place + 1) * count // evaluations > place * count // evaluations:
            yield x


def end_of(scheduler: Any) -> int:
    """The step after the last, counted from the data: 0 is the data itself, 1 the first trained step."""
    config = scheduler.config
    stays = config.get("final_sigmas_type") == "sigma_min" or config.get("set_alpha_to_one") is False
    return int(bool(stays))
