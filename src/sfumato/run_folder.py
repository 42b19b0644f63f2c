"""The record of a run: a folder that is whole at every moment, whoever is killed.

Files are written beside their place and renamed into it; events are appended as lines; a lock names
the one process that may write. The report reads nothing but this folder.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from sfumato import locks
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
_OURS = {
    "recipe.toml", "effective.toml", "events.jsonl", "samples", "checkpoints", "report.html", ".lock",
    "code",
}  # fmt: skip


# ----------------------------------------------------------------------------- files


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
        if problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT):
            raise Refused(
                f"{path} cannot be written: {problem.strerror}. Choose an output folder you may write to."
            ) from problem
        raise


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
    with explain_disk_errors(path):
        try:
            with beside.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
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
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            yield beside
            move_into_place(beside, path)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise


def move_into_place(beside: Path, path: Path) -> None:
    """Bring all of the folder `beside` to the disk and rename it to `path`.

    A folder that stood there goes first, out of sight in one rename.
    """
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


# ----------------------------------------------------------------------------- the run


@dataclass
class RunFolder:
    """One run on disk: recipe, events, pictures, checkpoints.

    Make one with `create` or `open`; hold `lock()` while writing. `listeners` are told every event.
    """

    path: Path
    listeners: list[Callable[[dict[str, Any]], None]] = field(default_factory=list, repr=False)
    _events: BinaryIO | None = field(default=None, repr=False)

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
        if run.path.is_file():
            raise Refused(f"{run.path} is a file; a run needs a folder. Choose another output.")
        with explain_disk_errors(run.path):
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
            why = "has no recipe.toml" if run.path.is_dir() else "does not exist"
            raise Refused(f"{run.path} is no run folder: it {why}. Give a folder that `sfumato train` wrote.")
        return run

    # ------------------------------------------------------------------------- lock

    @contextmanager
    def lock(self) -> Iterator["RunFolder"]:
        """Be the only writer of this run; a lock left by a dead process is taken over.

        Raises:
            Refused: another living process holds it (named by its pid), or the folder is read-only.
        """
        file, guard = self.path / ".lock", self.path / ".lock.guard"
        with explain_disk_errors(self.path), locks.exclusive(guard):
            holder = locks.Holder.of(file)
            if holder and holder.is_alive(file):
                raise Refused(
                    f"{self.path} is being written by process {holder.pid} on {holder.host}. "
                    "Wait for it or stop it, or choose another output."
                )
            mine = locks.Holder.me()
            write_atomic(file, mine.text())
        try:
            yield self
        finally:
            self.close()
            with locks.exclusive(guard):
                if locks.Holder.of(file) == mine:
                    file.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the events file; the next event opens it again."""
        if self._events is not None:
            self._events.close()
            self._events = None

    # ------------------------------------------------------------------------- events

    def event(self, kind: str, *, sync: bool = False, **fields: Any) -> None:
        """Append {"kind", "time", **fields} as one line; `sync` waits until the disk has it.

        Raises Failed without space, Refused where the folder is read-only.
        """
        event = {"kind": kind, "time": round(time.time(), 3), **fields}
        line = _checked(json.dumps(event, ensure_ascii=False)) + "\n"
        with explain_disk_errors(self.events_file):
            if self._events is None:
                self._events = self.events_file.open("ab+", buffering=0)
                if size := self._events.seek(0, os.SEEK_END):
                    self._events.seek(size - 1)
                    line = line if self._events.read(1) == b"\n" else "\n" + line
            self._events.write(line.encode())
            if sync:
                os.fsync(self._events.fileno())
        lock = self.path / ".lock"
        if lock.exists():
            os.utime(lock)
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


def _checked(line: str) -> str:
    """A JSON object with the crc32 of what precedes it as its last entry."""
    return f'{line[:-1]}, "check": "{zlib.crc32(line[:-1].encode()):08x}"}}'


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
    if any(isinstance(event.get(name), list | dict) for name in EVENT_KEY):
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
