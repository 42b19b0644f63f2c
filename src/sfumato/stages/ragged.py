"""Ragged: samples of several shapes as one sequence of tokens, each attending to its own sample alone.

Source: patch n' pack (NaViT), arXiv:2307.06304. Linear layers see the whole sequence at once. Attention goes
sample by sample in one of two ways, which are equal: those of one shape together (any device), or over the
whole sequence with a mask of documents (FlexAttention, on CUDA, where there are many shapes).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .condition import Condition
from .positions import Angles

FEW = 8
"""Shapes in a sequence up to which attention shape by shape needs no mask of documents."""


@dataclass(frozen=True)
class Group:
    """Samples of one shape: how many, the grid of their tokens, and what they are told.

    apart: whether each frame is told a time of its own.
    """

    count: int
    frames: int
    rows: int
    columns: int
    angles: Angles
    apart: bool
    condition: Condition

    @property
    def tokens(self) -> int:
        """Of one sample."""
        return self.frames * self.rows * self.columns

    @property
    def told(self) -> int:
        """How many vectors the samples are told: one each, or one for each frame."""
        return self.count * (self.frames if self.apart else 1)

    @property
    def text(self) -> Tensor | None:
        """The words of each [b, L, D]."""
        return self.condition.get("tokens")

    @property
    def mask(self) -> Tensor | None:
        """Which words count [b, L]."""
        return self.condition.get("mask") if self.text is not None else None


class Ragged:
    """How groups of samples lie in one sequence, one after the other.

    Args:
        groups: in the order of the sequence. flex: which way attention goes; default by device and shapes.
    """

    def __init__(self, groups: Sequence[Group], flex: bool | None = None) -> None:
        self.groups = list(groups)
        self.sizes = [group.count * group.tokens for group in self.groups]
        device = self.groups[0].angles[0].device
        self.flex = device.type == "cuda" and len(self.groups) > FEW if flex is None else flex

    def split(self, x: Tensor) -> list[Tensor]:
        """[1, N, D] → [b, n, D] of each group."""
        parts = x[0].split(self.sizes)
        return [part.unflatten(0, (g.count, -1)) for part, g in zip(parts, self.groups, strict=True)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([part.flatten(0, 1) for part in parts])[None]

    def told(self, x: Tensor) -> list[Tensor]:
        """What samples (or their frames) are told, [T, D] → [b, D] (or [b, F, D]) of each group."""
        parts = x.split([group.told for group in self.groups])
        return [
            part.unflatten(0, (group.count, -1)) if group.apart else part
            for part, group in zip(parts, self.groups, strict=True)
        ]

    @cached_property
    def said(self) -> Tensor | None:
        """All words, one sample's after the other's: [1, M, D]; None where nothing is said."""
        texts = [group.text for group in self.groups]
        return self.join([one for one in texts if one is not None]) if texts[0] is not None else None

    def words(self, x: Tensor) -> list[Tensor]:
        """[1, M, D] → [b, L, D] of each group."""
        shapes = [group.text.shape[:2] for group in self.groups if group.text is not None]
        parts = x[0].split([shape.numel() for shape in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]

    # ------------------------------------------------------------------------- documents

    @cached_property
    def angles(self) -> Angles:
        """Of all tokens in the sequence [N, head/2]."""
        cosines, sines = zip(
            *([turned.repeat(group.count, 1) for turned in group.angles] for group in self.groups),
            strict=True,
        )
        return torch.cat(cosines), torch.cat(sines)

    @cached_property
    def documents(self) -> tuple[Tensor, Tensor]:
        """Whose each token is [N], and whose each key [N + M]: a sample's number, −1 for a word not said."""
        device, first = self.groups[0].angles[0].device, 0
        tokens, words = [], []
        for group in self.groups:
            own = torch.arange(first, first + group.count, device=device)
            first += group.count
            tokens.append(own.repeat_interleave(group.tokens))
            if group.text is not None:
                whose = own[:, None].expand(-1, group.text.shape[1])
                whose = whose if group.mask is None else torch.where(group.mask, whose, -1)
                words.append(whose.flatten())
        return torch.cat(tokens), torch.cat([*tokens, *words])

    @cached_property
    def block_mask(self) -> Any:
        """FlexAttention's mask: tokens see the tokens and words of their own sample."""
        from torch.nn.attention.flex_attention import create_block_mask

        asking, asked = self.documents

        def same(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return asking[query] == asked[key]

        return create_block_mask(same, None, None, len(asking), len(asked), device=str(asking.device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q [1, heads, N, d] to k, v [1, heads, N + M, d] within each sample."""
        return _flex(q.device.type)(q, k, v, block_mask=self.block_mask)


_COMPILED: dict[str, Any] = {}


def _flex(kind: str) -> Any:
    """torch's FlexAttention; on a GPU as one kernel, compiled once for sequences of any length."""
    from torch.nn.attention.flex_attention import flex_attention

    if kind != "cuda":
        return flex_attention
    if kind not in _COMPILED:
        _COMPILED[kind] = torch.compile(flex_attention, dynamic=True)
    return _COMPILED[kind]
