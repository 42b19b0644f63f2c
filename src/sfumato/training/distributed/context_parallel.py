"""Context parallel: the processes of a group share the tokens of each sample, for clips that fit into no one.

All of a group draw the same samples, times and noise, and end with the same answer and loss; each has the
part of the gradient that comes from its tokens. The sum over all processes is the batch's gradient, as it is
without, so that copies and divided networks, checkpoints and restarts need know nothing of it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from sfumato.errors import Refused
from sfumato.models.interface import Denoiser
from sfumato.training.distributed.processes import Processes, join_processes, shared_samples
from sfumato.training.settings import TrainSettings


def check(settings: TrainSettings, count: int) -> None:
    """Raises Refused unless so many processes can share samples as the settings say."""
    group_size = settings.context_parallel
    if group_size == 1:
        return
    others = {
        "train.exact_elastic": (settings.exact_elastic, "adds whole gradients of parts in one tree"),
        "train.sequence_packing": (settings.sequence_packing, "joins many samples in one sequence"),
        "train.compile": (settings.compile, "cannot follow what processes send each other inside a block"),
        "train.offload": (settings.offload, "lends one process whole blocks while others wait for it"),
    }
    for name, (is_asked, why) in others.items():
        if is_asked:
            raise Refused(
                f"train.context_parallel shares each sample among processes; {name} {why}. Leave one out."
            )
    if count % group_size or count < group_size:
        raise Refused(
            f"train.context_parallel = {group_size} lets {group_size} processes share each sample, but "
            f"{_many(count)} started. Start a multiple of {group_size}: "
            f"torchrun --nproc-per-node {group_size} -m sfumato train … "
            f"(to plan it: sfumato plan … --devices {group_size})."
        )


def _many(count: int) -> str:
    return "1 process was" if count == 1 else f"{count} processes were"


@contextmanager
def enabled_for_training(network: nn.Module, settings: TrainSettings, processes: Processes) -> Iterator[None]:
    """Inside it the processes of a group share each sample that the network is asked about.

    Raises:
        Refused: the network cannot, or the processes are too few or many.
    """
    check(settings, processes.count)
    with enabled(network, settings.context_parallel, processes):
        yield


@contextmanager
def drawing_processes(group_size: int, device: str) -> Iterator[Processes]:
    """The processes that torchrun started, joined if so many of them draw each picture together.

    Raises:
        Refused: there are more or fewer.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if group_size == 1:
        yield Processes(int(os.environ.get("RANK", "0")))
        return
    if started != group_size:
        raise Refused(
            f"--context-parallel {group_size} lets {group_size} processes draw each picture together, but "
            f"{_many(started)} started. Say torchrun --nproc-per-node {group_size} -m sfumato generate … "
            f"--context-parallel {group_size}."
        )
    with join_processes(device) as processes:
        yield processes


@contextmanager
def enabled(network: nn.Module, group_size: int, processes: Processes) -> Iterator[None]:
    """Inside it groups of so many processes share each sample; raises Refused if the network cannot."""
    if group_size == 1:
        yield
        return
    # Importing it takes a while, which runs that need none of it should not wait for.
    from torch.distributed.device_mesh import init_device_mesh

    names = ("groups", "ring", "ulysses")
    kind = next(network.parameters()).device.type
    mesh = init_device_mesh(kind, (processes.count // group_size, 1, group_size), mesh_dim_names=names)
    denoiser = cast(Denoiser, network)
    denoiser.enable_context_parallel(mesh["ring", "ulysses"])
    try:
        with shared_samples(group_size):
            yield
    finally:
        denoiser.enable_context_parallel(None)
