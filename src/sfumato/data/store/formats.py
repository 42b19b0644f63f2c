"""Formats: how many bits a stored number has.

"same" keeps what the encoder gave. "int8" and "float8" share one scale among the last dimension's numbers;
reading gives float32 back.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sfumato.data.settings import FORMATS
from sfumato.errors import one_of

_PLAIN = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TOP = {"int8": 127.0, "float8": 448.0}
_KIND = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
SCALE = ".scale"


def quantize(tensors: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
    """The tensors as they are stored; integers and masks stay as they are.

    Raises:
        Refused: an unknown format.
    """
    one_of("Number format", form, FORMATS)
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or form == "same":
            stored[name] = tensor
        elif form in _PLAIN:
            stored[name] = tensor.to(_PLAIN[form])
        else:
            values = tensor.float()
            wide = values.abs().amax(-1, keepdim=True) if values.ndim else values.abs()
            scale = (wide / _TOP[form]).clamp_min(1e-30)
            scaled = values / scale
            stored[name] = (scaled.round() if form == "int8" else scaled).to(_KIND[form])
            stored[name + SCALE] = scale
    return stored


def dequantize(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `quantize` took in, its real numbers as float32."""
    return {
        name: _to_float(tensor, stored.get(name + SCALE))
        for name, tensor in stored.items()
        if not name.endswith(SCALE)
    }


def _to_float(tensor: Tensor, scale: Tensor | None) -> Tensor:
    if scale is not None:
        return tensor.float() * scale
    return tensor.float() if tensor.is_floating_point() else tensor


def quantization_error(tensors: Mapping[str, Tensor], form: str) -> float:
    """Root mean square error of storing as `form`, relative to the numbers' own root mean square."""
    back = dequantize(quantize(tensors, form))
    real = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    off = sum(float((back[name] - tensors[name].float()).square().sum()) for name in real)
    size = sum(float(tensors[name].float().square().sum()) for name in real)
    return (off / size) ** 0.5 if size else 0.0
