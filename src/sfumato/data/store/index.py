"""The index says where an entry lies; it is rebuilt from the shards' headers whenever it is missing or wrong.

Most of it is sorted arrays in one mapped file, so that ten million entries open at once; entries of shards
younger than that file are held in a dictionary until the arrays are written anew.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sfumato.data.store import shard
from sfumato.data.store.shard import Field
from sfumato.errors import Failed, Refused
from sfumato.run_folder import write_atomic

FORMAT = "sfumato-index-1"
MERGE_SHARDS = 64  # so many young shards are worth writing the arrays anew
COLUMNS = ("high", "low", "shard", "begin", "layout")


@dataclass(frozen=True)
class EntryLocation:
    """Where an entry lies: bytes begin … begin + length of a shard, and the tensors in them."""

    path: str
    begin: int
    length: int
    fields: tuple[Field, ...]


def _halves(keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The two 64-bit halves of 32-digit keys, [N] uint64 each."""
    both = np.frombuffer(bytes.fromhex("".join(keys)), ">u8").reshape(-1, 2)
    return both[:, 0].astype(np.uint64), both[:, 1].astype(np.uint64)


class Index:
    """Key → place for one folder of shards."""

    def __init__(self, folder: Path) -> None:
        """Read what lies in `folder`; damaged shards are listed in `damaged` as (name, reason)."""
        self.folder = folder
        self.file = folder / "index.safetensors"
        self.damaged: list[tuple[str, str]] = []
        self._young: dict[str, EntryLocation] = {}
        self._shards: list[str] = []
        self._layouts: list[tuple[Field, ...]] = []
        self._known: dict[tuple[Field, ...], tuple[Field, ...]] = {}  # one object per layout
        self._columns = {name: np.zeros(0, np.uint64) for name in COLUMNS}
        self._load()
        there = {path.name for path in shard.shard_files(folder)}
        self._forget(there)
        fresh = sorted(there - set(self._shards))
        for name in fresh:
            try:
                self.add(folder / name)
            except (shard.DamagedShard, OSError, ValueError, KeyError) as problem:
                self.damaged.append((name, str(problem)))
        if len(fresh) > MERGE_SHARDS:
            self.merge()

    def __len__(self) -> int:
        return len(self._columns["high"]) + len(self._young)

    def add(self, path: Path) -> None:
        """Take a shard's entries in; the first shard that holds a key keeps it."""
        name = str(path)
        for key, entry in shard.read_header(path).items():
            fields = self._known.setdefault(entry.fields, entry.fields)
            self._young.setdefault(key, EntryLocation(name, entry.begin, entry.length, fields))

    def locations(self, keys: list[str]) -> list[EntryLocation | None]:
        """Where each key's entry lies, None where there is none."""
        if not keys:
            return []
        rows = self._rows(keys)
        return [
            self._young.get(key) or (self._location(row) if row >= 0 else None)
            for key, row in zip(keys, rows.tolist(), strict=True)
        ]

    def _rows(self, keys: list[str]) -> np.ndarray:
        """The row of each key in the arrays, −1 where it has none, [N] int64."""
        highs, lows = self._columns["high"], self._columns["low"]
        if not len(highs):
            return np.full(len(keys), -1)
        high, low = _halves(keys)
        row = np.searchsorted(highs, high)
        found = np.full(len(keys), -1)
        for _ in range(4):  # equal high halves: one pair in 10¹⁹, so a few steps are plenty
            inside = np.minimum(row, len(highs) - 1)
            hit = (row < len(highs)) & (highs[inside] == high) & (lows[inside] == low)
            found[hit] = row[hit]
            row = row + 1
        return found

    def _location(self, row: int) -> EntryLocation:
        fields = self._layouts[int(self._columns["layout"][row])]
        length = sum(field.length for field in fields)
        name = self._shards[int(self._columns["shard"][row])]
        return EntryLocation(str(self.folder / name), int(self._columns["begin"][row]), length, fields)

    def _forget(self, there: set[str]) -> None:
        """Drop the rows of shards that are no longer in the folder."""
        gone = [number for number, name in enumerate(self._shards) if name not in there]
        if gone:
            keep = ~np.isin(self._columns["shard"], np.array(gone, np.uint64))
            self._columns = {name: column[keep] for name, column in self._columns.items()}

    def merge(self) -> None:
        """Sort everything into the arrays and write them to the folder, if it can be written."""
        shards = {name: number for number, name in enumerate(self._shards)}
        layouts = {layout: number for number, layout in enumerate(self._layouts)}
        young = list(self._young.items())
        for _, location in young:
            shards.setdefault(Path(location.path).name, len(shards))
            layouts.setdefault(location.fields, len(layouts))
        high, low = _halves([key for key, _ in young])
        rows = {
            "high": high,
            "low": low,
            "shard": np.array([shards[Path(location.path).name] for _, location in young], np.uint64),
            "begin": np.array([location.begin for _, location in young], np.uint64),
            "layout": np.array([layouts[location.fields] for _, location in young], np.uint64),
        }
        columns = {name: np.concatenate([self._columns[name], rows[name]]) for name in COLUMNS}
        order = np.lexsort((columns["low"], columns["high"]))
        self._columns = {name: column[order] for name, column in columns.items()}
        self._shards, self._layouts, self._young = list(shards), list(layouts), {}
        self._save()

    def _save(self) -> None:
        metadata = {
            "format": FORMAT,
            "shards": json.dumps(self._shards),
            "layouts": json.dumps([[_layout_to_json(field) for field in layout] for layout in self._layouts]),
        }
        metadata["checksum"] = _checksum(self._columns.values(), metadata["shards"], metadata["layouts"])
        columns = {name: torch.from_numpy(column.view(np.int64)) for name, column in self._columns.items()}
        try:
            write_atomic(self.file, save(columns, metadata))
        except (Failed, Refused):
            self.file.unlink(missing_ok=True)  # only a cache: the shards themselves are enough

    def _load(self) -> None:
        """Read the arrays if they are there and whole; else the shards' headers will do."""
        if not self.file.exists():
            return
        try:
            with safe_open(self.file, "pt") as file:
                metadata = file.metadata() or {}
                columns = {name: file.get_tensor(name).numpy().view(np.uint64) for name in COLUMNS}
        except (SafetensorError, OSError):
            return
        words = metadata.get("shards", ""), metadata.get("layouts", "")
        if metadata.get("format") == FORMAT and metadata.get("checksum") == _checksum(
            columns.values(), *words
        ):
            self._columns, self._shards = columns, json.loads(metadata["shards"])
            self._layouts = [
                tuple(map(_layout_from_json, layout)) for layout in json.loads(metadata["layouts"])
            ]
            self._known = {layout: layout for layout in self._layouts}


def _checksum(columns: Iterable[np.ndarray], *words: str) -> str:
    state = xxhash.xxh3_128("\n".join(words).encode())
    for column in columns:
        state.update(np.ascontiguousarray(column).data)
    return state.hexdigest()


def _layout_to_json(field: Field) -> list[object]:
    return [field.name, shard.NAMES[field.dtype], list(field.shape), field.begin, field.length]


def _layout_from_json(item: list) -> Field:
    name, dtype, shape, begin, length = item
    return Field(name, shard.DTYPES[dtype], tuple(shape), begin, length)
