"""Tensors in a folder, by group: one safetensors file, several by size, or the pieces that processes wrote.

A piece is some rows of a tensor. Its file says in its header where the piece begins, under the key that
torch.distributed.checkpoint's safetensors storage uses, so that its reader opens these files too; ours takes
what it needs of each and never holds two copies.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

SHARDING = "DCP_SHARDING_INFO"
OFFSETS = "saved_offsets"


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor: which is the first of them, and how many."""

    first: int
    count: int


Wanted = Callable[[str, Sequence[int]], Rows | None]
"""wanted(name, shape of the whole tensor): the rows that are needed; None for all."""


@dataclass(frozen=True)
class _Piece:
    """Where rows of a tensor are: in which open file, from which row on, and their shape."""

    file: Any
    first: int
    shape: tuple[int, ...]


def files_of(folder: Path, group: str) -> list[Path]:
    """The files that hold a group ("model", "ema", "optimizer"); none if the folder has no such group."""
    return sorted([*folder.glob(f"{group}.safetensors"), *folder.glob(f"{group}-*-of-*.safetensors")])


def heading(firsts: dict[str, list[int]]) -> dict[str, str]:
    """What a file's header says of its pieces: the place of each one's first number in its tensor."""
    return {SHARDING: json.dumps({name: {OFFSETS: firsts[name]} for name in sorted(firsts)})}


def read(folder: Path, group: str, wanted: Wanted | None = None) -> dict[str, Tensor]:
    """The tensors of one group, on the CPU; {} if the folder has none.

    Args:
        wanted: of which tensors only some rows are needed.
    Raises:
        SafetensorError, OSError: a file is damaged; ValueError: a tensor's pieces leave a gap.
    """
    with ExitStack() as opened:
        pieces: dict[str, list[_Piece]] = {}
        for file in files_of(folder, group):
            for name, piece in _pieces(opened.enter_context(safe_open(file, "pt"))):
                pieces.setdefault(name, []).append(piece)
        return {name: _joined(name, found, wanted) for name, found in pieces.items()}


def _pieces(file: Any) -> Iterator[tuple[str, _Piece]]:
    told = json.loads((file.metadata() or {}).get(SHARDING, "{}"))
    for name in file.keys():  # noqa: SIM118
        place = told.get(name, {}).get(OFFSETS) or [0]
        yield name, _Piece(file, int(place[0]), tuple(file.get_slice(name).get_shape()))


def _joined(name: str, pieces: list[_Piece], wanted: Wanted | None) -> Tensor:
    """The rows that are wanted, gathered from the pieces that have some of them."""
    if not pieces[0].shape:
        return pieces[0].file.get_tensor(name)
    whole = max(piece.first + piece.shape[0] for piece in pieces), *pieces[0].shape[1:]
    rows = (wanted(name, whole) if wanted else None) or Rows(0, whole[0])
    if len(pieces) == 1 and rows == (0, whole[0]):
        return pieces[0].file.get_tensor(name)
    found: list[Tensor] = []
    here, end = rows.first, rows.first + rows.count
    for piece in sorted(pieces, key=lambda piece: piece.first):
        until = min(end, piece.first + piece.shape[0])
        if piece.first <= here < until:
            found.append(piece.file.get_slice(name)[here - piece.first : until - piece.first])
            here = until
    if here < end:
        raise ValueError(f'rows {here} to {end} of "{name}" are in none of the files')
    if not found:
        return pieces[0].file.get_slice(name)[0:0]
    return found[0] if len(found) == 1 else torch.cat(found)
