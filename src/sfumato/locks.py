"""Locks between processes, on every system.

`exclusive` lets one process at a time through a block. `FileLease` marks for as long as its process lives,
however that ends, that a file is in use. `Holder` names a process so that it can be told from a later one
that was given the same number.
"""

import json
import os
import secrets
import socket
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOREIGN_LOCK_SECONDS = 600.0


class LockHeld(Exception):
    """Another process holds a lock that nobody wants to wait for."""


def _lock(file: Path) -> Any:
    """The system's own lock on `file`, which ends with the process that holds it."""
    from filelock import FileLock  # not quick to import

    return FileLock(file, thread_local=False)


@contextmanager
def exclusive(file: Path, wait: bool = True) -> Iterator[None]:
    """Let no other process be inside the block of the same `file`, which stays behind, empty.

    Raises:
        LockHeld: another is inside, and nobody wants to `wait`. OSError: the file cannot be written.
    """
    from filelock import Timeout

    lock = _lock(file)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise LockHeld(str(file)) from None
    try:
        yield
    finally:
        lock.release()


# ----------------------------------------------------------------------------- leases


class FileLease:
    """One process's mark that it uses `file`; any number of processes may have one each.

    Each is a lock file of its own beside it, because not every system has locks that are shared.
    """

    def __init__(self, file: Path) -> None:
        """Take it.

        Raises:
            OSError: the place cannot be written.
        """
        self.place = file.with_name(f"{file.stem}.{os.getpid()}-{secrets.token_hex(4)}.lock")
        lock = _lock(self.place)
        lock.acquire()
        self._end = weakref.finalize(self, _end, lock, self.place, os.getpid())

    def release(self) -> None:
        """Give it back, which also happens when nobody knows it any more."""
        self._end()


def _end(lock: Any, place: Path, pid: int) -> None:
    if pid == os.getpid():  # not in what a fork copied
        lock.release()
        place.unlink(missing_ok=True)


def is_leased(file: Path) -> bool:
    """Whether a living process has a lease on `file`; marks that the dead have left are removed.

    Leases are taken and looked at inside the same `exclusive`, or a fresh one could be taken for a dead one.
    """
    found = False
    for place in file.parent.glob(f"{file.stem}*.lock"):
        try:
            with exclusive(place, wait=False):
                pass
        except LockHeld:
            found = True
        else:
            place.unlink(missing_ok=True)
    return found


# ----------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Holder:
    """A process: its number, when it started (None: nobody knows), and its machine."""

    pid: int
    started: str | None
    host: str

    @classmethod
    def me(cls) -> "Holder":
        """This process."""
        return cls(os.getpid(), started(os.getpid()), socket.gethostname())

    @classmethod
    def of(cls, file: Path) -> "Holder | None":
        """Who wrote `file`; None if nobody did, or it is torn."""
        try:
            written = json.loads(file.read_bytes())
            return cls(int(written["pid"]), written["started"], str(written["host"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def text(self) -> str:
        """As a lock file has it."""
        return json.dumps(asdict(self))

    def is_alive(self, file: Path) -> bool:
        """Whether it still runs: same pid and start time here; elsewhere, a recent sign of life in `file`."""
        if self.host != socket.gethostname():
            return time.time() - file.stat().st_mtime < FOREIGN_LOCK_SECONDS
        return started(self.pid) == self.started is not None


def started(pid: int) -> str | None:
    """When process `pid` started, in a form that stays the same while it lives; None if it is gone.

    Linux counts from its own start; the time of day that psutil makes of it moves when the clock is set.
    """
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        state, *others = fields.rpartition(")")[2].split()
        return None if state in "ZX" else others[18]
    import psutil  # not quick to import

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return "unknown"
