"""The record of a run: a folder that is whole at every moment, whoever is killed.

Files are written beside their place and renamed into it; events are appended as lines; a lock names
the one process that may write. The report reads nothing but this folder.
"""

import errno
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from sfumato import locks, paths
from sfumato.errors import Failed, Refused
from sfumato.settings import RENAMED

EVENT_KEY = ("kind", "step", "split", "weights", "group")
PATIENCE_SECONDS = 2.0
"""How long a rename waits for others who read what it replaces, where the system has them hold it."""
IS_WINDOWS = os.name == "nt"
RENAMED_KINDS = {
    "held_out": "validation",
    "gap": "generalization_gap",
    "judge": "demo_evaluation",
    "set_aside": "damaged_checkpoint",
}
RENAMED_METRICS = {
    "kid": "latent_kernel_distance",
    "kid_of_held_out_data": "latent_kernel_distance_floor",
    "nearest_neighbour": "nearest_neighbor_accuracy",
    "copied": "memorized",
}
"""What events and their metrics were called before recipes of format 2: what they are called."""
_CHECKPOINT = re.compile(r"step-(\d+)")
LOG = "log.txt"
"""What other packages said while the run was written."""
_FILES = {".lock", "events.jsonl", LOG}
_FOLDERS = {"samples", "checkpoints", "model", "averages", "profile", "code"}
_OURS = _FILES | _FOLDERS | {"recipe.toml", "effective.toml", "report.html", "black_box.json"}


# ----------------------------------------------------------------------------- files


_UNWRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EISDIR, errno.EEXIST),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO),
}


@contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn the disk's refusals at `path` into one sentence each.

    Raises:
        Failed: the disk is full or its quota used up.
        Refused: the place may not be written to.
    """
    try:
        yield
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Failed(
                f"{path}: no space is left on this disk. Everything saved before is intact; "
                "make room (or move the output) and give the same command again."
            ) from problem
        if problem.errno == errno.EFBIG:
            raise Failed(
                f"{path}: a file may not become that large here (ulimit -f, or the file system). Everything "
                "saved before is intact; raise the limit and give the same command again."
            ) from problem
        if problem.errno in _UNWRITABLE:
            raise Refused(
                f"{path} cannot be written: {problem.strerror}. Choose an output folder you may write to."
            ) from problem
        raise


def check_output(folder: Path, option: str = "--out") -> None:
    """Try whether files can be written into `folder`, and leave nothing behind.

    Raises:
        Refused: they cannot. Failed: no space is left.
    """
    made: list[Path] = []
    probe = folder / f".{os.getpid()}.part"
    try:
        with explain_disk_errors(folder):
            for place in reversed([folder, *folder.parents]):
                if not place.is_dir():
                    place.mkdir()
                    made.append(place)
            probe.write_bytes(b"")
    except Refused as refusal:
        problem = refusal.__cause__
        reason = problem.strerror if isinstance(problem, OSError) else ""
        if isinstance(problem, OSError) and problem.errno == errno.EEXIST:
            reason = "it is no folder"
        raise Refused(
            f"{option}: nothing can be written into {folder} ({reason}). Choose another folder."
        ) from None
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
        for place in reversed(made):
            with suppress(OSError):
                place.rmdir()


def _sync(path: Path) -> None:
    """Bring a file or a folder's entries to the disk; Windows has its journal for the latter."""
    if IS_WINDOWS and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if IS_WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename(beside: Path, path: Path) -> None:
    """Put a file or folder into its place in one step, in place of a file that stands there."""
    ends = time.monotonic() + PATIENCE_SECONDS * IS_WINDOWS
    while True:
        try:
            beside.replace(path)
            return
        except PermissionError:  # Windows, while somebody reads the old one
            if time.monotonic() >= ends:
                raise
            time.sleep(0.02)


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the old file or the new one, never half.

    Raises:
        Failed: no space. Refused: the place is not writable.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        written = data.encode() if isinstance(data, str) else data
    except UnicodeEncodeError as problem:
        odd = problem.object[max(0, problem.start - 20) : problem.end + 20]
        raise Refused(
            f"{path} cannot be written: it would say {odd!r}, which is no UTF-8. Rename the file or "
            "folder; or, if it is named in UTF-8, say PYTHONUTF8=1 before the command."
        ) from problem
    with explain_disk_errors(path):
        try:
            with beside.open("wb") as file:
                file.write(written)
                file.flush()
                os.fsync(file.fileno())
            _rename(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        _sync(path.parent)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder beside `path`; it becomes `path` when the block ends well, else it is removed.

    A folder already at `path` is replaced.

    Raises:
        Failed: no space. Refused: the place is not writable.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with explain_disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_left_behind(path)
            beside.mkdir()
            with _being_written(beside):
                yield beside
                move_into_place(beside, path)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise


def move_into_place(beside: Path, path: Path) -> None:
    """Bring all of the folder `beside` to the disk and rename it to `path`.

    A folder that stood there goes first, out of sight in one rename.
    """
    _give_usual_modes(beside)
    for entry in [*sorted(beside.rglob("*")), beside]:
        _sync(entry)
    former = None
    if path.exists():
        former = path.with_name(f".{path.name}.{os.getpid()}.old.part")
        _rename(path, former)
    _rename(beside, path)
    _sync(path.parent)
    if former is not None:
        shutil.rmtree(former, ignore_errors=True)


def _give_usual_modes(folder: Path) -> None:
    """Let all files below be read as the folder may be: some writers make files for their owner alone."""
    if IS_WINDOWS:
        return
    usual = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        mode = file.lstat().st_mode
        if stat.S_ISREG(mode) and mode & 0o666 != usual:
            file.chmod(stat.S_IMODE(mode) & ~0o666 | usual)


@contextmanager
def _being_written(folder: Path) -> Iterator[None]:
    """Show other processes that `folder` is not left behind."""
    handle = _flocked(folder)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _flocked(folder: Path) -> int | None:
    """A handle that locks a folder until it is closed; None where another has it, or nobody can."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def remove_left_behind(path: Path) -> None:
    """Remove what killed writers of the folder `path` left beside it."""
    for rest in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        pid = rest.name.removeprefix(f".{path.name}.").partition(".")[0]
        is_mine = pid == str(os.getpid())
        is_only_copy = rest.name.endswith(".old.part") and not path.exists()
        if not pid.isdecimal() or not rest.is_dir() or rest.is_symlink() or is_only_copy:
            continue
        handle = _flocked(rest)
        if is_mine or (handle is not None and locks.started(int(pid)) is None):
            shutil.rmtree(rest, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def remove_partial_files(folder: Path) -> None:
    """Remove what killed writers left beside their files in `folder`; only the holder of the lock may."""
    for rest in folder.glob(".*.part"):
        if rest.is_dir():
            shutil.rmtree(rest, ignore_errors=True)
        else:
            rest.unlink(missing_ok=True)


def checksum(path: Path | str) -> str:
    """The file's sha256 in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------- what other packages say

LIBRARIES = logging.getLogger("sfumato.libraries")
"""Takes what other packages say; the run that is being written keeps it in its log."""
LIBRARIES.propagate = False
_MOST_WAITING = 200


class _Waiting(logging.Handler):
    """Keeps messages until there is a run that they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.runs = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it, if there are not too many."""
        if not self.runs and len(self.records) < _MOST_WAITING:
            self.records.append(record)


_waiting = _Waiting()
LIBRARIES.addHandler(_waiting)


@contextmanager
def _library_log(file: Path) -> Iterator[None]:
    """Write what other packages say into `file`, which is made when there is something."""
    log = logging.FileHandler(file, delay=True, encoding="utf-8", errors="backslashreplace")
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.handleError = lambda record: None  # a full disk is said by whoever writes what matters
    LIBRARIES.addHandler(log)
    _waiting.runs += 1
    waiting, _waiting.records = _waiting.records, []
    for record in waiting:
        log.handle(record)
    try:
        yield
    finally:
        _waiting.runs -= 1
        LIBRARIES.removeHandler(log)
        log.close()


# ----------------------------------------------------------------------------- the run


@dataclass
class RunFolder:
    """One run on disk: recipe, events, pictures, checkpoints.

    Make one with `create` or `open`; hold `lock()` while writing. `listeners` are told every event.
    """

    path: Path
    listeners: list[Callable[[dict[str, Any]], None]] = field(default_factory=list, repr=False)
    _events: BinaryIO | None = field(default=None, repr=False)
    _lock: locks.OwnerLock | None = field(default=None, repr=False)

    @property
    def recipe(self) -> Path:
        """The recipe as it was given."""
        return self.path / "recipe.toml"

    @property
    def effective(self) -> Path:
        """Every setting with the value it took."""
        return self.path / "effective.toml"

    @property
    def events_file(self) -> Path:
        """One JSON object a line, appended."""
        return self.path / "events.jsonl"

    @property
    def samples(self) -> Path:
        """The folder of pictures drawn on the way."""
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, `step-000500` and so on."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The self-contained page."""
        return self.path / "report.html"

    @classmethod
    def create(cls, path: Path | str, recipe_text: str = "", effective_text: str = "") -> "RunFolder":
        """The run folder at `path`, made if it is missing; an existing run keeps all it holds.

        The two texts are written where given and different from what stands there.

        Raises:
            Refused: `path` is a file, holds something else than a run, or is not writable.
        """
        run = cls(Path(path))
        with explain_disk_errors(run.path):
            if (run.path.exists() or run.path.is_symlink()) and not run.path.is_dir():
                what = "a file" if run.path.is_file() else "no folder"
                raise Refused(f"{run.path} is {what}; a run needs a folder. Choose another output.")
            run.check_places()
            run.path.mkdir(parents=True, exist_ok=True)
            strangers = {entry.name for entry in run.path.iterdir() if not entry.name.startswith(".")} - _OURS
            if strangers and not run.recipe.exists():
                raise Refused(
                    f'{run.path} holds other things ("{min(strangers)}") and is no run folder. '
                    "Choose another output, or an empty folder."
                )
            for file, text in ((run.recipe, recipe_text), (run.effective, effective_text)):
                if not file.exists() or (text and file.read_text(encoding="utf-8") != text):
                    write_atomic(file, text)
            run.samples.mkdir(exist_ok=True)
            run.checkpoints.mkdir(exist_ok=True)
        return run

    @classmethod
    def open(cls, path: Path | str) -> "RunFolder":
        """The run folder at `path`.

        Raises:
            Refused: there is none.
        """
        run = cls(Path(path))
        if not run.recipe.is_file():
            raise Refused(paths.no_run(run.path))
        return run

    def check_places(self) -> None:
        """Raises Refused where a file or folder of the run is a link out of it, or of the wrong kind."""
        for name in sorted(_FILES | _FOLDERS):
            place = self.path / name
            try:
                mode = place.lstat().st_mode
            except OSError:
                continue
            if stat.S_ISLNK(mode):
                raise Refused(
                    f"{place} is a link, and a run is written within its own folder only. Remove the link, "
                    "or put what it points to in its place."
                )
            if not (stat.S_ISREG(mode) if name in _FILES else stat.S_ISDIR(mode)):
                kind = "file" if name in _FILES else "folder"
                raise Refused(f"{place} is no {kind}, but a run has a {kind} of that name. Remove it.")

    def check_is_there(self) -> None:
        """Raises Failed if the folder was removed or moved while this process writes it."""
        if self._lock is not None and not self._lock.is_there():
            raise Failed(
                f"{self.path} was removed or moved, or its .lock was, while it was written. Nothing more is "
                "written there; what was saved before is where the folder is now."
            )

    # ------------------------------------------------------------------------- lock

    @contextmanager
    def lock(self) -> Iterator["RunFolder"]:
        """Be the only writer of this run; a lock left by a dead process is taken over.

        Raises:
            Refused: another living process holds it (named by its pid), or the folder is read-only.
        """
        self.check_places()
        file = self.path / ".lock"
        try:
            with explain_disk_errors(file):
                lock = locks.OwnerLock(file)
        except locks.LockHeld as held:
            who = held.holder
            name = f"process {who.pid} on {who.host}" if who else "another process"
            raise Refused(
                f"{self.path} is being written by {name}. Wait for it or stop it, or choose another output. "
                f"If you know that it is gone, delete {file}."
            ) from None
        former, self._lock = self._lock, lock
        try:
            with _library_log(self.path / LOG):
                yield self
        finally:
            self.close()
            self._lock = former
            lock.release()

    def close(self) -> None:
        """Close the events file; the next event opens it again."""
        if self._events is not None:
            self._events.close()
            self._events = None

    # ------------------------------------------------------------------------- events

    def event(self, kind: str, *, sync: bool = False, **fields: Any) -> None:
        """Append {"kind", "time", **fields} as one line; `sync` waits until the disk has it.

        Raises Failed without space or when the folder was removed, Refused where it is read-only.
        """
        self.check_is_there()
        event = {"kind": kind, "time": round(time.time(), 3), **fields}
        line = _checked(json.dumps(event, ensure_ascii=False))
        with explain_disk_errors(self.events_file):
            if self._events is None:
                self._events = open(self.events_file, "ab+", buffering=0, opener=_not_through_a_link)  # noqa: SIM115
                if size := self._events.seek(0, os.SEEK_END):
                    self._events.seek(size - 1)
                    line = line if self._events.read(1) == b"\n" else b"\n" + line
            self._events.write(line + b"\n")
            if sync:
                os.fsync(self._events.fileno())
        if self._lock is not None:
            self._lock.touch()
        for listener in self.listeners:
            listener(event)

    def events(self) -> list[dict[str, Any]]:
        """All events in order of their steps; of one repeated after a resume, the last wins.

        Lines torn by a kill, and lines whose bytes changed since (see `damaged_events`), are skipped. Two
        events are the same when kind, step, split, weights and group agree; events without a step never are.
        What older versions wrote has the names of today (`RENAMED_KINDS`, `RENAMED_METRICS`).
        """
        found: dict[Any, dict[str, Any]] = {}
        for number, event in self._lines():
            if event is not None:
                has_step = event.get("step") is not None
                found[tuple(map(event.get, EVENT_KEY)) if has_step else number] = event
        return list(found.values())

    def _lines(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """The events by their lines' numbers, from 1; None for a line that is torn or was changed."""
        if not self.events_file.exists():
            return
        if not self.events_file.is_file():
            raise Refused(f"{self.events_file} is no file that can be read to its end. Remove it.")
        for number, line in enumerate(self.events_file.read_bytes().split(b"\n"), 1):
            if line.strip():
                yield number, _event_of(line)

    def damaged_events(self) -> list[int]:
        """The lines of events.jsonl, from 1, that are not what was written."""
        return [number for number, event in self._lines() if event is None]

    def checkpoint_folders(self) -> list[Path]:
        """The checkpoints, oldest first; unfinished ones are not among them."""
        if not self.checkpoints.is_dir():
            return []
        numbered = [
            (int(match[1]), folder)
            for folder in self.checkpoints.iterdir()
            if (match := _CHECKPOINT.fullmatch(folder.name)) and folder.is_dir()
        ]
        return [folder for _, folder in sorted(numbered)]

    def checkpoint_folder(self, step: int) -> Path:
        """Where the checkpoint of `step` stands."""
        return self.checkpoints / f"step-{step:06d}"


_CHECK = re.compile(rb', "check": "([0-9a-f]{8})"}\s*$')


def _checked(line: str) -> bytes:
    """A JSON object with the crc32 of what precedes it as its last entry.

    A letter that is no UTF-8 (of a file's name) is written as JSON's escape for it.
    """
    begin = line[:-1].encode("utf-8", "backslashreplace")
    return begin + f', "check": "{zlib.crc32(begin):08x}"}}'.encode()


def _not_through_a_link(path: str, flags: int) -> int:
    """As `open` opens a file, but none that a link points to."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _event_of(line: bytes) -> dict[str, Any] | None:
    """The event of a line; None if it is none, or not the one that was written."""
    check = _CHECK.search(line)
    if check is not None and zlib.crc32(line[: check.start()]) != int(check[1], 16):
        return None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        return None
    if any(isinstance(event.get(name), dict | list) for name in EVENT_KEY):
        return None
    event.pop("check", None)
    return _of_today(event)


def _of_today(event: dict[str, Any]) -> dict[str, Any]:
    """An event under the names that are written now, whoever wrote it."""
    event["kind"] = RENAMED_KINDS.get(event["kind"], event["kind"])
    if event["kind"] == "code" and "own" in event:
        event["hashes"] = event.pop("own")
    if isinstance(metrics := event.get("metrics"), dict):
        event["metrics"] = {RENAMED_METRICS.get(name, name): value for name, value in metrics.items()}
    if isinstance(settings := event.get("settings"), dict):
        event["settings"] = {
            RENAMED.get(f"train.{name}", str(name)).removeprefix("train."): value
            for name, value in settings.items()
        }
    return event
