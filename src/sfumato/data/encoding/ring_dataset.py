"""Encoded ahead: of a collection that no disk could hold, what the next steps show lies in a ring of shards.

While a step trains, a thread encodes what later steps will show; shards behind the current step go first when
room is needed. What is encoded together is what one step shows together, so the numbers are those of a
streamed set, whatever the ring's size and wherever a run was stopped.
"""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from sfumato.data.encoding.streaming_dataset import LazyEntry, StreamingDataset
from sfumato.data.store import formats, shard
from sfumato.data.store.index import EntryLocation
from sfumato.errors import Refused
from sfumato.run_folder import explain_disk_errors

BLOCK = 256  # samples that one shard of the ring holds, about
SPARE = 4  # a smaller ring is still cut into so many shards

StepIndices = Callable[[int], Sequence[tuple[Sequence[int], int]]]
"""The parts of a step that this process reads: (indices, epoch) of each."""
Stored = dict[str, Tensor]
ViewGroup = tuple[list[EntryLocation], tuple[str, ...]]
"""Views that are encoded together, and which of their tensors are kept (all if none is named)."""


@dataclass
class RingDataset(StreamingDataset):
    """A streamed set whose next steps are encoded before they are asked for.

    ring is its folder, limit the bytes its numbers may take (headers come on top). It encodes ahead once it
    knows what will be asked (`start_prefetch`) and which step is about to be read (`prefetch`); until then it
    is a streamed set.
    """

    ring: Path = field(default_factory=Path)
    limit: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._worker: _Worker | None = None

    def start_prefetch(self, reads: StepIndices, largest: int, seed: int) -> None:
        """Begin to look ahead.

        Args:
            reads: what this process reads in each step; largest: samples in the largest step.
        Raises:
            Refused: the limit cannot hold the encodings of one step.
        """
        each = max(_bytes_of(item.pictures, item.companions) for item in self.items)
        step_bytes = largest * each
        if self.limit < step_bytes:
            raise Refused(
                f"data.cache_limit allows {self.limit:,} bytes here, which cannot hold the encodings of one "
                f"step: {largest} samples of {each:,} bytes are {step_bytes:,}. Allow more, or set "
                "data.stream = true, which keeps none."
            )
        steps = max(1, min(self.limit // (SPARE * step_bytes), -(-BLOCK // largest)))
        room = self.limit // (steps * step_bytes)

        def groups(step: int) -> list[ViewGroup]:
            found: list[ViewGroup] = []
            for indices, epoch in reads(step):
                shown = self.locations_of(indices, seed, epoch)
                found += [
                    (locations, self.fields_to_read if not name else ()) for name, locations in shown.items()
                ]
            return found

        self._worker = _Worker(self, groups, steps, room)

    def prefetch(self, step: int) -> None:
        """Say that `step` is about to be read."""
        if self._worker is not None:
            self._worker.prefetch(step)

    def close(self, finished: bool = False) -> None:
        """Stop looking ahead; the ring is kept for a run that goes on, and removed when it has `finished`."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        if finished:
            shutil.rmtree(self.ring, ignore_errors=True)

    def _tensors(self, locations: list[EntryLocation], only: tuple[str, ...] = ()) -> dict[str, Tensor]:
        stored = self._worker.take(_name(locations, only)) if self._worker is not None else None
        return formats.dequantize(self.encoded(locations, only) if stored is None else stored)


class _Worker:
    """The thread that encodes ahead, and what it has encoded: in memory until its shard is written."""

    def __init__(
        self, of: RingDataset, groups: Callable[[int], list[ViewGroup]], steps: int, room: int
    ) -> None:
        self.of, self.groups, self.steps, self.room = of, groups, steps, room
        self.changed = threading.Condition()
        self.here, self.taken = 0, -1  # the step being read; the last block that was taken on
        self.expected: set[str] = set()
        self.alone: set[str] = set()  # what was asked for before it was encoded, and so was encoded then
        self.fresh: dict[str, Stored] = {}
        self.locations: dict[str, EntryLocation] = {}
        self.problem: BaseException | None = None
        self.stopped = False
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="encode-ahead")
        with explain_disk_errors(of.ring):
            of.ring.mkdir(parents=True, exist_ok=True)
        self.blocks: dict[int, Path] = {}
        for folder in sorted(of.ring.iterdir()):
            size, _, number = folder.name.partition("-")
            if size == str(steps) and number.isdecimal():
                self.blocks[int(number)] = folder
                self._open(int(number))
            else:
                shutil.rmtree(folder, ignore_errors=True)  # of a ring of another size

    def prefetch(self, step: int) -> None:
        """Take on the blocks that there is room for, from this step on."""
        self.here = step
        block = step // self.steps
        if not block <= self.taken + 1:
            self.taken = block - 1  # the first step of a run that goes on
        while self.taken < block + self.room - 1:
            self.taken += 1
            self.pool.submit(self._fill, self.taken, max(step, self.taken * self.steps))

    def take(self, name: str) -> Stored | None:
        """A group's tensors; waits while it is being encoded; None if nobody encodes it."""
        with self.changed:
            self.changed.wait_for(lambda: name not in self.expected or self.problem is not None)
            if self.problem is not None:
                raise self.problem
            if name in self.fresh:
                return self.fresh[name]
            location = self.locations.get(name)
            if location is None:
                self.alone.add(name)
                return None
            data = self.of.store.view(location.path)[location.begin : location.begin + location.length]
            return shard.unpack(data, location.fields)

    def close(self) -> None:
        """Stop after the group under way."""
        with self.changed:
            self.stopped = True
            self.expected.clear()
            self.changed.notify_all()
        self.pool.shutdown(cancel_futures=True)

    def _fill(self, block: int, first: int) -> None:
        """Encode what the steps of a block show, from the step `first` on, and write it as a shard."""
        try:
            reads = {
                _name(locations, only): (locations, only)
                for step in range(first, (block + 1) * self.steps)
                for locations, only in self.groups(step)
            }
            lacking = {name: group for name, group in reads.items() if name not in self.locations}
            with self.changed:
                self.expected |= set(lacking)
            made: dict[str, Stored] = {}
            for name, (locations, only) in lacking.items():
                if self.stopped:
                    return
                if name in self.alone:
                    self._no_longer(name)
                    continue
                made[name] = self.of.encoded(locations, only)
                self.fresh[name] = made[name]
                self._no_longer(name)
            if made:
                self._keep(block, made)
        except BaseException as problem:  # the training thread raises it
            with self.changed:
                self.problem = problem
                self.changed.notify_all()

    def _no_longer(self, name: str) -> None:
        """Nobody needs to wait for this group any more."""
        with self.changed:
            self.alone.discard(name)
            self.expected.discard(name)
            self.changed.notify_all()

    def _keep(self, block: int, made: Mapping[str, Stored]) -> None:
        """Write a block's groups as a shard, after making room: the oldest of those not soon shown go."""
        soon = range(self.here // self.steps, self.here // self.steps + self.room)
        others = sorted(one for one in self.blocks if one not in soon)
        while len(self.blocks) >= self.room and others:
            self._drop(others.pop(0))
        folder = self.of.ring / f"{self.steps}-{block:09d}"
        with explain_disk_errors(folder):
            folder.mkdir(exist_ok=True)
        shard.write(folder, made)
        self.blocks[block] = folder
        self._open(block)
        with self.changed:
            for name in made:
                self.fresh.pop(name, None)

    def _open(self, block: int) -> None:
        """Take a block's groups in; a damaged one is said and dropped, to be encoded again."""
        for path in shard.shard_files(self.blocks[block]):
            try:
                entries, data = shard.read_header(path), shard.memory_map(path)
                for name, one in entries.items():
                    if shard.digest(data[one.begin : one.begin + one.length].data) != one.checksum:
                        raise shard.DamagedShard(f"{path.name} is damaged: group {name}")
                found = {k: EntryLocation(str(path), e.begin, e.length, e.fields) for k, e in entries.items()}
                with self.changed:
                    self.locations |= found
            except (shard.DamagedShard, OSError, ValueError) as problem:
                self.of.say(f"damaged: {problem} in the ring {self.of.ring}; encoded again.")
                path.unlink(missing_ok=True)

    def _drop(self, block: int) -> None:
        folder = self.blocks.pop(block)
        with self.changed:
            for path in shard.shard_files(folder):
                self.of.store.release(str(path))
            self.locations = {k: one for k, one in self.locations.items() if Path(one.path).parent != folder}
        shutil.rmtree(folder, ignore_errors=True)


def _bytes_of(
    pictures: tuple[EntryLocation, ...], companions: Mapping[str, tuple[EntryLocation, ...]]
) -> int:
    """Bytes of one sample's encodings."""
    return max(one.length for one in pictures) + sum(some[0].length for some in companions.values())


def _name(locations: Sequence[EntryLocation], only: tuple[str, ...]) -> str:
    """The key of a group: which views of which files, as they are now, are encoded together."""
    parts: list[object] = [only]
    for location in locations:
        if isinstance(location, LazyEntry) and location.task is not None:
            task = location.task
            file = task.sample.file
            state = file.stat() if file is not None else None
            parts.append([task.keys[location.view], state and [state.st_size, state.st_mtime_ns]])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
