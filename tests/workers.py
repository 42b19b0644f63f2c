"""A job on many processes of this machine, forked so that nothing is imported again."""

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo  # here, so that no forked process imports it
import torch.distributed.fsdp

from sfumato.training.distributed.processes import join_processes

LONGEST = 300.0
"""Seconds that a worker may take."""


def _join(
    rank: int, count: int, port: int, error_files: Path, job: Callable[..., object], given: tuple[object, ...]
) -> None:
    os.dup2(os.open(error_files, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)  # torch's own words go there too
    torch.set_num_threads(1)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(number) for name, number in where.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with join_processes("cpu"):
        job(*given)


def run_processes(count: int, job: Callable[..., object], *given: object) -> None:
    """Do a job on `count` processes that have joined; where one fails, the test fails with their words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        error_files = [Path(folder) / f"{rank}.txt" for rank in range(count)]
        workers = [
            fork.Process(target=_join, args=(rank, count, port, error_files[rank], job, given))
            for rank in range(count)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(LONGEST)
        codes = [worker.exitcode for worker in workers]
        for worker in workers:
            worker.kill()
        if any(code != 0 for code in codes):
            words = [
                f"process {rank} of {count} {'did not end' if code is None else f'ended with {code}'}:\n"
                + (file.read_text(errors="replace") if file.exists() else "")
                for rank, (code, file) in enumerate(zip(codes, error_files, strict=True))
            ]
            pytest.fail("\n".join(words), pytrace=False)
