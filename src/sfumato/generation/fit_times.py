"""Fitting sampling times to a model: it is asked for a few dozen pictures that nobody looks at."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.generation.pipeline import DEFAULT_GUIDANCE, Pipeline, SamplingSchedule, parse_requests
from sfumato.theory import integrate
from sfumato.theory.schedule_search import FINE, FittedGrid, cost, fit
from sfumato.theory.verify import trimmed_rms


@dataclass(frozen=True)
class Fitted:
    """Fitted times, and what they are worth on noise they were not fitted to.

    `errors`: evaluations → (distance from a fine run at the default times, at the fitted ones).
    """

    pilot: FittedGrid
    errors: dict[int, tuple[float, float]]

    @property
    def helps(self) -> bool:
        """Whether the fitted times are nearer, in the geometric mean over the evaluations."""
        return sum(math.log(after / before) for before, after in self.errors.values()) < 0


def fit_times(
    model: Pipeline,
    prompts: Sequence[str],
    samples: int = 32,
    seed: int = 0,
    guidance: float | None = None,
    budgets: Sequence[int] = (5, 8, 16),
    batch: int = 32,
    watch: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Fit times to a model at a guidance, and judge them on as many other pictures.

    Args:
        prompts: what the pilot's pictures show, in turn; [""] for a model without prompts.
        samples: pictures of the pilot. batch: how many of them the network is asked for at once.
        watch: called with (evaluations done, in all).
    """
    guidance = float(model.info.get("guidance", DEFAULT_GUIDANCE)) if guidance is None else guidance
    total = cost(budgets) + FINE + 2 * sum(budgets)
    asked = [prompts[i % len(prompts)] for i in range(samples)]
    pilot_x, pilot_net = _asked(model, asked, seed, guidance, batch)
    pilot = fit(pilot_net, pilot_x, model.theory, budgets, watch=lambda done, _: watch and watch(done, total))
    x, net = _asked(model, asked, seed + 1_000_003, guidance, batch)
    errors = {}
    with torch.no_grad():
        exact = integrate(net, x, model.theory, FINE).double()
        for n in budgets:
            runs = (integrate(net, x, model.theory, times) for times in (n, pilot.grid(model.theory, n)))
            before, after = (max(trimmed_rms(run.double() - exact), 1e-12) for run in runs)
            errors[n] = (before, after)
    if watch is not None:
        watch(total, total)
    return Fitted(pilot, errors)


def _asked(
    model: Pipeline, prompts: Sequence[str], seed: int, guidance: float, batch: int
) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Unit noise for these prompts, and the network as `generate` asks it, in parts of `batch`."""
    shape = model.latent_shape()
    todo = parse_requests(prompts, None, seed, {})
    plan = model.sampling_plan(len(todo), shape, guidance, SamplingSchedule(None, FINE), {})
    parts = []
    for first in range(0, len(todo), batch):
        some = todo[first : first + batch]
        prompted = model.condition([request.prompt for request in some])
        parts.append((first, model.guided_denoiser(prompted, some, plan.part(slice(first, first + batch)))))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([part(x[i : i + batch], t[i : i + batch]) for i, part in parts])

    return model.initial_noise(todo, shape).to(model.device, model.dtype), denoise
