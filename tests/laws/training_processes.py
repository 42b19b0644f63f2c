"""A run on many processes of this machine, forked so that nothing is imported again."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # here, so that no forked process imports it
import torch.distributed.fsdp
from training_world import fingerprint, train

from sfumato.training import parallel


def _join(rank: int, count: int, port: int, job: Callable[..., None], given: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with parallel.joined("cpu"):
        job(*given)


def spread(count: int, job: Callable[..., None], *given: object) -> None:
    """Do a job on `count` processes that have joined."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_join, args=(rank, count, port, job, given)) for rank in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0


def _train(folder: Path, changes: dict[str, object]) -> None:
    train(folder, **changes)


def run_on(count: int, folder: Path, **changes: object) -> str:
    """Train on `count` processes; the fingerprint of what they end with."""
    spread(count, _train, folder, changes)
    return fingerprint(folder)
