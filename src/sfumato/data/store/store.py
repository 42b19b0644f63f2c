"""The store keeps what frozen networks answered: each answer once, under the hash of all it depends on.

A key is the hash of a sample's bytes, the transform, the encoder's weights and the number format, so nothing
in the store can be stale: what changed has another key. Answers lie in shards (see `shard`); a shard is there
or it is not, so writers need no lock and a killed one leaves nothing half done. The index is only a cache.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.data.store import leases, shard
from sfumato.data.store.index import EntryLocation, Index
from sfumato.data.store.leases import Owner
from sfumato.errors import Failed
from sfumato.locks import FileLease
from sfumato.run_folder import explain_disk_errors

KINDS = ("pixels", "text")
STRAY_SECONDS = 24 * 3600


def key(content: str, transform: str, encoder: str, dtype: str) -> str:
    """32 hexadecimal digits that change when anything an encoding depends on changes.

    Args:
        content: hash of the bytes of the sample's part (the picture file, the caption).
        transform: what is done to it before the encoder sees it, in words.
        encoder: fingerprint of the encoder's weights and settings.
        dtype: number format of what is stored.
    """
    parts = json.dumps([content, transform, encoder, dtype])
    return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class Damaged:
    """An entry whose bytes in its shard are not those that were written."""

    key: str
    shard: str
    reason: str


class Writer:
    """Collects entries and writes them as one shard whenever `flush` is called, or enough have come."""

    def __init__(self, store: "Store", kind: str, most_bytes: int):
        self.store, self.kind, self.most_bytes = store, kind, most_bytes
        self.entries: dict[str, Mapping[str, Tensor]] = {}
        self.size = 0

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Add an entry; it is safe on disk only after the next flush."""
        self.entries[key] = tensors
        self.size += sum(tensor.nbytes for tensor in tensors.values())
        if self.size >= self.most_bytes:
            self.flush()

    def flush(self) -> None:
        """Commit what has been collected as one shard."""
        if self.entries:
            self.store.commit(self.kind, self.entries)
            self.entries, self.size = {}, 0


