"""Parameter groups: which weights decay, and which learn faster or slower than the rest.

Matrices decay, vectors do not. `train.rates = ["blocks.*.modulation.*=0.1"]` multiplies the learning rate of
the weights whose names match; the first pattern that matches counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from sfumato.errors import Refused

if TYPE_CHECKING:
    from torch import Tensor

    from .settings import TrainSettings

Groups = list[dict[str, Any]]
Rate = tuple[str, float]


def rates_of(words: Sequence[str]) -> list[Rate]:
    """The (pattern, factor) pairs of "pattern=factor" words.

    Raises:
        Refused: one is no such word.
    """
    found = []
    for word in words:
        pattern, equals, text = word.rpartition("=")
        try:
            factor = float(text)
        except ValueError:
            factor = -1.0
        if not equals or not pattern or not 0 <= factor < float("inf"):
            raise Refused(
                f'train.rates has "{word}", which is not PATTERN=FACTOR with a factor of 0 or more. Write, '
                'for example, train.rates = ["blocks.*=0.5"].'
            )
        found.append((pattern, factor))
    return found


def check(named: Mapping[str, Any], words: Sequence[str]) -> None:
    """Refuse a pattern of `train.rates` that matches no trained weight."""
    for pattern, _ in rates_of(words):
        if not any(fnmatchcase(name, pattern) for name in named):
            near = get_close_matches(pattern, named, 1, 0.0)
            raise Refused(
                f'train.rates has the pattern "{pattern}", which matches no trained weight. '
                f'One of them is called "{near[0] if near else next(iter(named))}"; * stands for any letters.'
            )


def grouped(named: Mapping[str, Tensor], settings: TrainSettings) -> Groups:
    """The parameter groups of these weights: by whether they decay (two axes or more) and by their rate."""
    rates = rates_of(settings.rates)
    found: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, weight in named.items():
        factor = next((factor for pattern, factor in rates if fnmatchcase(name, pattern)), 1.0)
        decays = weight.ndim >= 2
        group = found.setdefault(
            (decays, factor),
            {
                "params": [],
                "weight_decay": settings.weight_decay if decays else 0.0,
                "lr": settings.learning_rate * factor,
            },
        )
        group["params"].append(weight)
    return [found[key] for key in sorted(found, reverse=True)]
