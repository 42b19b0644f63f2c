"""Reading: entries of mapped shards become tensors, each number copied once.

One entry alone is read where it lies; of a batch the bytes are gathered first, which costs less than a tensor
for each of its rows.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sfumato.data.store import formats
from sfumato.data.store.index import EntryLocation
from sfumato.data.store.shard import Field
from sfumato.data.store.store import Store

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"0", np.uint8))  # torch warns once that it is read-only; it is copied


class _Part(NamedTuple):
    """One tensor of an entry, as it is read alone: shape and strides with and without a batch of one."""

    name: str
    dtype: torch.dtype
    size: int
    begin: int
    batched: tuple[tuple[int, ...], tuple[int, ...]]
    alone: tuple[tuple[int, ...], tuple[int, ...]]
    is_narrow: bool


Layout = tuple[Field, ...]
_parts: dict[tuple[int, tuple[str, ...]], tuple[Layout, list[_Part] | None]] = {}
"""By layout (one object for all entries that have it) and what is wanted: how it is read alone."""


def read_batch(
    store: Store, locations: Sequence[EntryLocation], only: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The entries at these places, stacked by name [B, …]: all their tensors, or `only` some.

    Raises:
        ValueError: they are of different layouts.
    """
    first = locations[0].fields
    if len(locations) == 1:
        found = read_one(store, locations[0], only, batched=True)
        if found is not None:
            return found
    elif any(location.fields is not first and location.fields != first for location in locations):
        raise ValueError("the samples of a batch have latents of different shapes; take them from one bucket")
    wanted = _wanted(first, only)
    length = max(one.begin + one.length for one in wanted)
    rows = np.empty((len(locations), length), np.uint8)
    for row, location in zip(rows, locations, strict=True):
        row[:] = store.view(location.path)[location.begin : location.begin + length]
    all_rows = torch.from_numpy(rows)
    return formats.dequantize({one.name: _column(all_rows, one) for one in wanted})


def read_one(
    store: Store, location: EntryLocation, only: tuple[str, ...] = (), batched: bool = False
) -> dict[str, Tensor] | None:
    """One entry, read where it lies; `batched` as a batch of one.

    None where its numbers do not lie on their boundaries, or share scales: then its bytes are copied first.
    """
    known = _parts.get((id(location.fields), only))
    if known is None:
        known = _parts[id(location.fields), only] = (
            location.fields,
            _read_alone(_wanted(location.fields, only)),
        )
    found: dict[str, Tensor] = {}
    for part in known[1] or ():
        begin = location.begin + part.begin
        if begin % part.size:
            return None
        numbers = store.numbers(location.path, part.dtype)
        shape, strides = part.batched if batched else part.alone
        there = torch.as_strided(numbers, shape, strides, begin // part.size)
        found[part.name] = there.float() if part.is_narrow else there.clone()
    return found or None


def _read_alone(wanted: Sequence[Field]) -> list[_Part] | None:
    """How these tensors are read where they lie; None if they share scales or are empty."""
    if any(one.name.endswith(formats.SCALE) or not one.length for one in wanted):
        return None
    parts = []
    for one in wanted:
        strides = [torch.empty(shape, device="meta").stride() for shape in ((1, *one.shape), one.shape)]
        batched, single = ((1, *one.shape), strides[0]), (one.shape, strides[1])
        narrow = one.dtype.is_floating_point and one.dtype != torch.float32
        parts.append(_Part(one.name, one.dtype, one.dtype.itemsize, one.begin, batched, single, narrow))
    return parts


def _wanted(fields: Layout, only: tuple[str, ...]) -> list[Field]:
    """The fields of an entry that are asked for."""
    return [one for one in fields if not only or one.name.removesuffix(formats.SCALE) in only]


def _column(rows: Tensor, one: Field) -> Tensor:
    """One field of all rows [B, bytes] uint8 → [B, *shape]."""
    part = rows[:, one.begin : one.begin + one.length].reshape(-1)
    return part.view(one.dtype).reshape(len(rows), *one.shape)
