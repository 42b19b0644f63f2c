"""How processes share a run: each a whole copy (ddp), or each some rows of every weight (fsdp, hsdp).

Whole copies talk least: one sum of gradients a step. Divided ones need a fraction of the memory, and gather
each block's weights when it is computed. Hybrid divides among the processes of a machine, and sums gradients
between machines.
"""

import os
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from sfumato.errors import Refused
from sfumato.training.distributed.processes import Processes
from sfumato.training.optim.optimizers import OPTIMIZERS, spec_of
from sfumato.training.settings import TrainSettings

ROOM = 0.3
"""The share of a device's memory that weights, gradients, moments and averages may take in whole copies."""


@dataclass(frozen=True)
class Strategy:
    """How processes share the run: "one", "exact", "ddp", "fsdp" or "hsdp"; why in a half sentence.

    shard_size: hsdp: processes that share one copy; 0 otherwise.
    """

    name: str
    why: str
    shard_size: int = 0

    @property
    def is_divided(self) -> bool:
        """Whether each process holds only some rows of the weights."""
        return self.name in ("fsdp", "hsdp")

    def share(self, count: int) -> int:
        """Among how many processes one copy of weights, gradients, moments and averages is divided."""
        return {"fsdp": count, "hsdp": self.shard_size}.get(self.name, 1)


def choose(settings: TrainSettings, network: nn.Module, processes: Processes) -> Strategy:
    """What `train.parallel` says, or what suits this network on these processes.

    Raises:
        Refused: what is asked for cannot be, and what can.
    """
    count, wanted = processes.count, settings.parallel
    if wanted in ("fsdp", "hsdp"):
        _check(settings)
    if count == 1:
        return Strategy("one", "one process")
    if settings.exact_elastic:
        return Strategy("exact", "train.exact_elastic adds whole gradients in one tree")
    if wanted == "ddp":
        return Strategy("ddp", "train.parallel says so")
    if wanted == "fsdp":
        return Strategy("fsdp", "train.parallel says so")
    if wanted == "hsdp":
        return Strategy("hsdp", "train.parallel says so", _shard_size(settings, count))
    return _suitable(settings, network, count)


def _suitable(settings: TrainSettings, network: nn.Module, count: int) -> Strategy:
    """What "auto" means: whole copies as long as they are small beside a device's memory."""
    trained = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    everything = sum(weight.numel() for weight in network.parameters())
    if trained < everything / 10:
        return Strategy("ddp", f"an adapter: {trained / max(1, everything):.1%} of the weights are trained")
    need = trained * spec_of(settings.optimizer).bytes_per_weight
    memory = memory_of(next(network.parameters()).device) / processes_here(count, network)
    reason = f"weights, gradients and moments are {need / 1e9:.2g} GB of a device's {memory / 1e9:.2g} GB"
    if need <= ROOM * memory:
        return Strategy("ddp", reason)
    try:
        _check(settings)
    except Refused as refusal:
        return Strategy("ddp", f"{reason}, but {str(refusal).partition('. ')[0]}")
    here = processes_per_machine(count)
    if here < count and need / here <= ROOM * memory:
        return Strategy("hsdp", f"{reason}, divided among a machine's {here} processes", here)
    return Strategy("fsdp", reason)


def _check(settings: TrainSettings) -> None:
    """Raises Refused for settings that need whole weights."""
    name = settings.parallel if settings.parallel != "auto" else "fsdp"
    if settings.exact_elastic:
        raise Refused(
            f"train.exact_elastic adds whole gradients in one fixed tree; train.parallel = "
            f'"{name}" has no whole gradients. Leave one of them out.'
        )
    if settings.weight_dtype != "fp32":
        raise Refused(
            f'train.parallel = "{name}" divides weights in float32 and computes in bfloat16 where '
            f'train.precision says so; train.weight_dtype = "{settings.weight_dtype}" is not needed with it. '
            'Say train.weight_dtype = "fp32", or train.parallel = "ddp".'
        )
    if not spec_of(settings.optimizer).is_elementwise:
        possible = ", ".join(name for name, one in OPTIMIZERS.items() if one.is_elementwise)
        raise Refused(
            f'train.optimizer = "{settings.optimizer}" looks at whole matrices, of which each process of '
            f'train.parallel = "{name}" has some rows. Choose {possible}, or '
            'train.parallel = "ddp".'
        )
    if settings.offload:
        raise Refused(
            f'train.offload lends whole blocks to a GPU; train.parallel = "{name}" divides them. '
            'Leave train.offload out, or say train.parallel = "ddp".'
        )


def _shard_size(settings: TrainSettings, count: int) -> int:
    """Processes that share one copy.

    Raises:
        Refused: the others cannot be divided into copies of as many.
    """
    shard_size = settings.hsdp_shard_size or processes_per_machine(count)
    if shard_size < 2 or count % shard_size:
        raise Refused(
            f'train.parallel = "hsdp" with {count} processes: copies of {shard_size} processes each cannot '
            "be made of them. Say train.hsdp_shard_size, a divisor of the number of processes above 1."
        )
    return shard_size


def processes_per_machine(count: int) -> int:
    """Processes on each machine, as torchrun says; all of them where it says nothing."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count))


def processes_here(count: int, network: nn.Module) -> int:
    """Among how many processes this device's memory is shared: a GPU is one process's own."""
    return 1 if next(network.parameters()).device.type == "cuda" else processes_per_machine(count)


def memory_of(device: torch.device) -> float:
    """Bytes that a device has."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(psutil.virtual_memory().total)
