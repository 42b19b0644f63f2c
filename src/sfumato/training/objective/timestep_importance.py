"""Times are drawn more often where losses are large, and weigh less there: the same mean, less noise.

A density of times is cut into bins of equal probability. Drawing bin k with probability p_k and weighing its
losses by 1/(K·p_k) leaves every mean as it was; the variance of the estimate is least where p_k ∝ √E[ℓ²]_k
(importance sampling; for diffusion: arXiv:2102.09672, section 3.3, which keeps a history of losses). Half of
the density stays even, so that no weight exceeds 2.

What is measured in one period of steps is used two periods later, when it is certain to be known: samples are
read ahead. Squares are summed as integers, so that the order in which processes add them is no matter.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

BINS = 16
PERIOD = 64
"""Steps for which a density stays as it is."""
UNIFORM_SHARE = 0.5
HISTORY_DECAY = 0.8
"""Of what was measured before, what a new period leaves."""
GRAIN, MOST = 2**24, 1e3
"""Squares are counted in units of 1/GRAIN, losses up to MOST."""


class TimestepImportance:
    """A density over the quantiles [0, 1] of another, which follows the losses it hears."""

    def __init__(self) -> None:
        self.tables: dict[int, Tensor] = {}
        self.history = torch.zeros(2, BINS, dtype=torch.float64)
        self._sums = torch.zeros(2, BINS, dtype=torch.int64)
        self.pending: list[tuple[Tensor, Tensor]] = []

    def probabilities(self, step: int) -> Tensor:
        """The probability [K] of each bin in a step; even in the first two periods."""
        even = torch.full((BINS,), 1 / BINS, dtype=torch.float64)
        return self.tables.get(step // PERIOD, even)

    def __call__(self, u: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(quantiles [b], weights [b]) that stand for uniform u [b] in [0, 1)."""
        shares = self.probabilities(step)
        ends = shares.cumsum(0)
        u = u.double()
        place = torch.searchsorted(ends, u, right=True).clamp(max=BINS - 1)
        inside = ((u - (ends - shares)[place]) / shares[place]).clamp(0, 1 - 1e-9)
        return (place + inside) / BINS, (1 / BINS / shares)[place]

    def record(self, quantiles: Tensor, losses: Tensor) -> None:
        """Take in the losses [b] at these quantiles [b], not yet weighed; they are read when asked for."""
        self.pending.append((quantiles, losses))

    @property
    def period_sums(self) -> Tensor:
        """[2, K] int64: the losses' squares of this period in each bin, and how many they are."""
        if self.pending:
            quantiles = torch.cat([quantiles.cpu() for quantiles, _ in self.pending])
            losses = torch.cat([losses for _, losses in self.pending]).cpu()
            self.pending.clear()
            place = (quantiles * BINS).long().clamp(0, BINS - 1)
            squares = (losses.double().clamp(0, MOST).square() * GRAIN).round().long()
            self._sums[0].index_add_(0, place, squares)
            self._sums[1].index_add_(0, place, torch.ones_like(place))
        return self._sums

    def refresh(self, step: int, add: Callable[[Tensor], Tensor]) -> None:
        """After `step` updates: at the end of a period, make the density of the one after the next.

        Args:
            add: sums a tensor over all processes.
        """
        if step % PERIOD:
            return
        found = add(self.period_sums).double()
        self.history = HISTORY_DECAY * self.history + torch.stack([found[0] / GRAIN, found[1]])
        self._sums.zero_()
        spread = (self.history[0] / self.history[1].clamp(min=1)).sqrt()
        wanted = spread / spread.sum().clamp(min=1e-12)
        now = step // PERIOD
        self.tables[now + 1] = UNIFORM_SHARE / BINS + (1 - UNIFORM_SHARE) * wanted
        self.tables.pop(now - 1, None)

    def state(self, add: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """As JSON; every process calls it."""
        return {
            "tables": {str(period): shares.tolist() for period, shares in self.tables.items()},
            "seen": self.history.tolist(),
            "heard": add(self.period_sums).tolist(),
        }

    def load(self, state: Mapping[str, Any], is_rank_zero: bool) -> None:
        """Continue from `state`; what was heard in this period is kept by the process that is_rank_zero."""
        self.tables = {
            int(period): torch.tensor(shares, dtype=torch.float64)
            for period, shares in state["tables"].items()
        }
        self.history = torch.tensor(state["seen"], dtype=torch.float64)
        self._sums = torch.tensor(state["heard"], dtype=torch.int64) * int(is_rank_zero)
