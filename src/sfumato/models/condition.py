"""What guides a batch of samples: named tensors, that can be taken apart into rows and stacked again."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import Refused
from sfumato.theory.definition import upload

RAGGED = {"tokens": "mask"}
"""Tensors whose second axis differs from sample to sample, and the mask that says which entries count."""


class Condition(Mapping[str, Tensor]):
    """What guides a batch: named tensors, each [B, ...].

    Names our own models use: `tokens` [B, L, D] with `mask` [B, L] (true where a token counts),
    `pooled` [B, D], `labels` [B]. Families add their own. An unconditional batch has no tensors,
    but still a length. `negative` is what to lean away from, if that was asked for.
    """

    def __init__(self, tensors: Mapping[str, Tensor], size: int | None = None, negative: Self | None = None):
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
        if size is not None:
            lengths["size"] = size
        if len(set(lengths.values())) != 1:
            raise Refused(f"A condition's tensors need one batch size, but these have {lengths}.")
        self.tensors = dict(tensors)
        self.size = next(iter(lengths.values()))
        self.negative = negative
        self.is_unpadded = False
        """Whether it is known, without a look at its masks, that every token counts."""

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __getattr__(self, name: str) -> Any:
        """Only for what is not there: its tensors are asked for as those of a mapping."""
        known = vars(self).get("tensors", {})
        hint = f': it is a mapping, condition["{name}"]' if name in known else ""
        raise AttributeError(f'a condition has no attribute "{name}"{hint}')

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        """The number of tensors; the batch size is `size`."""
        return len(self.tensors)

    def row(self, index: int) -> dict[str, Tensor]:
        """Sample `index` alone, without padding and without masks: what the store keeps."""
        row = {name: tensor[index] for name, tensor in self.tensors.items()}
        for ragged, mask in RAGGED.items():
            if ragged in row and mask in row:
                row[ragged] = row[ragged][row.pop(mask)]
        return row

    def rows(self) -> list[dict[str, Tensor]]:
        """Every sample alone, as `row` gives it."""
        return [self.row(index) for index in range(self.size)]

    @classmethod
    def stack(cls, rows: Sequence[Mapping[str, Tensor]]) -> Self:
        """A batch of rows; ragged tensors are padded with zeros to the longest, and masked."""
        tensors: dict[str, Tensor] = {}
        alike: list[bool] = []
        for name in rows[0] if rows else ():
            parts = [row[name] for row in rows]
            if name in RAGGED:
                longest = max(len(part) for part in parts)
                alike.append(all(len(part) == longest for part in parts))
                tensors[name] = torch.stack([F.pad(part, (0, 0, 0, longest - len(part))) for part in parts])
                places = torch.arange(longest, device=parts[0].device)
                tensors[RAGGED[name]] = torch.stack([places < len(part) for part in parts])
            else:
                tensors[name] = torch.stack(parts)
        stacked = cls(tensors, size=len(rows))
        stacked.is_unpadded = bool(alike) and all(alike)
        return stacked

    @classmethod
    def join(cls, *parts: "Condition") -> Self:
        """The samples of all parts, one after the other."""
        return cls.stack([part.row(i) for part in parts for i in range(part.size)])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """On another device; floating tensors in another dtype."""
        moved = {
            name: (tensor if device is None else upload(tensor, device)).to(
                dtype=dtype if tensor.is_floating_point() else None
            )
            for name, tensor in self.tensors.items()
        }
        other = type(self)(moved, size=self.size, negative=self.negative and self.negative.to(device, dtype))
        other.is_unpadded = self.is_unpadded
        return other
