"""Reading: entries of mapped shards become tensors, each number copied once.

One entry alone is read where it lies; of a batch the bytes are gathered first, which costs less than a tensor
for each of its rows.
"""

import warnings
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from . import formats
from .index import Place
from .shard import Field
from .store import Store

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"0", np.uint8))  # torch warns once that it is read-only; it is copied


def tensors(store: Store, places: Sequence[Place], only: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The entries at these places, stacked by name [B, …]: all their tensors, or `only` some.

    Raises:
        ValueError: they are of different layouts.
    """
    first = places[0].fields
    if any(place.fields is not first and place.fields != first for place in places):
        raise ValueError("the samples of a batch have latents of different shapes; take them from one bucket")
    wanted = _wanted(first, only)
    if len(places) == 1:
        found = _where_it_lies(store, places[0], wanted)
        if found is not None:
            return found
    length = max(one.begin + one.length for one in wanted)
    rows = np.empty((len(places), length), np.uint8)
    for row, place in zip(rows, places, strict=True):
        row[:] = store.view(place.path)[place.begin : place.begin + length]
    all_rows = torch.from_numpy(rows)
    return formats.restore({one.name: _column(all_rows, one) for one in wanted})


def _where_it_lies(store: Store, place: Place, wanted: Sequence[Field]) -> dict[str, Tensor] | None:
    """One entry without a copy of its bytes before; None where its numbers do not lie on their boundaries."""
    stored: dict[str, Tensor] = {}
    for one in wanted:
        begin, size = place.begin + one.begin, one.dtype.itemsize
        if begin % size or not one.length:
            return None
        numbers = store.numbers(place.path, one.dtype)
        stored[one.name] = torch.as_strided(numbers, *_layout(one.shape), begin // size)
    return formats.restore(stored, copied=True)


@cache
def _wanted(fields: tuple[Field, ...], only: tuple[str, ...]) -> tuple[Field, ...]:
    """The fields of an entry that are asked for."""
    return tuple(one for one in fields if not only or one.name.removesuffix(formats.SCALE) in only)


@cache
def _layout(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of one entry's tensor as a batch of one."""
    return (1, *shape), torch.empty((1, *shape), device="meta").stride()


def _column(rows: Tensor, one: Field) -> Tensor:
    """One field of all rows [B, bytes] uint8 → [B, *shape]."""
    part = rows[:, one.begin : one.begin + one.length].reshape(-1)
    return part.view(one.dtype).reshape(len(rows), *one.shape)
