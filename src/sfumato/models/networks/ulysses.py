"""Ulysses: processes share the tokens of one sample; before attention they exchange tokens for heads.

Each process has a part of the tokens, of all heads; for attention it has all tokens, of its heads alone; then
back (arXiv:2309.14509). Every process ends with the whole answer, and with that part of each weight's
gradient that comes from its tokens: the sum over the processes is the gradient.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sfumato.errors import Refused


class Ulysses:
    """The processes that share a sample, as one of them sees them.

    Args:
        group: a process group of torch.
    """

    def __init__(self, group: Any) -> None:
        self.group, self.count, self.place = group, dist.get_world_size(group), dist.get_rank(group)

    def local_part(self, x: Tensor, dim: int) -> Tensor:
        """This process's part of x along a dimension.

        Raises:
            Refused: it cannot be shared evenly.
        """
        if x.shape[dim] % self.count:
            raise Refused(uneven(x.shape[dim], self.count))
        return x.chunk(self.count, dim)[self.place]

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The parts of all processes, joined; the inverse of `local_part`."""
        found: Tensor = _Joined.apply(x, dim, self)  # pyright: ignore[reportAssignmentType]
        return found

    def by_heads(self, x: Tensor) -> Tensor:
        """[B, heads, n, d] of own tokens → [B, heads / count, N, d] of all tokens."""
        sent = x.unflatten(1, (self.count, -1)).transpose(0, 1)
        return _exchanged(sent, self).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def by_tokens(self, x: Tensor) -> Tensor:
        """The inverse of `by_heads`."""
        sent = x.unflatten(2, (self.count, -1)).permute(2, 0, 1, 3, 4)
        return _exchanged(sent, self).transpose(0, 1).flatten(1, 2)


def uneven(tokens: int, count: int) -> str:
    """The sentence about a sequence that cannot be shared."""
    return (
        f"A sample of {tokens:,} tokens cannot be shared evenly by {count} processes "
        "(train.context_parallel). Choose "
        f"a size or number of frames whose tokens are a multiple of {count}, or another "
        "train.context_parallel."
    )


def check_heads(heads: int, count: int) -> None:
    """Raises Refused unless so many heads of our DiT can be shared evenly."""
    if heads % count:
        raise Refused(
            f"train.context_parallel = {count} gives each process some of the attention heads, but this DiT "
            f"has {heads}. Choose a divisor of {heads}, or another model.heads."
        )


class _Exchanged(torch.autograd.Function):
    """Part i of [count, …] goes to process i; the gradient goes back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, among: Ulysses) -> Tensor:
        ctx.among = among
        x = x.contiguous()
        found = torch.empty_like(x)
        dist.all_to_all_single(found, x, group=among.group)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _exchanged(gradients[0], ctx.among), None


def _exchanged(x: Tensor, among: Ulysses) -> Tensor:
    found: Tensor = _Exchanged.apply(x, among)  # pyright: ignore[reportAssignmentType]
    return found


class _Joined(torch.autograd.Function):
    """All parts along a dimension. What follows is the same in every process, so that each takes back the
    gradient of its own part.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, among: Ulysses) -> Tensor:
        ctx.dim, ctx.among = dim, among
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(among.count)]
        dist.all_gather(parts, x.contiguous(), group=among.group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].chunk(ctx.among.count, ctx.dim)[ctx.among.place].contiguous(), None, None
