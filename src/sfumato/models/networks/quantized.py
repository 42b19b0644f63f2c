"""Frozen weights in few bits: stored narrow, widened when a layer is asked, and again in its backward pass.

bfloat16 keeps 16 bits of each number. int8 and fp8 keep 8, with one scale for each row; nf4 keeps 4, the
quantiles of a normal distribution, with one scale for 64 neighbors (arXiv:2305.14314, appendix E). Only the
linear layers of the repeated blocks are stored narrow: what enters, leaves and normalizes stays as it is.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.models.networks.blocks import blocks_of

FORMS = ("float32", "bfloat16", "int8", "fp8", "nf4")
GROUP = 64
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""NF4: the numbers that 4 bits stand for."""


@lru_cache(maxsize=16)
def _level_pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[256, 2]: the two numbers that each byte of codes stands for; copied to a device once."""
    levels = torch.tensor(LEVELS, dtype=dtype)
    byte = torch.arange(256)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], 1).to(device)


def quantize(weight: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a matrix [out, in] in the form "int8", "fp8" or "nf4"."""
    if form == "nf4":
        flat = F.pad(weight.flatten(), (0, -weight.numel() % GROUP)).view(-1, GROUP)
        scales = flat.abs().amax(1, keepdim=True).clamp_min(1e-12)
        levels = torch.tensor(LEVELS, device=weight.device)
        middles = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize((flat / scales).contiguous(), middles).to(torch.uint8).flatten()
        return codes[::2] * 16 + codes[1::2], scales
    top = 127.0 if form == "int8" else torch.finfo(torch.float8_e4m3fn).max
    scales = (weight.abs().amax(1, keepdim=True) / top).clamp_min(1e-12)
    scaled = weight / scales
    return (scaled.round().to(torch.int8) if form == "int8" else scaled.to(torch.float8_e4m3fn)), scales


def dequantize(codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] that the codes stand for."""
    if codes.dtype != torch.uint8:
        return codes.to(dtype) * scales.to(dtype)
    pairs = _level_pairs(codes.device, dtype).index_select(0, codes.int())
    flat = (pairs.view(-1, GROUP) * scales.to(dtype)).flatten()
    return flat[: shape[0] * shape[1]].view(shape)


class _Product(torch.autograd.Function):
    """x·Wᵀ; the wide W is made again for the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.shape, ctx.dtype, device = shape, x.dtype, x.device.type
        if device not in ("cpu", "meta") and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))  # or the weights are made wide and then narrow again
        return F.linear(x, dequantize(codes, scales, shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        codes, scales = ctx.saved_tensors
        wide = dequantize(codes, scales, ctx.shape, outputs[0].dtype)
        return (outputs[0] @ wide).to(ctx.dtype), None, None, None


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weights are codes; `weight` dequantizes them."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def of(cls, layer: nn.Linear, form: str, device: torch.device | None = None) -> None:
        """Make this very layer narrow, in its place; on a device where its wide weights are for a moment."""
        codes, scales = quantize(layer.weight.detach().to(device, torch.float32), form)
        del layer.weight
        layer.register_buffer("codes", codes)
        layer.register_buffer("scales", scales)
        layer.__class__ = cls

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in] float32."""
        return dequantize(self.codes, self.scales, (self.out_features, self.in_features), torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        out = _Product.apply(input, self.codes, self.scales, (self.out_features, self.in_features))
        assert isinstance(out, Tensor)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def quantize_frozen(network: nn.Module, form: str, device: torch.device | None = None) -> torch.dtype | None:
    """Store the frozen weights of a network in `form`, trained ones untouched.

    Args:
        device: where the codes are made and stay; by default where the weights are.
    Returns:
        the dtype that the network computes in, None for its own.
    Raises:
        Refused: nothing of it can be stored so, or this torch knows no fp8.
    """
    if form == "float32":
        return None
    if form == "bfloat16":
        wide = tuple(getattr(network, "_keep_in_fp32_modules", None) or ())
        for name, weight in network.named_parameters():
            if not weight.requires_grad and not any(part in name for part in wide):
                weight.data = weight.data.bfloat16()
        return torch.bfloat16
    if form == "fp8" and not hasattr(torch, "float8_e4m3fn"):
        raise Refused(
            'model.base_quantization = "fp8": this torch has no 8 bit floats. Choose "int8" or "nf4".'
        )
    count = 0
    for block in blocks_of(network):
        for layer in [part for part in block.modules() if type(part) is nn.Linear]:
            if not layer.weight.requires_grad:
                QuantizedLinear.of(layer, form, device)
                count += 1
    if not count:
        raise Refused(
            f'model.base_quantization = "{form}": {type(network).__name__} has no frozen linear layer in its '
            "blocks. Leave model.base_quantization out."
        )
    return None
