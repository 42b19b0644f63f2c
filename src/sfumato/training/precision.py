"""How precisely a run computes: what "auto" means, what a run began in, autocast."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from sfumato.errors import Refused, one_of
from sfumato.record import RunFolder

from . import parallel
from .checkpoint import began_in
from .settings import TrainSettings

PRECISIONS = ("auto", "fp32", "bf16")
AUTO_PRECISION = "SFUMATO_AUTO_PRECISION"
"""The environment variable that says what "auto" means here: fp32 or bf16, whatever the processor has."""


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 there: GPUs, and CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    asks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, ask)() for ask in asks if hasattr(torch.cpu, ask))


def effective_precision(precision: str, device: torch.device, weights: str = "fp32") -> str:
    """ "fp32" or "bf16": what "auto" means on this device, for weights kept so.

    "auto" is bf16 where it is fast, unless the environment's SFUMATO_AUTO_PRECISION says otherwise: so that
    machines of several kinds compute alike.

    Raises:
        Refused: unknown precision, or one that these weights do not have.
    """
    if weights != "fp32":
        if precision == "fp32":
            raise Refused(f'train.weights = "{weights}" computes in bf16. Leave train.precision at "auto".')
        return "bf16"
    if one_of("precision", precision, PRECISIONS) != "auto":
        return precision
    if told := os.environ.get(AUTO_PRECISION):
        return one_of(AUTO_PRECISION, told, PRECISIONS[1:])
    return "bf16" if has_fast_bf16(device) else "fp32"


def precision_of(settings: TrainSettings, device: torch.device, run: RunFolder) -> str:
    """What a run computes in, the same for all its processes.

    "auto" goes on as the run's checkpoints began, so that a run that moves to a machine of another kind is
    still the same run; without a checkpoint the leading process's machine decides.

    Raises:
        Refused: as `effective_precision`.
    """
    found = effective_precision(settings.precision, device, settings.weights)
    if settings.precision == "auto" and settings.weights == "fp32":
        found = began_in(run) or found
    return PRECISIONS[parallel.current().agree(PRECISIONS.index(found))]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context the network's forward pass runs in; weights and loss stay float32."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
