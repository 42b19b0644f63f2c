"""Guidance: lean away from a weaker answer; each form is a denoiser around a denoiser.

The weaker answer comes from the unprompted network (classifier-free, arXiv:2207.12598), from a smaller or
less trained one (autoguidance, arXiv:2406.02507) or from the same one with its attention disturbed
(arXiv:2403.17377). Plain guidance is linear in the answer and means the same in every theory. The
refinements below are written for x_0 or for velocity, so they take the theory, read the answers with it and
write the result back.
"""

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from sfumato.errors import Refused
from sfumato.theory.definition import Theory, as_float64, broadcast_like
from sfumato.theory.types import Denoise

Stacked = Callable[[Tensor, Tensor], Tensor]
"""(x_t [2B, …], t [2B]) → out [2B, …]: rows 0 … B − 1 prompted, B … 2B − 1 weaker, or more."""
Combine = Callable[[Tensor, Tensor, float], Tensor]
"""(strong, weak, scale) → the guided answer [B, …]."""
Scale = float | Callable[[Tensor], float]
"""How far to lean, always or at a time t [B]."""


# ---------------------------------------------------------------- two answers become one


def guide(strong: Tensor, weak: Tensor, scale: float) -> Tensor:
    """weak + scale · (strong − weak); scale 1 gives strong back, bit for bit."""
    return torch.lerp(weak, strong, scale)


def extrapolate(strong: Tensor, weak: Tensor, scale: float) -> Tensor:
    """weak + scale · (strong − weak), rounded as diffusers' pipelines round it."""
    return weak + scale * (strong - weak)


def extrapolate_from_strong(strong: Tensor, weak: Tensor, scale: float) -> Tensor:
    """strong + scale · (strong − weak): the scale counts from 0, as Z-Image's pipeline has it."""
    return strong + scale * (strong - weak)


def keep_norm(guided: Tensor, strong: Tensor, axis: int = -1) -> Tensor:
    """The guided answer with the prompted one's norm along an axis, as Qwen-Image and Lumina 2 have it."""
    # torch gives its norm no types
    norm = cast("Callable[..., Tensor]", torch.linalg.vector_norm)  # pyright: ignore[reportUnknownMemberType]
    return guided * (norm(strong, dim=axis, keepdim=True) / norm(guided, dim=axis, keepdim=True))


# ---------------------------------------------------------------- denoisers around denoisers


def classifier_free(strong: Denoise, weak: Denoise, scale: Scale, combine: Combine = guide) -> Denoise:
    """The guided network: two calls a time, one where `guide` has nothing to do (scale 1).

    `weak` is the unprompted network (Ho & Salimans 2022, arXiv:2207.12598), or a smaller or less trained one,
    prompted alike (autoguidance; Karras et al. 2024, arXiv:2406.02507); `translate` brings over one of
    another theory.
    """
    if combine is guide and scale == 1:
        return strong

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return combine(strong(x_t, t), weak(x_t, t), scale(t) if callable(scale) else scale)

    return denoise


def batched_call(every: Stacked, form: Callable[..., Denoise], answers: int = 2) -> Denoise:
    """Any form with all its answers from one call: batched_call(both, lambda s, w: classifier_free(s, w, 3)).

    Raises (when called):
        Refused: unless every row of the stacked batch is answered.
    """

    outputs: list[Tensor] = []
    formed = form(*(_fixed_output(outputs, index) for index in range(answers)))  # once: a form may remember

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        t = t.expand(len(x_t)) if t.ndim == 0 else t
        out = every(torch.cat([x_t] * answers), torch.cat([t] * answers))
        if len(out) != answers * len(x_t):
            raise Refused(f"A batch of {answers} × {len(x_t)} was answered with {len(out)} rows; answer all.")
        outputs[:] = out.chunk(answers)
        return formed(x_t, t)

    return denoise


def _fixed_output(outputs: list[Tensor], index: int) -> Denoise:
    return lambda x_t, t: outputs[index]


def plus_perturbed(guided: Denoise, strong: Denoise, perturbed: Denoise, scale: float) -> Denoise:
    """guided + scale · (strong − perturbed): any form, pushed away from the network with disturbed attention.

    Without another form `guided` is `strong`. Source: Ahn et al. 2024, arXiv:2403.17377.
    """
    return lambda x_t, t: guided(x_t, t) + scale * (strong(x_t, t) - perturbed(x_t, t))


