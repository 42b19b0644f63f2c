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

from sfumato.training.distributed.sharding import shards_of


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name, in order; of a divided network, the rows here."""
    if (shards := shards_of(network)) is not None:
        return shards.held
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


SEEN_IN_A_WINDOW = 100
"""How often the average sees the weights within 1 / (1 − β) steps, at least."""
STRIDE = 8


def stride(step: int, decay: float = 1.0) -> int:
    """Steps between two updates of an average around `step`: 1 up to 256, then 2, 4, 8.

    An average over many steps hardly changes if it sees every eighth of them, and costs an eighth; a short
    one sees more of its own.
    """
    wide = 1
    while wide < STRIDE and step >= 256 * wide and 2 * wide * SEEN_IN_A_WINDOW * (1 - decay) <= 1:
        wide *= 2
    return wide


def last_update_step(step: int, decay: float = 1.0) -> int:
    """The last step at or before `step` at which the average is updated."""
    return step - step % stride(step, decay)


def decay_at(step: int, decay: float) -> float:
    """β after `step` updates (1, 2, …): the smaller of `decay` and (1 + step)/(10 + step)."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """Exponential average of a network's trained weights, in float32.

    Args:
        network: its trained parameters are followed; the average starts at their present values.
        decay: β, in [0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = list(trained(network).values())
        self._names = list(trained(network))
        self._mean = [weight.detach().float().clone() for weight in self._weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` updates (1, 2, …), if it is one of the steps that count."""
        if last_update_step(step, self.decay) != step:
            return
        since = last_update_step(step - 1, self.decay) if step > 1 else 0
        share = 1 - math.prod(decay_at(one, self.decay) for one in range(since + 1, step + 1))
        now = [weight.detach().float() for weight in self._weights]
        torch._foreach_lerp_(self._mean, now, share)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the network has the averaged weights; afterwards its own, bit for bit."""
        own = [weight.detach().clone() for weight in self._weights]
        try:
            self._put(self._mean)
            yield
        finally:
            self._put(own)

    def keep(self) -> None:
        """Give the network the averaged weights for good."""
        self._put(self._mean)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
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


class ScheduleFreeEMA:
    """The average that a schedule-free optimizer holds, seen as an `EMA`.

    Evaluation mode computes it into the weights; the training weights are put back bit for bit.

    Args:
        parts: the optimizers, in training mode from now on.
    """

    def __init__(self, network: nn.Module, parts: Sequence[Any]) -> None:
        self._named = trained(network)
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

    def keep(self) -> None:
        """Give the network the averaged weights for good."""
        for part in self._parts:
            part.eval()

    def state(self) -> dict[str, Tensor]:
        """The averaged weights by the names of the network's parameters."""
        with self.applied():
            return {name: weight.detach().clone() for name, weight in self._named.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The optimizer's own state has it."""
