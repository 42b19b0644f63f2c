"""Weights stored narrow with a scale beside them (scaled fp8): what they stand for.

    W = w · s        w: float8 (or int8), s: one number, one of each row, or one of each block

Layouts: ComfyUI's `X.scale_weight` (marker `scaled_fp8`) and `X.weight_scale` (`X.comfy_quant`), of blocks
[rows, blocks, 1] musubi-tuner's, of rows compressed-tensors', and `X.weight_scale_inv`, of blocks of 128×128,
which is a factor too. Scales of activations (`X.scale_input`, `X.input_scale`) are of no use to weights.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import Refused

SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
ACTIVATIONS = (".scale_input", ".input_scale", ".comfy_quant")
"""Ends of keys that stand beside a scaled weight and do not change it."""
MARKER = "scaled_fp8"
BLOCK = 128
"""The side of a block of `weight_scale_inv` (DeepSeek-V3, arXiv:2412.19437, section 3.3.2)."""


def weight_of(key: str) -> str:
    """The name of the weight that a key scales; empty where it is no scale."""
    end = next((end for end in SCALES if key.endswith(end)), "")
    return f"{key.removesuffix(end)}.weight" if end else ""


def is_beside_scale(key: str) -> bool:
    """Whether a key belongs to the storage of scaled weights and changes none of them."""
    return key.endswith(ACTIVATIONS) or key.rpartition(".")[2] == MARKER


def check_format(key: str, told: Tensor, source: Any) -> None:
    """Raises Refused where ComfyUI's JSON beside a weight says that it is stored otherwise."""
    try:
        kind = json.loads(bytes(told.flatten().to(torch.uint8).tolist())).get("format", "")
    except (ValueError, AttributeError, RecursionError):
        kind = "unreadable"
    if not str(kind).startswith("float8"):
        raise Refused(
            f'{source}: {key} says that its weight is stored as "{str(kind)[:40]}", and only float8 with '
            "scales "
            "is read. Give a file in bf16, fp16 or scaled fp8."
        )


def scaled(weight: Tensor, scale: Tensor, key: str, source: Any) -> Tensor:
    """weight · scale in float32.

    Args:
        weight: [rows, columns, …]. scale: one number, [rows], [rows, 1, …], [rows, blocks, 1], or one of each
            block of 128×128.
    Raises:
        Refused: another shape, a weight that is packed (several numbers a byte), a scale that is not finite.
    """
    if weight.dtype in (torch.uint8, torch.bool):
        raise Refused(
            f"{source}: {key} scales a weight of packed bytes, which is not read. Give a file in bf16, fp16 "
            "or scaled fp8."
        )
    wide, factor = weight.float(), scale.float()
    if not bool(torch.isfinite(factor).all()):
        raise Refused(f"{source}: {key} is not finite, so its weight is lost. Get the file again.")
    rows = weight.shape[0] if weight.ndim else 1
    if factor.numel() == 1:
        return wide * factor.reshape(())
    if factor.numel() == rows == factor.shape[0]:
        return wide * factor.reshape(-1, *[1] * (wide.ndim - 1))
    if factor.ndim == 3 and factor.shape[0] == rows and factor.shape[2] == 1 and wide.ndim == 2:
        blocks = factor.shape[1]
        if blocks and wide.shape[1] % blocks == 0:
            return (wide.view(rows, blocks, -1) * factor).view_as(wide)
    of_blocks = tuple(-(-side // BLOCK) for side in wide.shape)
    if wide.ndim == 2 and tuple(factor.shape) == of_blocks:
        whole = factor.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return wide * whole[: wide.shape[0], : wide.shape[1]]
    raise Refused(
        f"{source}: {key} is of shape {list(scale.shape)} beside a weight of {list(weight.shape)}; scales "
        "of a whole weight, of its rows or of its blocks are read. Give the model in bf16 or fp16."
    )


def dequantize(tensors: Mapping[str, Tensor], dtype: torch.dtype, source: Any) -> dict[str, Tensor]:
    """The same weights without scales: each scaled one as it was before it was stored, in `dtype`.

    A scale whose weight is not there stays, for whoever asks what was left over.

    Raises:
        Refused: scales of a kind that is not known.
    """
    if not any(weight_of(key) or is_beside_scale(key) for key in tensors):
        return dict(tensors)
    found = {
        key: tensor
        for key, tensor in tensors.items()
        if weight_of(key) not in tensors and not is_beside_scale(key)
    }
    for key, scale in tensors.items():
        if key.endswith(".comfy_quant"):
            check_format(key, scale, source)
        if (name := weight_of(key)) in tensors:
            found[name] = scaled(tensors[name], scale, key, source).to(dtype)
    return found


@torch.no_grad()
def apply_scales(network: torch.nn.Module, scales: Mapping[str, Tensor], source: Any) -> set[str]:
    """Multiply loaded weights by the scales of their file; returns the names of those weights.

    Names may have a prefix that the network does not, or lack one that it has.

    Raises:
        Refused: scales of a kind that is not known.
    """
    weights = dict(network.named_parameters())
    applied: set[str] = set()
    for key, scale in scales.items():
        if key.endswith(".comfy_quant"):
            check_format(key, scale, source)
        name = network_name(weight_of(key), weights) if weight_of(key) else ""
        if not name or name in applied:
            continue
        weight = weights[name]
        weight.data = scaled(weight.data, scale.to(weight.device), key, source).to(
            weight.dtype if weight.dtype.itemsize > 1 else torch.float32
        )
        applied.add(name)
    return applied


def network_name(name: str, known: Iterable[str]) -> str:
    """What the network calls the weight of a file; empty where it has none."""
    kept, words = set(known), name.split(".")
    short = next((".".join(words[i:]) for i in range(len(words) - 1) if ".".join(words[i:]) in kept), "")
    longer = [one for one in kept if one.endswith(f".{name}")] if not short else []
    return short or (longer[0] if len(longer) == 1 else "")
