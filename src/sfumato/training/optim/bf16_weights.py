"""Weights in bfloat16 that still learn: the optimizer moves float32 copies of them.

A step of Adam is about a learning rate long, and bfloat16 keeps 8 bits: most steps would be lost to
rounding. Two remedies. Masters: the float32 copy stays, and the weight is its rounding. Stochastic: the
copy is made for the step alone and rounded up or down at random, so that the expected weight is the one
that float32 would have (arXiv:2010.06192); no memory is needed for it.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

NUMBERS_AT_ONCE = 50_000_000
"""Weights whose float32 copies exist at the same time, in stochastic mode."""


@torch.no_grad()
def to_bfloat16(network: nn.Module) -> None:
    """Keep the trained matrices in bfloat16; vectors are few, and stay float32."""
    for weight in network.parameters():
        if weight.requires_grad and weight.ndim >= 2:
            weight.data = weight.data.to(torch.bfloat16)


@torch.no_grad()
def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 → bfloat16, up with the probability of what rounding down would lose."""
    bits = values.contiguous().view(torch.int32)
    dice = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = ((bits + dice) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))


class MasterWeights:
    """float32 stand-ins for weights that are kept in bfloat16.

    Args:
        named: the trained weights. are_kept: whether the float32 values stay between steps (masters).
    """

    def __init__(self, named: Mapping[str, nn.Parameter], are_kept: bool) -> None:
        self.are_kept = are_kept
        self.weights = dict(named)
        self.named: dict[str, nn.Parameter] = {
            name: nn.Parameter(weight.detach().float()) if weight.dtype == torch.bfloat16 else weight
            for name, weight in named.items()
        }
        self._pairs = {
            id(stand_in): (number, self.weights[name], stand_in)
            for number, (name, stand_in) in enumerate(self.named.items())
            if stand_in is not self.weights[name]
        }

    def chunks(self) -> Iterator[dict[str, nn.Parameter]]:
        """The weights, in parts small enough to be copied at once."""
        part: dict[str, nn.Parameter] = {}
        size = 0
        for name, weight in self.named.items():
            if part and size + weight.numel() > NUMBERS_AT_ONCE and not self.are_kept:
                yield part
                part, size = {}, 0
            part[name] = weight
            size += weight.numel()
        yield part

    @torch.no_grad()
    def load_gradients(self, part: torch.optim.Optimizer) -> None:
        """Give the stand-ins of `part` their weights' gradients, and where they are not kept, values."""
        for _, weight, stand_in in self._of(part):
            if not self.are_kept:
                stand_in.data = weight.detach().float()
            stand_in.grad = None if weight.grad is None else weight.grad.float()

    @torch.no_grad()
    def round_into_weights(self, part: torch.optim.Optimizer, step: int) -> None:
        """Round the stand-ins of `part` into their weights."""
        for number, weight, stand_in in self._of(part):
            if self.are_kept:
                weight.copy_(stand_in)
            else:
                dice = torch.Generator(weight.device)
                dice.manual_seed((step * 1_000_003 + number) & (2**63 - 1))
                weight.copy_(round_stochastically(stand_in.detach(), dice))
            stand_in.grad = None

    def release(self, part: torch.optim.Optimizer) -> None:
        """Give the memory of stand-ins that are not kept back."""
        if not self.are_kept:
            for _, weight, stand_in in self._of(part):
                stand_in.data = weight.data

    def _of(self, part: torch.optim.Optimizer) -> Iterator[tuple[int, nn.Parameter, nn.Parameter]]:
        for group in part.param_groups:
            for weight in group["params"]:
                if id(weight) in self._pairs:
                    yield self._pairs[id(weight)]

    def state(self) -> dict[str, Tensor]:
        """The float32 values that are kept, by the weights' names."""
        if not self.are_kept:
            return {}
        return {name: one.detach() for name, one in self.named.items() if one is not self.weights[name]}

    @torch.no_grad()
    def load(self, masters: Mapping[str, Tensor]) -> None:
        """Continue from `state()`; a weight without an entry is its own master."""
        for _, weight, stand_in in self._pairs.values():
            stand_in.data = weight.detach().float()
        for name, value in masters.items():
            if self.are_kept and name in self.named:
                self.named[name].copy_(value)
