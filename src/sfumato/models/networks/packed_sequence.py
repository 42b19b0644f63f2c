"""Sequence packing: samples of several shapes in one sequence of tokens, each seeing its own sample alone.

Source: patch n' pack (NaViT), arXiv:2307.06304. Linear layers see the whole sequence at once. Attention goes
sample by sample in one of two ways, which are equal: those of one shape together (any device), or over the
whole sequence with a mask of documents (FlexAttention, on CUDA, where there are many shapes).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.models.networks.tokens import Angles

MAX_DENSE_GROUPS = 8
"""Shapes in a sequence up to which attention shape by shape needs no mask of documents."""


@dataclass(frozen=True)
class Group:
    """Samples of one shape: how many, the grid of their tokens, and their condition.

    per_frame_time: whether each frame has a time of its own.
    """

    count: int
    frames: int
    rows: int
    columns: int
    angles: Angles
    per_frame_time: bool
    condition: Condition

    @property
    def tokens(self) -> int:
        """Of one sample."""
        return self.frames * self.rows * self.columns

    @property
    def vectors(self) -> int:
        """How many conditioning vectors the samples have: one each, or one for each frame."""
        return self.count * (self.frames if self.per_frame_time else 1)

    @property
    def text(self) -> Tensor | None:
        """Text tokens of each [b, L, D]."""
        return self.condition.get("tokens")

    @property
    def mask(self) -> Tensor | None:
        """Which text tokens count [b, L]."""
        return self.condition.get("mask") if self.text is not None else None


def expand_to_tokens(vector: Tensor, x: Tensor) -> Tensor:
    """A vector for the tokens of x [B, N, D]: [B, D] → [B, 1, D]; of frames [B, F, D] → [B, N, D]."""
    if vector.ndim == 2:
        return vector[:, None]
    return vector.repeat_interleave(x.shape[1] // vector.shape[1], 1)


class PackedSequence:
    """How groups of samples lie in one sequence, one after the other.

    Args:
        groups: in the order of the sequence. flex: which way attention goes; default by device and shapes.
    """

    def __init__(self, groups: Sequence[Group], flex: bool | None = None) -> None:
        self.groups = list(groups)
        self.sizes = [group.count * group.tokens for group in self.groups]
        device = self.groups[0].angles[0].device
        self.flex = device.type == "cuda" and len(self.groups) > MAX_DENSE_GROUPS if flex is None else flex

    def split(self, x: Tensor) -> list[Tensor]:
        """[1, N, D] → [b, n, D] of each group."""
        parts = x[0].split(self.sizes)
        return [part.unflatten(0, (g.count, -1)) for part, g in zip(parts, self.groups, strict=True)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([part.flatten(0, 1) for part in parts])[None]

    def split_vectors(self, x: Tensor) -> list[Tensor]:
        """Vectors of samples (or of their frames), [T, D] → [b, D] (or [b, F, D]) of each group."""
        parts = x.split([group.vectors for group in self.groups])
        return [
            part.unflatten(0, (group.count, -1)) if group.per_frame_time else part
            for part, group in zip(parts, self.groups, strict=True)
        ]

    def split_samples(self, x: Tensor) -> list[Tensor]:
        """[B, …] → [b, …] of each group."""
        return list(x.split([group.count for group in self.groups]))

    def repeat_for_frames(self, x: Tensor) -> Tensor:
        """[B, D] → [T, D]: a sample's vector for each of its frames, where those have times of their own."""
        if not any(group.per_frame_time for group in self.groups):
            return x
        parts = zip(self.split_samples(x), self.groups, strict=True)
        return torch.cat([one.repeat_interleave(g.vectors // g.count, 0) for one, g in parts])

    @cached_property
    def text_tokens(self) -> Tensor | None:
        """Text tokens, one sample's after the other's: [1, M, D]; None where there is no text."""
        texts = [group.text for group in self.groups]
        return self.join([one for one in texts if one is not None]) if texts[0] is not None else None

    def modulate(self, x: Tensor, shift: Sequence[Tensor], scale: Sequence[Tensor]) -> Tensor:
        """x [1, N, D] normalised over D, then x·(1 + scale) + shift with those of each group."""
        parts = zip(self.split(F.layer_norm(x, x.shape[-1:])), shift, scale, strict=True)
        return self.join(
            [
                torch.addcmul(expand_to_tokens(b, one), one, 1 + expand_to_tokens(a, one))
                for one, b, a in parts
            ]
        )

    def add_gated(self, x: Tensor, gate: Sequence[Tensor], y: Tensor) -> Tensor:
        """x + gate · y for x, y [1, N, D], with the gate of each group."""
        parts = zip(self.split(x), gate, self.split(y), strict=True)
        return self.join([torch.addcmul(one, expand_to_tokens(g, one), other) for one, g, other in parts])

    def split_heads(self, x: Tensor) -> list[Tensor]:
        """[1, heads, N, d] → [b, heads, n, d] of each group."""
        parts = zip(x[0].split(self.sizes, 1), self.groups, strict=True)
        return [part.unflatten(1, (group.count, -1)).transpose(0, 1) for part, group in parts]

    def join_heads(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split_heads`."""
        return torch.cat([part.transpose(0, 1).flatten(1, 2) for part in parts], 1)[None]

    def split_text(self, text: tuple[Tensor, Tensor] | None) -> list[tuple[Tensor, Tensor] | None]:
        """Keys and values of all text, each [1, heads, M, d] → those of each group [b, heads, L, d]."""
        if text is None:
            return [None] * len(self.groups)
        shapes = [group.text.shape[:2] for group in self.groups if group.text is not None]
        pairs = [
            zip(one[0].split([shape.numel() for shape in shapes], 1), shapes, strict=True) for one in text
        ]
        keys, values = ([part.unflatten(1, shape).transpose(0, 1) for part, shape in one] for one in pairs)
        return list(zip(keys, values, strict=True))

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
    def document_ids(self) -> tuple[Tensor, Tensor]:
        """Whose each token is [N], and whose each key [N + M]: a sample's number, −1 for padding."""
        device, first = self.groups[0].angles[0].device, 0
        tokens, texts = [], []
        for group in self.groups:
            own = torch.arange(first, first + group.count, device=device)
            first += group.count
            tokens.append(own.repeat_interleave(group.tokens))
            if group.text is not None:
                whose = own[:, None].expand(-1, group.text.shape[1])
                whose = whose if group.mask is None else torch.where(group.mask, whose, -1)
                texts.append(whose.flatten())
        return torch.cat(tokens), torch.cat([*tokens, *texts])

    @cached_property
    def block_mask(self) -> Any:
        """FlexAttention's mask: tokens see the image and text tokens of their own sample."""
        asking, asked = self.document_ids

        def same(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return asking[query] == asked[key]

        make = _kernel("create_block_mask", asking.device)
        return make(same, None, None, len(asking), len(asked), device=str(asking.device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q [1, heads, N, d] to k, v [1, heads, N + M, d] within each sample."""
        attend = _kernel("flex_attention", q.device)
        return attend(q.to(v.dtype), k.to(v.dtype), v, block_mask=self.block_mask)


_COMPILED: dict[str, Any] = {}


def _kernel(name: str, device: torch.device) -> Any:
    """A function of torch's FlexAttention; on a GPU as one kernel, compiled for sequences of any length."""
    from torch.nn.attention import flex_attention

    plain = getattr(flex_attention, name)
    if device.type != "cuda":
        return plain
    if name not in _COMPILED:
        _COMPILED[name] = torch.compile(plain, dynamic=True)
    return _COMPILED[name]
