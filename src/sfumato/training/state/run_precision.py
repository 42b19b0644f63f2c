"""The precision of a run: what it began in, it goes on in."""

import torch

from sfumato.run_folder import RunFolder
from sfumato.training.distributed.processes import current_processes
from sfumato.training.precision import PRECISIONS, effective_precision
from sfumato.training.settings import TrainSettings
from sfumato.training.state.checkpoint import saved_precision


def precision_of(settings: TrainSettings, device: torch.device, run: RunFolder) -> str:
    """What a run computes in, the same for all its processes.

    "auto" goes on as the run's checkpoints began, so that a run that moves to a machine of another kind is
    still the same run; without a checkpoint the leading process's machine decides.

    Raises:
        Refused: as `effective_precision`.
    """
    found = effective_precision(settings.precision, device, settings.weight_dtype)
    if settings.precision == "auto" and settings.weight_dtype == "fp32":
        found = saved_precision(run) or found
    return PRECISIONS[current_processes().broadcast_number(PRECISIONS.index(found))]
