"""How precisely a run computes: what "auto" means, autocast, the scale of a loss."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from sfumato.errors import Refused, one_of

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
AUTO_PRECISION = "SFUMATO_AUTO_PRECISION"
"""The environment variable that says what "auto" means here: fp32, bf16 or fp16."""


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 there: GPUs, and CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    asks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, ask)() for ask in asks if hasattr(torch.cpu, ask))


def effective_precision(precision: str, device: torch.device, weights: str = "fp32") -> str:
    """One of "fp32", "bf16" and "fp16": what "auto" means on this device, for weights kept so.

    "auto" is bf16 where it is fast, unless the environment's SFUMATO_AUTO_PRECISION says otherwise: so that
    machines of several kinds compute alike.

    Raises:
        Refused: unknown precision, or one that these weights do not have.
    """
    if weights != "fp32":
        if precision in ("fp32", "fp16"):
            raise Refused(
                f'train.weight_dtype = "{weights}" computes in bf16. Leave train.precision at "auto".'
            )
        return "bf16"
    if one_of("precision", precision, PRECISIONS) != "auto":
        return precision
    if named := os.environ.get(AUTO_PRECISION):
        return one_of(AUTO_PRECISION, named, PRECISIONS[1:])
    return "bf16" if has_fast_bf16(device) else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context the network's forward pass runs in; weights and loss stay float32."""
    if precision in NARROW:
        return torch.autocast(device.type, dtype=NARROW[precision])
    return nullcontext()


@contextmanager
def computing_in(denoiser: Any, precision: str, device: torch.device) -> Iterator[None]:
    """Within it a GPU computes a denoiser's answers in this precision, where they have none of their own.

    Codec and text encoders stay as they are. A CPU computes in float32, where a moment's work gains nothing.
    """
    own = denoiser.compute_dtype
    if own is None and device.type != "cpu":
        denoiser.compute_dtype = NARROW.get(precision)
    try:
        yield
    finally:
        denoiser.compute_dtype = own


class LossScale:
    """What the loss is multiplied by, so that gradients too small for fp16 are not lost.

    It begins at 2^16 and is doubled after 2,000 steps whose gradients were finite; a step whose gradient
    overflows is left out and halves it. A power of two changes no digit of a gradient. Other precisions have
    float32's range, and a scale of 1.

    Source: Micikevicius et al. 2018, arXiv:1710.03740.
    """

    FIRST, PATIENCE = 2.0**16, 2000

    def __init__(self, precision: str) -> None:
        self.is_needed = precision == "fp16"
        self.value, self.good = (self.FIRST if self.is_needed else 1.0), 0

    def update(self, is_finite: bool) -> None:
        """Take in whether a step's gradient was finite."""
        self.good = self.good + 1 if is_finite else 0
        if not is_finite:
            self.value /= 2
        elif self.good == self.PATIENCE:
            self.value, self.good = self.value * 2, 0

    @property
    def is_exhausted(self) -> bool:
        """Whether gradients overflow even unscaled: then it is not the scale's fault."""
        return self.value < 1

    def state(self) -> list[float]:
        """What a checkpoint keeps."""
        return [self.value, self.good]

    def load(self, state: Sequence[float]) -> None:
        """Take up what a checkpoint kept."""
        self.value, self.good = float(state[0]), int(state[1])
