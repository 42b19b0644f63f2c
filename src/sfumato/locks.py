"""Locks between processes, on every system.

`exclusive` lets one process at a time through a block. `OwnerLock` belongs to one process for as long as it
works, and says to others whose it is. `FileLease` marks for as long as its process lives, however that ends,
that a file is in use. `Holder` names a process so that it can be told from a later one that was given the
same number.
"""

import errno
import json
import os
import secrets
import socket
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

FOREIGN_LOCK_SECONDS = 600.0


class LockHeld(Exception):
    """Another process holds a lock that nobody wants to wait for; `holder` is who, where that is known."""

    def __init__(self, text: str, holder: "Holder | None" = None) -> None:
        super().__init__(text)
        self.holder = holder


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


# ----------------------------------------------------------------------------- one owner


class OwnerLock:
    """A file that belongs to this process until it is released or dies, and says so.

    Where the system has flock, it is held as long as the lock: the kernel knows who lives, whatever process
    numbers and host names say, and a file that was left behind or copied hinders nobody. Elsewhere, and on
    other machines, the name in the file counts.
    """

    def __init__(self, file: Path) -> None:
        """Take it.

        Raises:
            LockHeld: it is another's. OSError: the place cannot be written, or is no file.
        """
        self.file = file
        self._handle: int | None = None
        self._mine = Holder.me()
        try:
            import fcntl
        except ImportError:
            self._take_by_name()
            return
        while self._handle is None:
            handle = os.open(file, _OPEN, 0o666)
            try:
                self._handle = self._take(handle, fcntl)
            finally:
                if self._handle is None:
                    os.close(handle)

    def _take(self, handle: int, fcntl: Any) -> int | None:
        """The handle, once it is locked; None if the file at the path has become another meanwhile."""
        is_locked = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockHeld(str(self.file), Holder.of(self.file)) from None
        except OSError as problem:
            if problem.errno not in _NO_FLOCK:
                raise
            is_locked = False
        if not self._is_at_path(handle):
            return None
        holder = Holder.of(self.file)
        if holder is not None and holder.is_alive(self.file):
            ended = is_locked and holder.inode is not None and holder.host == socket.gethostname()
            if not ended:  # it may be a writer of before this was locked, or on another machine
                raise LockHeld(str(self.file), holder)
        self._mine = replace(self._mine, inode=os.fstat(handle).st_ino)
        os.ftruncate(handle, 0)
        os.write(handle, self._mine.text().encode())
        return handle

    def _take_by_name(self) -> None:
        with exclusive(self._guard):
            holder = Holder.of(self.file)
            if holder is not None and holder.is_alive(self.file):
                raise LockHeld(str(self.file), holder)
            self.file.write_bytes(b"")
            self._mine = replace(self._mine, inode=self.file.stat().st_ino)
            self.file.write_text(self._mine.text(), encoding="utf-8")

    @property
    def _guard(self) -> Path:
        return self.file.with_name(f"{self.file.name}.guard")

    def _is_at_path(self, handle: int) -> bool:
        try:
            there = os.lstat(self.file)
        except FileNotFoundError:
            return False
        here = os.fstat(handle)
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)

    def is_there(self) -> bool:
        """Whether the file still is where it was, or somebody removed it or its folder."""
        return Holder.of(self.file) == self._mine if self._handle is None else self._is_at_path(self._handle)

    def touch(self) -> None:
        """Give a sign of life."""
        with suppress(OSError):
            os.utime(self.file)

    def release(self) -> None:
        """Give it back: the file goes."""
        if self._handle is None:
            with suppress(FileNotFoundError), exclusive(self._guard):
                if self.is_there():
                    self.file.unlink(missing_ok=True)
            return
        try:
            if self.is_there():
                self.file.unlink(missing_ok=True)
        finally:
            os.close(self._handle)


_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What file systems without flock answer."""

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
    """A process: its number, when it started (None: nobody knows), and its machine.

    inode: of the file it wrote itself into; a copy of that file has another.
    """

    pid: int
    started: str | None
    host: str
    inode: int | None = None

    @classmethod
    def me(cls) -> "Holder":
        """This process."""
        return cls(os.getpid(), started(os.getpid()), socket.gethostname())

    @classmethod
    def of(cls, file: Path) -> "Holder | None":
        """Who wrote `file`; None if nobody did, or it is torn."""
        try:
            written = json.loads(file.read_bytes())
            return cls(int(written["pid"]), written["started"], str(written["host"]), written.get("inode"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def text(self) -> str:
        """As a lock file has it."""
        return json.dumps(asdict(self))

    def is_alive(self, file: Path) -> bool:
        """Whether it still runs: same pid and start time here; elsewhere, a recent sign of life in `file`."""
        if self.inode is not None and self.inode != file.stat().st_ino:
            return False  # a copy of its file
        if self.host != socket.gethostname():
            return abs(time.time() - file.stat().st_mtime) < FOREIGN_LOCK_SECONDS
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
