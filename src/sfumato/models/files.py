"""Files of weights: checksums that prove them, pieces of safetensors, and no pickles."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.errors import MALFORMED, Failed, Refused, explain_malformed, parse_object
from sfumato.run_folder import checksum

# ----------------------------------------------------------------
# A model's folder says what its weights were when they were written, so that a flipped bit is found.
#
# safetensors files load whatever their numbers have become. `checksums.json` beside a model has the sha256 of
# each; a folder without it, as others write them, is taken as it is.


SEAL = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Write down the checksums of all weights in a folder."""
    files = sorted(folder.rglob("*.safetensors"))
    sums = {file.relative_to(folder).as_posix(): checksum(file) for file in files}
    (folder / SEAL).write_text(json.dumps(sums, indent=1), encoding="utf-8")


def verify_checksums(folder: Path) -> None:
    """Compare the weights in a folder with what it says of them.

    Raises:
        Failed: naming the file that differs.
    """
    for name, digest in read_json(folder / SEAL).items() if (folder / SEAL).is_file() else ():
        with explain_malformed(folder / SEAL, "Copy the folder again, or delete that file."):
            file = folder / name
            inside = file.resolve().is_relative_to(folder.resolve()) and file.is_file()
        if inside and checksum(file) != digest:
            raise Failed(
                f"{file} is damaged: it does not have the checksum it was written with. Copy the folder "
                f"again; or, if you changed the file yourself, delete {folder / SEAL}."
            )


HEADER = "sfumato.sha256"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names and numbers, for a file that travels alone and carries it in its header."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(name.encode())
        state.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def save_sealed(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose header has, beside what is `told`, the hash of its tensors."""
    save_file(dict(tensors), file, {**metadata, HEADER: digest(tensors)})


def read_json(file: Path) -> Mapping[str, Any]:
    """A JSON object from a file that sfumato wrote.

    Raises:
        Failed: the file is damaged.
    """
    try:
        return parse_object(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise Failed(
            f"{file} is damaged ({problem}). Copy the folder again, or save the model again."
        ) from problem


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of the pieces of it that stand in its place.

    Raises:
        Failed: the file is damaged.
    """
    try:
        return load_file(file) if file.is_file() else read(file.parent, file.stem)
    except (SafetensorError, *MALFORMED) as problem:
        raise Failed(
            f"{file} is damaged ({problem}). Copy the folder again, or save the model again."
        ) from problem


# ----------------------------------------------------------------
# Only safetensors are read: a pickle can run anything when it is opened.


PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
CONVERT = "safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW)"


def must_be_safetensors(file: Path, convert: str = CONVERT) -> None:
    """Raises Refused for a file of any other kind; `convert` says how a pickle is made one that is read."""
    if file.suffix == ".safetensors":
        return
    if file.suffix not in PICKLES:
        raise Refused(f"{file} is no .safetensors file, and only those are read. Give one of that kind.")
    raise Refused(
        f"{file} is a pickle, which can run anything when it is opened; only safetensors are read. "
        f"Convert it where you trust it: {convert}."
    )


# ----------------------------------------------------------------
# Tensors in a folder, by group: one safetensors file, several by size, or the pieces that processes wrote.
#
# A piece is some rows of a tensor. Its file says in its header where the piece begins, under the key that
# torch.distributed.checkpoint's safetensors storage uses, so that its reader opens these files too; ours
# takes
# what it needs of each and never holds two copies.


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
    shards = json.loads((file.metadata() or {}).get(SHARDING, "{}"))
    for name in file.keys():  # noqa: SIM118
        place = shards.get(name, {}).get(OFFSETS) or [0]
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
