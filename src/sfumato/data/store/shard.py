"""A shard is a safetensors file that proves itself: its name is its header's hash, which holds checksums.

Anyone can read it with safetensors; nobody can alter a bit unseen. The same entries always make the same
bytes, so that whoever writes a shard, once or after a kill, writes the same file.
"""

import hashlib
import json
import math
import mmap
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from sfumato.errors import MALFORMED
from sfumato.run_folder import IS_WINDOWS, write_atomic

FORMAT = "sfumato-shard-1"
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Field:
    """One tensor of an entry: begin and length are bytes, counted from the entry's first byte."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    length: int


@dataclass(frozen=True)
class Entry:
    """Where an entry lies in its shard (bytes from the file's start), what it holds, and its checksum."""

    begin: int
    length: int
    checksum: str
    fields: tuple[Field, ...]


def shard_files(folder: Path) -> list[Path]:
    """The shards of a folder, by name; other people's files are not looked at."""
    return sorted(
        path for path in folder.glob("*.safetensors") if NAME.fullmatch(path.name) and path.is_file()
    )


class DamagedShard(Exception):
    """A shard whose bytes are not those that were written."""


def raw(tensor: Tensor) -> bytes:
    """The tensor's own bytes, row by row."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def pack(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[tuple[str, str, list[int], int]]]:
    """An entry's bytes, the widest numbers first, and (name, dtype, shape, bytes) of each tensor in them."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    parts = [raw(tensor) for _, tensor in ordered]
    layout = [
        (name, NAMES[tensor.dtype], list(tensor.shape), len(part))
        for (name, tensor), part in zip(ordered, parts, strict=True)
    ]
    return b"".join(parts), layout


def fields_of(tensors: Mapping[str, Tensor]) -> tuple[Field, ...]:
    """Where each tensor of an entry would lie."""
    fields: list[Field] = []
    for name, dtype, shape, length in pack(tensors)[1]:
        begin = fields[-1].begin + fields[-1].length if fields else 0
        fields.append(Field(name, DTYPES[dtype], tuple(shape), begin, length))
    return tuple(fields)


def digest(data: bytes | memoryview) -> str:
    """128-bit xxh3 in hexadecimal: finds damage, is no defence against malice."""
    return xxhash.xxh3_128_hexdigest(data)


def write(folder: Path, entries: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write entries (key → named tensors) as one shard into `folder`; atomic, and the same bytes every time.

    Raises:
        Failed: no space is left. Refused: the folder is not writable.
    """
    header: dict[str, object] = {}
    checks: dict[str, str] = {}
    parts: list[bytes] = []
    at = 0
    for key in sorted(entries):
        data, layout = pack(entries[key])
        checks[key] = digest(data)
        for name, dtype, shape, length in layout:
            header[f"{key}/{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + length]}
            at += length
        parts.append(data)
    header["__metadata__"] = {"format": FORMAT, "checksums": json.dumps(checks, separators=(",", ":"))}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = folder / f"{hashlib.sha256(text).hexdigest()[:32]}.safetensors"
    data = b"".join([struct.pack("<Q", len(text)), text, *parts])
    if IS_WINDOWS and path.exists() and path.read_bytes() == data:
        os.utime(path)  # what a reader has mapped cannot be replaced there
    else:
        write_atomic(path, data)
    return path


def read_header(path: Path) -> dict[str, Entry]:
    """The entries of a shard, key → Entry, its header verified against its name and its length.

    Raises:
        DamagedShard: it is truncated, altered, or no shard of ours.
    """
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else LONGEST_HEADER + 1
        text = file.read(length) if length <= LONGEST_HEADER else b""
        size = file.seek(0, 2)
    if hashlib.sha256(text).hexdigest()[:32] != path.name.partition(".")[0]:
        raise DamagedShard(f"{path.name} is damaged: its header is not the one that was written")
    try:
        return _entries_of(text, length, size, path)
    except MALFORMED as problem:
        raise DamagedShard(f"{path.name} is damaged: its header is no shard's ({problem})") from problem


def _entries_of(text: bytes, length: int, size: int, path: Path) -> dict[str, Entry]:
    """The entries that a header names."""
    shard_files = json.loads(text)
    checks = json.loads(shard_files.pop("__metadata__")["checksums"])
    fields: dict[str, list[Field]] = {key: [] for key in checks}
    begins: dict[str, int] = {}
    end = 0
    for name, item in shard_files.items():
        key, _, part = name.partition("/")
        begin, end = item["data_offsets"]
        start = begins.setdefault(key, begin)
        shape, dtype = tuple(item["shape"]), DTYPES[item["dtype"]]
        if any(type(one) is not int or one < 0 for one in (*shape, begin, end)):
            raise ValueError(f"{name} has a size that is none")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} is not as long as its shape")
        fields[key].append(Field(part, dtype, shape, begin - start, end - begin))
    base = 8 + length
    if size != base + end:
        raise DamagedShard(f"{path.name} is damaged: it has {size} bytes where {base + end} were written")
    return {
        key: Entry(
            base + begins.get(key, 0),
            sum(field.length for field in fields[key]),
            checks[key],
            tuple(fields[key]),
        )
        for key in checks
    }


def memory_map(path: Path) -> np.ndarray:
    """The shard's bytes [size] uint8, mapped, not read; they stay valid if the file is removed."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, np.uint8)


def unpack(data: np.ndarray, fields: tuple[Field, ...]) -> dict[str, Tensor]:
    """The tensors of an entry from its bytes [length]; they own their memory."""
    own = torch.from_numpy(data.copy())
    return {field.name: _typed(own[field.begin : field.begin + field.length], field) for field in fields}


def read_entry(data: np.ndarray, one: Entry) -> dict[str, Tensor]:
    """The tensors of an entry, from its shard's bytes."""
    return unpack(data[one.begin : one.begin + one.length], one.fields)


def _typed(part: Tensor, field: Field) -> Tensor:
    """Bytes [length] uint8 as the numbers they are."""
    if not field.length:
        return torch.empty(field.shape, dtype=field.dtype)
    if part.storage_offset() % field.dtype.itemsize:
        part = part.clone()
    return part.view(field.dtype).reshape(field.shape)
