"""Not a number is never drawn silently: as an argument it is refused, as a result explained."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import Failed, Refused
from sfumato.models import Model

LARGE = 100.0
"""A guidance beyond which it is the first suspect."""
OPEN_ENDED = ("guidance_interval",)
"""Ranges, which may have no end."""
_SAY: ContextVar[Callable[[str], None] | None] = ContextVar("say", default=None)


@contextmanager
def said_instead(say: Callable[[str], None]) -> Iterator[None]:
    """Inside the block a result that is no number is said and drawn: previews stop no training."""
    token = _SAY.set(say)
    try:
        yield
    finally:
        _SAY.reset(token)


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises Refused where an argument, or a number in it, is NaN or infinite."""
    for name, value in arguments.items():
        if name in OPEN_ENDED and isinstance(value, list | tuple):
            value = [one for one in value if one != math.inf]
        if not _is_finite(value):
            shown = f" is {value}" if isinstance(value, float) else " holds what is no finite number"
            raise Refused(f"{name}{shown}. Give finite numbers.")


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value.float()).all())
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, list | tuple) or all(map(_is_finite, value))


def check_result(pixels: Tensor, model: Model, guidance: float) -> None:
    """Look at what was drawn; what is no number names the weight that is none, if there is one.

    Raises:
        Refused: a weight of the model, or the guidance, is at fault. Failed: neither is.
    """
    if bool(torch.isfinite(pixels).all()):
        return
    stages: dict[str, nn.Module] = {
        "denoiser": model.denoiser,
        "codec": model.codec,
        "conditioner": model.conditioner,
    }
    found = next((bad for name, stage in stages.items() for bad in not_finite(stage, name)), "")
    problem: Refused | Failed
    if found:
        problem = Refused(
            f"The model's weight {found} holds numbers that are not finite (NaN or infinite), so nothing "
            "can be drawn with it. Copy the model again; of a run, draw with an earlier checkpoint."
        )
    elif abs(guidance) > LARGE:
        problem = Refused(
            f"With guidance {guidance:g} what is drawn is no finite number any more. Give a smaller one, as "
            "4."
        )
    else:
        problem = Failed(
            f"What was drawn is no finite number, though all weights are; at guidance {guidance:g}, "
            f"computed in {str(model.dtype).removeprefix('torch.')}. Load the model in float32 or bfloat16, "
            "or give a smaller guidance."
        )
    if (say := _SAY.get()) is None:
        raise problem
    say(str(problem))


def not_finite(stage: nn.Module, name: str) -> Iterator[str]:
    """The names of weights that hold NaN or infinity."""
    for key, tensor in stage.state_dict().items():
        if isinstance(tensor, Tensor) and not _is_finite(tensor):
            yield f"{name}.{key}"
