"""Guidance: lean away from a weaker answer; each form is a denoiser around a denoiser.

The weaker answer comes from the unprompted network (classifier-free, arXiv:2207.12598), from a smaller or
less trained one (autoguidance, arXiv:2406.02507) or from the same one with its attention disturbed
(arXiv:2403.17377). Plain guidance is linear in the answer and means the same in every theory. The
refinements below are written for x_0 or for velocity, so they take the theory, read the answers with it and
write the result back.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import Refused
from .definition import Theory, exact, spread
from .shapes import Denoise

Stacked = Callable[[Tensor, Tensor], Tensor]
"""(x_t [2B, …], t [2B]) → out [2B, …]: rows 0 … B − 1 prompted, B … 2B − 1 weaker, or more."""
Form = Callable[[Denoise, Denoise, float], Denoise]
"""(strong, weak, scale) → the guided network."""


def guide(strong: Tensor, weak: Tensor, scale: float) -> Tensor:
    """weak + scale · (strong − weak); scale 1 gives strong back."""
    return torch.lerp(weak, strong, scale)


def classifier_free(strong: Denoise, weak: Denoise, scale: float) -> Denoise:
    """The guided network: two calls a time, one where scale is 1.

    Source: Ho & Salimans 2022, arXiv:2207.12598.
    """
    if scale == 1:
        return strong
    return lambda x_t, t: guide(strong(x_t, t), weak(x_t, t), scale)


def autoguidance(strong: Denoise, weak: Denoise, scale: float) -> Denoise:
    """Guidance by a smaller or less trained network, prompted alike.

    A weak network of another theory is brought over by `translate`.
    Source: Karras et al. 2024, arXiv:2406.02507.
    """
    return classifier_free(strong, weak, scale)


def perturbed_attention(strong: Denoise, disturbed: Denoise, scale: float) -> Denoise:
    """strong + scale · (strong − disturbed), the second with identity self-attention in some layers.

    Source: Ahn et al. 2024, arXiv:2403.17377.
    """
    return classifier_free(strong, disturbed, 1 + scale)


def batched(both: Stacked, scale: float) -> Denoise:
    """Classifier-free guidance in one call of a doubled batch."""
    return together(both, lambda strong, weak: classifier_free(strong, weak, scale))


def together(every: Stacked, form: Callable[..., Denoise], answers: int = 2) -> Denoise:
    """Any form with all its answers from one call: together(both, lambda s, w: rescaled(s, w, …)).

    Raises (when called):
        Refused: unless every row of the stacked batch is answered.
    """

    heard: list[Tensor] = []
    formed = form(*(_heard(heard, index) for index in range(answers)))  # once: a form may remember

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        t = t.expand(len(x_t)) if t.ndim == 0 else t
        out = every(torch.cat([x_t] * answers), torch.cat([t] * answers))
        if len(out) != answers * len(x_t):
            raise Refused(f"A batch of {answers} × {len(x_t)} was answered with {len(out)} rows; answer all.")
        heard[:] = out.chunk(answers)
        return formed(x_t, t)

    return denoise


def _heard(heard: list[Tensor], index: int) -> Denoise:
    return lambda x_t, t: heard[index]


def also(leaning: Denoise, strong: Denoise, third: Denoise, scale: float) -> Denoise:
    """leaning + scale · (strong − third): guidance of any form, pushed away from one more weaker answer."""
    return lambda x_t, t: leaning(x_t, t) + scale * (strong(x_t, t) - third(x_t, t))


def rescaled(
    strong: Denoise,
    weak: Denoise,
    scale: float,
    theory: Theory,
    share: float = 0.7,
    form: Form = classifier_free,
) -> Denoise:
    """Guidance whose x_0 is given the standard deviation of the prompted one, by `share`.

    Strong guidance over-exposes; this takes the excess back, of any `form`.
    Source: Lin et al. 2023, arXiv:2305.08891, section 3.4.
    """
    return deviating_as(strong, form(strong, weak, scale), theory, share)


def deviating_as(strong: Denoise, leaning: Denoise, theory: Theory, share: float = 0.7) -> Denoise:
    """`leaning`, whose x_0 is given the standard deviation of `strong`'s by `share`: see `rescaled`.

    Raises:
        Refused: unless the share lies between 0 and 1.
    """
    _share("share", share)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        prompted, guided = (_data(theory, x_t, net(x_t, t), t) for net in (strong, leaning))
        ratio = _deviation(prompted) / _deviation(guided).clamp(min=1e-12)
        return _answer(theory, x_t, guided * (share * ratio + 1 - share), t)

    return denoise


def interval(
    strong: Denoise, weak: Denoise, scale: float, theory: Theory, low: float = 0.2, high: float = 5.0
) -> Denoise:
    """Guidance only while the noise-to-signal ratio s/a lies between `low` and `high`.

    Outside, a time shared by the whole batch costs one call.
    Source: Kynkäänniemi et al. 2024, arXiv:2404.07724.
    """
    return within(strong, classifier_free(strong, weak, scale), theory, low, high)


def within(strong: Denoise, leaning: Denoise, theory: Theory, low: float = 0.2, high: float = 5.0) -> Denoise:
    """`leaning` where s/a lies between `low` and `high`, `strong` elsewhere: an interval of any form.

    Raises:
        Refused: unless 0 ≤ low < high.
    """
    if not 0 <= low < high:
        raise Refused(f"low {low:g} and high {high:g} must satisfy 0 ≤ low < high.")

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        a, s = theory.data(exact(t))
        inside = (s >= low * a) & (s <= high * a if math.isfinite(high) else s >= 0)
        if bool(inside.all()):
            return leaning(x_t, t)
        if not bool(inside.any()):
            return strong(x_t, t)
        return torch.where(spread(inside, x_t).bool(), leaning(x_t, t), strong(x_t, t))

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
        r, from_out, from_z = (spread(c, x_t) for c in theory.reader(t))
        z = x_t / r
        prompted, weaker = (from_out * net(x_t, t) + from_z * z for net in (strong, weak))
        velocity = guide(prompted, _along(prompted, weaker), scale)
        moving = spread((theory.angle(t) <= quiet).double(), x_t)
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
    _, s, _, q, det = (spread(c, x_t) for c in theory.rows(t))
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