class Store:
    """Encodings on disk, in shards; open it as often and from as many processes as you like."""

    def __init__(self, root: Path | str):
        """Open (or begin) the store at `root`.

        Raises:
            Refused: the place is not writable. Failed: no space is left.
        """
        self.root = Path(root).expanduser()
        with explain_disk_errors(self.root):
            for kind in KINDS:
                (self.root / kind).mkdir(parents=True, exist_ok=True)
        self._indices: dict[str, Index] = {}
        self._views: dict[str, np.ndarray] = {}
        self._numbers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._held: list[FileLease] = []

    def index(self, kind: str) -> Index:
        """The index of one kind, read when first asked for."""
        if kind not in self._indices:
            self._indices[kind] = Index(self.root / kind)
        return self._indices[kind]

    def refresh(self) -> None:
        """See what other processes have committed since."""
        self._indices.clear()

    def hold(self, owner: Owner, keys: Mapping[str, Iterable[str]], encoders: Iterable[str]) -> None:
        """Write down what `owner` needs, and keep it from being collected.

        Raises:
            Refused: the store cannot be written. Failed: the disk is full.
        """
        self._held.append(leases.acquire(self.root, owner, keys, encoders))
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        """For another process: it maps and reads for itself, and holds nothing."""
        return {"root": self.root, "_indices": {}, "_views": {}, "_numbers": {}, "_held": []}

    @contextmanager
    def writer(self, kind: str, most_bytes: int = 64 << 20) -> Iterator[Writer]:
        """A writer whose last entries are committed when the block ends well."""
        writer = Writer(self, kind, most_bytes)
        yield writer
        writer.flush()

    def put(self, kind: str, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one entry as a shard of its own; use `writer` for many."""
        self.commit(kind, {key: tensors})

    def commit(self, kind: str, entries: Mapping[str, Mapping[str, Tensor]]) -> Path:
        """Write entries as one shard, at once or not at all."""
        path = shard.write(self.root / kind, entries)
        self.index(kind).add(path)
        return path

    def has(self, kind: str, keys: Iterable[str]) -> set[str]:
        """Those of `keys` that are stored."""
        wanted = list(keys)
        return {
            one for one, location in zip(wanted, self.index(kind).locations(wanted), strict=True) if location
        }

    def locations(self, kind: str, keys: list[str]) -> list[EntryLocation | None]:
        """Where each key's entry lies, None if it is not stored."""
        return self.index(kind).locations(keys)

    def get(self, kind: str, key: str) -> dict[str, Tensor]:
        """The tensors of an entry.

        Raises:
            KeyError: it is not stored.
        """
        location = self.index(kind).locations([key])[0]
        if location is None:
            raise KeyError(f"{kind}/{key} is not in the store {self.root}")
        data = self.view(location.path)[location.begin : location.begin + location.length]
        return shard.unpack(data, location.fields)

    def view(self, path: str) -> np.ndarray:
        """A shard's bytes, mapped once."""
        found = self._views.get(path)
        if found is None:
            try:
                found = self._views[path] = shard.memory_map(Path(path))
            except FileNotFoundError:
                raise Failed(
                    f"{path} was taken out of the store meanwhile. Give the same command again: "
                    "what is missing is encoded anew."
                ) from None
        return found

    def release(self, path: str) -> None:
        """Map a shard no longer, so that its bytes are free when its file is removed."""
        self._views.pop(path, None)
        self._numbers = {known: found for known, found in self._numbers.items() if known[0] != path}

    def numbers(self, path: str, dtype: torch.dtype) -> Tensor:
        """A shard's bytes as numbers of this kind, not copied: never write into them."""
        found = self._numbers.get((path, dtype))
        if found is None:
            data = torch.from_numpy(self.view(path))
            whole = len(data) // dtype.itemsize * dtype.itemsize
            found = self._numbers[path, dtype] = data[:whole].view(dtype)
        return found

    def verify(self, kind: str, keys: Iterable[str]) -> list[Damaged]:
        """Read every stored entry among `keys` and name those that are damaged."""
        damaged = self.index(kind).damaged[:]
        by_shard: dict[str, set[str]] = {}
        wanted = list(keys)
        for one, location in zip(wanted, self.index(kind).locations(wanted), strict=True):
            if location:
                by_shard.setdefault(location.path, set()).add(one)
        found = [Damaged("*", name, reason) for name, reason in damaged]
        for path, members in sorted(by_shard.items()):
            found += _check(Path(path), members)
        return found

    def drop(self, kind: str, damaged: Iterable[Damaged]) -> None:
        """Take damaged entries out; what is sound in their shards is written anew first."""
        bad: dict[str, set[str]] = {}
        for one in damaged:
            bad.setdefault(one.shard, set()).add(one.key)
        for name, members in bad.items():
            path = self.root / kind / name
            if "*" not in members:
                entries = shard.read_header(path)
                sound = [one for one in entries if one not in members]
                sound = [one for one in sound if one not in {bad.key for bad in _check(path, set(sound))}]
                if sound:
                    data = shard.memory_map(path)
                    shard.write(path.parent, {one: shard.read_entry(data, entries[one]) for one in sound})
            self.release(str(path))
            with explain_disk_errors(path):
                path.unlink(missing_ok=True)
        self._indices.pop(kind, None)

    def content_hash(self, kind: str, keys: Iterable[str] | None = None) -> str:
        """One hash of all entries (or of `keys`); stores that hold the same have the same."""
        wanted = None if keys is None else set(keys)
        lines: set[str] = set()
        for path in shard.shard_files(self.root / kind):
            for one, entry in shard.read_header(path).items():
                if wanted is None or one in wanted:
                    lines.add(f"{one} {entry.checksum}")
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _check(path: Path, members: set[str]) -> list[Damaged]:
    """The damaged ones among `members` of a shard."""
    try:
        entries, data = shard.read_header(path), shard.memory_map(path)
    except (shard.DamagedShard, OSError, ValueError) as problem:
        return [Damaged("*", path.name, str(problem))]
    found = []
    for one in sorted(members):
        entry = entries.get(one)
        if entry is None:
            found.append(Damaged(one, path.name, "its shard does not hold it"))
        elif shard.digest(data[entry.begin : entry.begin + entry.length].data) != entry.checksum:
            found.append(Damaged(one, path.name, "its bytes are not those that were written"))
    return found
