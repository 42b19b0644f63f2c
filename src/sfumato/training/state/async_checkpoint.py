"""Saving beside the steps: what is copied in a moment is written while the run goes on.

The copy is what the weights were; the thread writes, synchronises, checks and renames. One save waits for
the one before it, and a problem of the disk is raised where the run next looks.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.run_folder import RunFolder
from sfumato.training.device import free_bytes
from sfumato.training.distributed.sharding import Shards
from sfumato.training.state import checkpoint, sharded_checkpoint
from sfumato.training.state.checkpoint import CheckpointRetention, Tensors

SHARE_OF_MEMORY = 0.4
"""Of the memory that is free, what a copy may take; above it, saving waits instead."""


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of a run.

    Args:
        background: write beside the steps where there is memory for a copy.
        shards: of a divided network, every process writes its own part.
    """

    run: RunFolder
    background: bool = True
    shards: Shards | None = None
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False)
    _writing: tuple[int, CheckpointRetention, Future[Path]] | None = field(default=None, repr=False)

    def save(
        self,
        step: int,
        groups: Mapping[str, Tensors],
        state: Mapping[str, Any],
        keep: CheckpointRetention,
        has_more_steps: bool = True,
    ) -> None:
        """Save the checkpoint of `step`; what was begun before is finished first.

        Args:
            has_more_steps: steps follow, so that a copy is worth its memory.
        Raises:
            Failed: the disk has no room for it. Refused: it is not writable.
        """
        self.wait()
        if self.shards is not None:
            self._save_part(self.shards, step, groups, state, keep)
            return
        if not (self.background and has_more_steps and fits_in_memory(groups)):
            checkpoint.save(self.run, step, groups, state, keep)
            return
        folder = checkpoint.prepare(self.run, step, groups)
        self._write_beside(step, keep, _write, folder, HostCopy(groups), {"step": step, **state})

    def _save_part(
        self,
        shards: Shards,
        step: int,
        groups: Mapping[str, Tensors],
        state: Mapping[str, Any],
        keep: CheckpointRetention,
    ) -> None:
        """Save the rows that this process holds; all begin together, and each writes beside its steps."""
        folder, whole = self.run.checkpoint_folder(step), {"step": step, **state}
        sharded_checkpoint.begin(folder, groups, shards.processes)
        mine, firsts = sharded_checkpoint.local_shards(shards, groups)
        if self.background and fits_in_memory(mine):
            self._write_beside(
                step,
                keep,
                _write_part,
                folder,
                HostCopy(mine),
                firsts,
                whole,
                shards.processes,
            )
            return
        sharded_checkpoint.write(folder, mine, firsts, whole, shards.processes)
        self._publish(step, keep)

    def _write_beside(
        self, step: int, keep: CheckpointRetention, work: Callable[..., Path], *given: Any
    ) -> None:
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="save")
        self._writing = step, keep, self._pool.submit(work, *given)

    def _publish(self, step: int, keep: CheckpointRetention) -> None:
        """Let the run know; of many processes the leading one."""
        if self.shards is None or self.shards.processes.is_rank_zero:
            checkpoint.publish(self.run, step, keep)

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            Failed, Refused: what was being written could not be.
        """
        if self._writing is not None:
            step, keep, writing = self._writing
            self._writing = None
            writing.result()
            self._publish(step, keep)

    def finish_if_written(self) -> None:
        """Finish what is written, without waiting for what is not."""
        if self._writing is not None and self._writing[2].done():
            self.wait()

    def close(self) -> None:
        """Let a checkpoint that is being written be finished; its problems are left to the next run."""
        if self._writing is not None:
            step, keep, writing = self._writing
            self._writing = None
            if writing.exception() is None:
                self._publish(step, keep)
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _write(folder: Path, copy: "HostCopy", state: Mapping[str, Any]) -> Path:
    checkpoint.write(folder, copy.groups(), state)
    return folder


def _write_part(folder: Path, copy: "HostCopy", *rest: Any) -> Path:
    return sharded_checkpoint.write(folder, copy.groups(), *rest)


class HostCopy:
    """Tensors in host memory as they are now: a GPU's come behind the step before, and nobody waits."""

    def __init__(self, groups: Mapping[str, Tensors]) -> None:
        self._groups = {
            name: {key: _to_host(tensor.detach()) for key, tensor in tensors.items()}
            for name, tensors in groups.items()
        }
        devices = {one.device for tensors in groups.values() for one in tensors.values()}
        self._copied = [
            torch.cuda.current_stream(one).record_event() for one in devices if one.type == "cuda"
        ]

    def groups(self) -> Mapping[str, Tensors]:
        """The tensors, when they are there; on any thread."""
        for event in self._copied:
            event.synchronize()
        return self._groups


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def fits_in_memory(groups: Mapping[str, Tensors]) -> bool:
    """Whether a copy of these tensors is small beside the memory that is free."""
    return is_small_copy(checkpoint.bytes_of(groups))


def is_small_copy(size: int) -> bool:
    """Whether so many bytes of host memory may be taken for a copy."""
    return size < SHARE_OF_MEMORY * free_bytes(torch.device("cpu"))
