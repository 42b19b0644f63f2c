"""Changes of weights as products up · down, and what files change of a base as such products.

Sums stay exact, their ranks add up; a smaller rank is the best one there is (Eckart and Young 1936: the
largest singular values), taken of the factors, without multiplying them out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import Refused
from sfumato.generation import Pipeline
from sfumato.models.lora import key_conversion
from sfumato.models.lora.lora_file import WeightDelta

Place = tuple[str, str]
"""(network as `key_conversion.networks` calls it, layer)."""


@dataclass(frozen=True)
class LowRank:
    """A change up [out, r] · down [r, in] of a weight of this shape."""

    up: Tensor
    down: Tensor
    shape: torch.Size

    @property
    def rank(self) -> int:
        """Its rank, at most."""
        return self.up.shape[1]

    def whole(self) -> Tensor:
        """ΔW, shaped as the weight."""
        return (self.up @ self.down).reshape(self.shape)

    def norm(self) -> float:
        """The Frobenius norm of ΔW, from the factors' products with themselves."""
        square = ((self.up.T @ self.up) * (self.down @ self.down.T)).sum()
        return float(square.clamp(min=0).sqrt())

    def plus(self, other: "LowRank") -> "LowRank":
        """The sum, exactly: ranks add up."""
        return LowRank(torch.cat([self.up, other.up], 1), torch.cat([self.down, other.down]), self.shape)

    def reduced(self, rank: int | None = None, energy: float | None = None) -> "LowRank":
        """The nearest change of a smaller rank.

        Args:
            rank: at most so many. energy: as few as keep this share of the squared singular values.
        """
        q, r = torch.linalg.qr(self.up.double())
        p, s = torch.linalg.qr(self.down.double().T)
        u, values, v = torch.linalg.svd(r @ s.T, full_matrices=False)
        count = _count(values, rank, energy)
        root = values[:count].sqrt()
        up, down = q @ u[:, :count] * root, root[:, None] * v[:count] @ p.T
        return LowRank(up.float(), down.float(), self.shape)


def _count(values: Tensor, rank: int | None, energy: float | None) -> int:
    """How many singular values are kept; one at least."""
    count = len(values) if rank is None else min(rank, len(values))
    if energy is not None:
        squares = values.square()
        share = squares.cumsum(0) / squares.sum().clamp(min=1e-300)
        count = min(count, int((share < energy - 1e-12).sum()) + 1)
    return max(1, count)


def of_matrix(delta: Tensor, rank: int | None, energy: float | None) -> LowRank:
    """The nearest change of low rank to a whole ΔW."""
    flat = delta.float().flatten(1)
    u, values, v = torch.linalg.svd(flat, full_matrices=False)
    count = _count(values, rank, energy)
    root = values[:count].sqrt()
    return LowRank(u[:, :count] * root, root[:, None] * v[:count], delta.shape)


def layers_by_network(model: Pipeline) -> dict[str, dict[str, Any]]:
    """The layers of each network that a LoRA may change."""
    return {home: key_conversion.layers_of(one) for home, one in key_conversion.networks(model).items()}


@torch.no_grad()
def deltas_of(model: Pipeline, file: Path | str, amount: float) -> Iterator[tuple[Place, Tensor, Tensor]]:
    """(place, the base's weight, ΔW) of each layer that a file changes; biases are refused."""
    layers = layers_by_network(model)
    matched = key_conversion.match_layers(model, key_conversion.read_changes(model, file), file)
    for home, layer, change in matched:
        weight = layers[home][layer].weight.float()
        yield (home, layer), weight, amount * _whole(change, weight)


def _whole(change: WeightDelta, weight: Tensor) -> Tensor:
    if change.kind == "diff" and change.diff is None:
        return torch.zeros_like(weight)
    after = weight + change.delta(weight.shape)
    return (after if change.length is None else change.lengthened(after, weight)) - weight


@torch.no_grad()
def read_low_rank(
    model: Pipeline, file: Path | str, amount: float, rank: int | None, energy: float | None
) -> dict[Place, LowRank]:
    """What a file changes of a base, as products: exactly where it holds products, else the nearest.

    Raises:
        Refused: a file that is no LoRA of this base; one that is none of low rank, without a rank to take.
    """
    layers, found = layers_by_network(model), dict[Place, LowRank]()
    for home, layer, change in key_conversion.match_layers(
        model, key_conversion.read_changes(model, file), file
    ):
        weight: Tensor = layers[home][layer].weight
        if change.bias is not None and bool(change.bias[change.rows].any()):
            raise Refused(
                f"{file} also changes the bias of {layer}, which a LoRA elsewhere has no room for. Merge it "
                "into its base instead: model.merge_loras in a recipe, or model.add_lora and model.save."
            )
        if change.kind == "lora" and change.length is None:
            assert change.up is not None and change.down is not None
            up = amount * change.scale * change.up[change.rows].flatten(1).float()
            found[home, layer] = LowRank(up, change.down.flatten(1).float(), weight.shape)
            continue
        if rank is None and energy is None:
            kind = "DoRA" if change.length is not None else change.kind
            raise Refused(
                f"{file} holds {kind}, whose changes are no products of low rank. Say how near a LoRA shall "
                "come to them: --rank 32, or --energy 0.99."
            )
        found[home, layer] = of_matrix(amount * _whole(change, weight.float()), rank, energy)
    return found
