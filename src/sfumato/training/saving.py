"""Saving beside the steps: what is copied in a moment is written while the run goes on.

The copy is what the weights were; the thread writes, synchronises, checks and renames. One save waits for
the one before it, and a problem of the disk is raised where the run next looks.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.record import RunFolder

from . import checkpoint
from .checkpoint import Keep, Tensors

SHARE_OF_MEMORY = 0.4
"""Of the memory that is free, what a copy may take; above it, saving waits instead."""


@dataclass
class Saver:
    """Writes the checkpoints of a run.

    Args:
        background: write beside the steps where there is memory for a copy.
    """

    run: RunFolder
    background: bool = True
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False)
    _writing: tuple[int, Keep, Future[Path]] | None = field(default=None, repr=False)

    def save(self, step: int, groups: Mapping[str, Tensors], state: Mapping[str, Any], keep: Keep) -> None:
        """Save the checkpoint of `step`; what was begun before is finished first.

        Raises:
            Failed: the disk has no room for it. Refused: it is not writable.
        """
        self.wait()
        if not self.background or not has_memory(groups):
            checkpoint.save(self.run, step, groups, state, keep)
            return
        folder = checkpoint.prepare(self.run, step, groups)
        copies = {
            name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
            for name, tensors in groups.items()
        }
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="save")
        writing = self._pool.submit(_written, folder, copies, {"step": step, **state})
        self._writing = step, keep, writing

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            Failed, Refused: what was being written could not be.
        """
        if self._writing is not None:
            step, keep, writing = self._writing
            self._writing = None
            writing.result()
            checkpoint.publish(self.run, step, keep)

    def look(self) -> None:
        """Finish what is written, without waiting for what is not."""
        if self._writing is not None and self._writing[2].done():
            self.wait()

    def close(self) -> None:
        """Let a checkpoint that is being written be finished; its problems are left to the next run."""
        if self._writing is not None:
            step, keep, writing = self._writing
            self._writing = None
            if writing.exception() is None:
                checkpoint.publish(self.run, step, keep)
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _written(folder: Path, groups: Mapping[str, Tensors], state: Mapping[str, Any]) -> Path:
    checkpoint.write(folder, groups, state)
    return folder


def has_memory(groups: Mapping[str, Tensors]) -> bool:
    """Whether a copy of these tensors is small beside the memory that is free."""
    need = checkpoint.bytes_of(groups)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return need < 1_000_000_000
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return need < SHARE_OF_MEMORY * free
