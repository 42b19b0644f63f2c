"""The average of the weights over training: what is drawn with, kept beside what is trained.

The exponential average follows w̄ ← w̄ + (1 − β)(w − w̄), with β rising to its final value during the
first steps so that the random start is soon forgotten.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

UPDATES_PER_WINDOW = 100
"""How often the average sees the weights within 1 / (1 − β) steps, at least."""
LONGEST_INTERVAL = 8
NUMBERS_AT_ONCE = 50_000_000
"""Weights kept in bfloat16 whose float32 copies exist at the same time."""


def update_interval(step: int, decay: float = 1.0) -> int:
    """Steps between two updates of an average around `step`: 1 up to 256, then 2, 4, 8.

    An average over many steps hardly changes if it sees every eighth of them, and costs an eighth; a short
    one sees more of its own.
    """
    interval = 1
    while (
        interval < LONGEST_INTERVAL
        and step >= 256 * interval
        and 2 * interval * UPDATES_PER_WINDOW * (1 - decay) <= 1
    ):
        interval *= 2
    return interval


def last_update_step(step: int, decay: float = 1.0) -> int:
    """The last step at or before `step` at which the average is updated."""
    return step - step % update_interval(step, decay)


def decay_at(step: int, decay: float) -> float:
    """β after `step` updates (1, 2, …): the smaller of `decay` and (1 + step)/(10 + step)."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """Exponential average of a network's trained weights, in float32.

    Args:
        named: the trained parameters, which are followed; the average starts at their present values.
        decay: β, in [0, 1).
    """

    def __init__(self, named: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._weights = list(named.values())
        self._names = list(named)
        self._mean = [weight.detach().float().clone() for weight in self._weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` updates (1, 2, …), if it is one of the steps that count."""
        if last_update_step(step, self.decay) != step:
            return
        since = last_update_step(step - 1, self.decay) if step > 1 else 0
        share = 1 - math.prod(decay_at(one, self.decay) for one in range(since + 1, step + 1))
        for some in _slices(self._weights):
            now = [weight.detach().float() for weight in self._weights[some]]
            torch._foreach_lerp_(self._mean[some], now, share)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the network has the averaged weights; afterwards its own, bit for bit."""
        own = [weight.detach().clone() for weight in self._weights]
        try:
            self._copy_to_network(self._mean)
            yield
        finally:
            self._copy_to_network(own)

    def copy_to_network(self) -> None:
        """Give the network the averaged weights for good."""
        self._copy_to_network(self._mean)

    @torch.no_grad()
    def _copy_to_network(self, values: list[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """The averaged weights by the names of the network's parameters."""
        return dict(zip(self._names, self._mean, strict=True))

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state`, as `state()` gave it; entries of other names are left out."""
        for name, mean in zip(self._names, self._mean, strict=True):
            mean.copy_(state[name])


def _slices(weights: Sequence[Tensor]) -> Iterator[slice]:
    """Weights in order, so many together that their copies stay small; those in float32 need none."""
    first = size = 0
    for number, weight in enumerate(weights):
        numbers = weight.numel() * (weight.dtype != torch.float32)
        if size and size + numbers > NUMBERS_AT_ONCE:
            yield slice(first, number)
            first, size = number, 0
        size += numbers
    yield slice(first, len(weights))


class ScheduleFreeEMA:
    """The average that a schedule-free optimizer holds, seen as an `EMA`.

    Evaluation mode computes it into the weights; the training weights are put back bit for bit.

    Args:
        named: the trained parameters. parts: the optimizers, in training mode from now on.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], parts: Sequence[Any]) -> None:
        self._named = named
        self._parts = parts
        for part in parts:
            part.train()

    def update(self, step: int) -> None:
        """The optimizer has done it."""

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the network has the averaged weights; afterwards its own, bit for bit."""
        own = [weight.detach().clone() for weight in self._named.values()]
        try:
            for part in self._parts:
                part.eval()
            yield
        finally:
            for part in self._parts:
                part.train()
            with torch.no_grad():
                for weight, value in zip(self._named.values(), own, strict=True):
                    weight.copy_(value)

    def copy_to_network(self) -> None:
        """Give the network the averaged weights for good."""
        for part in self._parts:
            part.eval()

    def state(self) -> dict[str, Tensor]:
        """The averaged weights by the names of the network's parameters."""
        with self.applied():
            return {name: weight.detach().clone() for name, weight in self._named.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The optimizer's own state has it."""