def rescale_std(strong: Denoise, guided: Denoise, theory: Theory, share: float = 0.7) -> Denoise:
    """`guided` of any form, whose x_0 is given the standard deviation of `strong`'s, by `share`.

    Strong guidance over-exposes; this takes the excess back.

    Raises:
        Refused: unless the share lies between 0 and 1.
    Source: Lin et al. 2023, arXiv:2305.08891, section 3.4.
    """
    _share("share", share)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        prompted, leaning = (_data(theory, x_t, net(x_t, t), t) for net in (strong, guided))
        ratio = _deviation(prompted) / _deviation(leaning).clamp(min=1e-12)
        return _answer(theory, x_t, leaning * (share * ratio + 1 - share), t)

    return denoise


def only_in_interval(
    strong: Denoise, guided: Denoise, theory: Theory, low: float = 0.2, high: float = 5.0
) -> Denoise:
    """`guided` of any form while the noise-to-signal ratio s/a lies between `low` and `high`, else `strong`.

    Outside, a time shared by the whole batch costs one call.

    Raises:
        Refused: unless 0 ≤ low < high.
    Source: Kynkäänniemi et al. 2024, arXiv:2404.07724.
    """
    if not 0 <= low < high:
        raise Refused(f"low {low:g} and high {high:g} must satisfy 0 ≤ low < high.")

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        a, s = theory.data(as_float64(t))
        inside = (s >= low * a) & (s <= high * a if math.isfinite(high) else s >= 0)
        if bool(inside.all()):
            return guided(x_t, t)
        if not bool(inside.any()):
            return strong(x_t, t)
        return torch.where(broadcast_like(inside, x_t).bool(), guided(x_t, t), strong(x_t, t))

    return denoise


def zero_star(strong: Denoise, weak: Denoise, scale: float, theory: Theory, silent: float = 0.04) -> Denoise:
    """CFG-Zero*: the weaker velocity is fitted to the prompted one, and the first moments stand still.

    Args:
        silent: share of the angle from pure noise within which the velocity is set to 0.
    Raises:
        Refused: unless `silent` lies between 0 and 1.
    Source: Fan et al. 2025, arXiv:2503.18886.
    """
    _share("silent", silent)
    quiet = (1 - silent) * float(theory.angle(theory.t_noise))

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        r, from_out, from_z = (broadcast_like(c, x_t) for c in theory.velocity_coefficients(t))
        z = x_t / r
        prompted, weaker = (from_out * net(x_t, t) + from_z * z for net in (strong, weak))
        velocity = guide(prompted, _along(prompted, weaker), scale)
        moving = broadcast_like((theory.angle(t) <= quiet).double(), x_t)
        return (moving * velocity - from_z * z) / from_out

    return denoise


def adaptive_projected(
    strong: Denoise,
    weak: Denoise,
    scale: float,
    theory: Theory,
    parallel: float = 0.0,
    most: float | None = None,
    momentum: float = 0.0,
) -> Denoise:
    """APG: of the push in x_0, the part along the prompted x_0, which over-saturates, counts `parallel`.

    Args:
        most: the largest push, in root mean square of a sample; None does not limit it.
        momentum: share of the last push added to the next; negative pushes away from it. A denoiser with
            momentum remembers: make one per trajectory.
    Source: Sadat et al. 2024, arXiv:2410.02416.
    """
    last: list[Tensor] = []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        prompted, weaker = _data(theory, x_t, strong(x_t, t), t), _data(theory, x_t, weak(x_t, t), t)
        push = prompted - weaker
        axes = tuple(range(1, x_t.ndim))
        if momentum:
            push = push + momentum * last.pop() if last and last[0].shape == push.shape else push
            last[:] = [push]
        if most is not None:
            size = push.square().mean(axes, keepdim=True).sqrt()
            push = push * (most / size.clamp(min=1e-12)).clamp(max=1)
        push = push + (parallel - 1) * _along(push, prompted)
        return _answer(theory, x_t, prompted + (scale - 1) * push, t)

    return denoise


def _data(theory: Theory, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
    return theory.split(x_t, out, t)[0]


def _answer(theory: Theory, x_t: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
    """What the network would have answered had it meant this x_0."""
    _, s, _, q, det = (broadcast_like(c, x_t) for c in theory.coefficients(t))
    return q / s * x_t - det / s * x_0


def _along(push: Tensor, direction: Tensor) -> Tensor:
    """The part of `push` along `direction`, per sample."""
    axes = tuple(range(1, push.ndim))
    length = direction.square().sum(axes, keepdim=True).clamp(min=1e-12)
    return (push * direction).sum(axes, keepdim=True) / length * direction


def _deviation(x: Tensor) -> Tensor:
    axes = tuple(range(1, x.ndim))
    return x.std(axes, keepdim=True, correction=0)


def _share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise Refused(f"{name} is {value:g}; it is a share between 0 and 1.")
