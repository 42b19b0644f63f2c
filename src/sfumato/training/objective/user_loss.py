"""A loss of one's own: `train.loss = "file.py:name"`, called as loss(answer, target, …)."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import Failed, Refused
from sfumato.user_code import (
    accepted_arguments,
    check_call,
    describe_error,
    load_user_object,
    make_user_object,
)

KNOWN = ("t", "x_0", "x_t", "condition", "theory")
"""What a loss may be told beside answer and target: it is given those that its signature names."""
CONTRACT = (
    "A loss is called as loss(answer, target), both float32 [B, C, …], with those of "
    f"{', '.join(KNOWN)} that its signature names; it gives one loss a sample [B], or errors shaped like "
    "the answer, which are averaged."
)


def check(word: str) -> None:
    """Raises Refused unless `file.py:name` can be called as a loss is; a class is not made for that."""
    found = load_user_object(word)
    if not callable(found):
        raise Refused(f"train.loss: {word} is a {type(found).__name__}. {CONTRACT}")
    try:
        check_call(signed(found), KNOWN, first=2, of_class=inspect.isclass(found))
    except TypeError as problem:
        raise Refused(f"train.loss: {word} cannot be called so ({problem}). {CONTRACT}") from None


def signed(loss: Any) -> Callable[..., Any]:
    """What has the signature: a network's `forward`, a class's `__call__`, else the object itself."""
    if isinstance(loss, nn.Module) or (inspect.isclass(loss) and issubclass(loss, nn.Module)):
        return loss.forward
    return loss.__call__ if inspect.isclass(loss) else loss


class UserLoss:
    """What `file.py:name` says is minimised; a class is made without arguments.

    Args:
        word: file.py:name. device: where networks in it are put, frozen.
    Raises:
        Refused: it is nothing that can be called so.
    """

    def __init__(self, word: str, device: torch.device) -> None:
        check(word)
        self.word, self.loss = word, make_user_object(word)
        if isinstance(self.loss, nn.Module):
            self.loss.to(device).eval().requires_grad_(False)
        self.arguments = accepted_arguments(signed(self.loss), KNOWN)

    def __call__(self, answer: Tensor, target: Tensor, known: Mapping[str, Any]) -> Tensor:
        """Losses [B], or errors shaped like the answer.

        Raises:
            Failed: it fails, naming file and line. Refused: it gives something else.
        """
        try:
            found = self.loss(answer, target, **{name: known[name] for name in self.arguments})
        except (Refused, Failed, torch.OutOfMemoryError):
            raise
        except Exception as problem:
            raise Failed(f"train.loss fails in {describe_error(self.word, problem)}") from problem
        if not isinstance(found, Tensor) or found.shape not in (answer.shape[:1], answer.shape):
            given = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise Refused(
                f"train.loss: {self.word} gives {given} for an answer of {list(answer.shape)}. {CONTRACT}"
            )
        if answer.requires_grad and not found.requires_grad:
            raise Refused(
                f"train.loss: {self.word} gives numbers without a gradient, from which nothing is learned. "
                "Compute them of the answer with torch, without detach() or no_grad."
            )
        return found
