"""Guidance: lean away from a weaker answer; each form is a denoiser around a denoiser.

The weaker answer comes from the unprompted network (classifier-free, arXiv:2207.12598).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import Refused
from .shapes import Denoise


def guide(strong: Tensor, weak: Tensor, scale: float) -> Tensor:
    """weak + scale · (strong − weak); scale 1 gives strong back."""
    return torch.lerp(weak, strong, scale)


def classifier_free(strong: Denoise, weak: Denoise, scale: float) -> Denoise:
    """The guided network: two calls a time, one where scale is 1.

    Linear in the answer, so it means the same whatever the theory. Source: Ho & Salimans 2022,
    arXiv:2207.12598.
    """
    if scale == 1:
        return strong
    return lambda x_t, t: guide(strong(x_t, t), weak(x_t, t), scale)


def batched(both: Callable[[Tensor, Tensor], Tensor], scale: float) -> Denoise:
    """Guidance in one call: `both` answers a doubled batch, prompted half first.

    Args:
        both: (x_t [2B, …], t [2B]) → out [2B, …]; rows 0 … B − 1 prompted, B … 2B − 1 unprompted.
    """

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        out = both(torch.cat([x_t, x_t]), torch.cat([t, t]))
        if len(out) != 2 * len(x_t):
            raise Refused(
                f"A doubled batch of {2 * len(x_t)} was answered with {len(out)} rows; answer them all."
            )
        strong, weak = out.chunk(2)
        return guide(strong, weak, scale)

    return denoise
