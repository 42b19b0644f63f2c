"""Times to train at: densities over the way from data to noise, as maps from even numbers.

A density turns u, even in (0, 1), into times of a theory; u may come from anywhere, so that draws are
reproducible (noise.uniform) or stratified.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import Refused, nearest, one_of
from .definition import Theory, exact
from .shapes import Anything

Quantile = Callable[[Theory, Tensor], Tensor]


@dataclass(frozen=True)
class Density:
    """A distribution of training times, known by its quantiles."""

    name: str
    quantile: Quantile

    def __call__(self, theory: Theory, u: Anything) -> Tensor:
        """u [B] in (0, 1), even → t [B] float64, distributed as this density says."""
        return self.quantile(theory, exact(u))


def _uniform(theory: Theory, u: Tensor) -> Tensor:
    return theory.t_data + (theory.t_noise - theory.t_data) * u


def uniform() -> Quantile:
    """Even in the theory's own time."""
    return _uniform


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Quantile:
    """log(s/a) is normal; in flow matching t is logit-normal.

    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1.
    """
    if not std > 0:
        raise Refused(f"std is {std:g}; it must be above 0.")
    return lambda theory, u: _at_log_ratio(theory, mean + std * math.sqrt(2) * torch.erfinv(2 * u - 1))


def _at_log_ratio(theory: Theory, log_ratio: Tensor) -> Tensor:
    return theory.time_at(-2 * log_ratio)


_DENSITIES: dict[str, Callable[..., Quantile]] = {"uniform": uniform, "logit-normal": logit_normal}


def densities() -> list[str]:
    """The names `density` knows."""
    return list(_DENSITIES)


def density(name: str, **args: float) -> Density:
    """The density with this name.

    Raises:
        Refused: for a name or an argument that is not known, with the nearest that is.
    """
    make = _DENSITIES[one_of("Training density", name.replace("_", "-"), _DENSITIES)]
    known = list(inspect.signature(make).parameters)
    for word in args:
        if word not in known:
            raise Refused(
                f'Density "{name}" takes no argument "{word}".{nearest(word, known) if known else ""}'
            )
    return Density(name, make(**args))
