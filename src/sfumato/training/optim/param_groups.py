"""Parameter groups: which weights decay, and which learn faster or slower than the rest.

Matrices decay, vectors do not. `train.lr_multipliers = {"blocks.*.modulation.*" = 0.1}`
multiplies the learning rate of the weights whose names match; the first pattern that matches counts.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from sfumato.errors import Refused
from sfumato.training.settings import TrainSettings

ParamGroups = list[dict[str, Any]]


def check_lr_multipliers(named: Mapping[str, Any], multipliers: Mapping[str, float]) -> None:
    """Refuse a pattern of `train.lr_multipliers` that matches no trained weight."""
    for pattern in multipliers:
        if not any(fnmatchcase(name, pattern) for name in named):
            near = get_close_matches(pattern, named, 1, 0.0)
            raise Refused(
                f'train.lr_multipliers has the pattern "{pattern}", which matches no trained weight. '
                f'One of them is called "{near[0] if near else next(iter(named))}"; * stands for any letters.'
            )


def param_groups(named: Mapping[str, Tensor], settings: TrainSettings) -> ParamGroups:
    """The parameter groups of these weights: by whether they decay (two axes or more) and by their rate."""
    found: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, weight in named.items():
        factors = (by for pattern, by in settings.lr_multipliers.items() if fnmatchcase(name, pattern))
        factor = next(factors, 1.0)
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
