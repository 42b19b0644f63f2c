"""Whether pictures were learned by heart: is a drawn one much nearer to one training picture than to others?

A copy lies next to its original and far from everything else, so the distance to the nearest training
picture, as a share of the mean distance to the next ones, is small. Held-out pictures, which nobody can
have copied, say how small it is anyway: the share of drawn pictures below what one in twenty of them falls
below is near 5 % for a model that copies nothing. After Carlini et al. 2023, arXiv:2301.13188, section 4.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato.evaluation.measure import Measure, proportion
from sfumato.evaluation.neighbors import downsample_2x2

OTHERS = 20
QUANTILE = 0.05
PLAINLY = 0.2
"""A ratio below this is a copy whatever the data; it decides where nothing is held out."""


@dataclass(frozen=True)
class Memorization:
    """nearest, ratio: of each drawn picture; copied: the share that is suspiciously near to one."""

    nearest: list[int]
    ratio: list[float]
    copied: Measure

    def closest(self, count: int) -> list[int]:
        """The drawn pictures with the smallest ratios, the smallest first."""
        return sorted(range(len(self.ratio)), key=self.ratio.__getitem__)[:count]


def nearest_distance_ratios(pictures: Tensor, train: Tensor) -> tuple[list[int], list[float]]:
    """The nearest training picture of each of these, and its distance over the mean of the next ones.

    Args:
        pictures [B, 3, H, W], train [N, 3, H, W]: uint8 or in [-1, 1]; N ≥ 3.
    """
    count = min(OTHERS + 1, len(train))
    found = torch.cdist(downsample_2x2(pictures), downsample_2x2(train)).topk(count, largest=False)
    ratio = found.values[:, 0] / found.values[:, 1:].mean(1).clamp_min(1e-12)
    return [int(index) for index in found.indices[:, 0]], [float(one) for one in ratio]


def measure_memorization(generated: Tensor, train: Tensor, held_out: Tensor | None = None) -> Memorization:
    """Measure drawn pictures against the training pictures, and against held-out ones if there are enough.

    Raises:
        ValueError: fewer than three training pictures.
    """
    if len(train) < 3:
        raise ValueError("memorisation is measured against at least three training pictures")
    nearest, ratio = nearest_distance_ratios(generated, train)
    next_ones = min(OTHERS, len(train) - 1)
    line, chance = PLAINLY, None
    note = f"at most {PLAINLY:g} times as far from one training picture as from the next {next_ones}"
    if held_out is not None and len(held_out) >= 1 / QUANTILE:
        own = torch.tensor(nearest_distance_ratios(held_out, train)[1])
        line, chance = float(own.quantile(QUANTILE)), QUANTILE
        note = f"nearer to one training picture than {1 - QUANTILE:.0%} of held-out pictures are"
    copied = proportion([value < line for value in ratio], note)
    return Memorization(nearest, ratio, replace(copied, chance=chance))
