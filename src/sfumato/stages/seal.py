"""A model's folder says what its weights were when they were written, so that a flipped bit is found.

safetensors files load whatever their numbers have become. `checksums.json` beside a model has the sha256 of
each; a folder without it, as others write them, is taken as it is.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.errors import Failed
from sfumato.record import checksum

from .tensors import read

SEAL = "checksums.json"


def seal(folder: Path) -> None:
    """Write down the checksums of all weights in a folder."""
    files = sorted(folder.rglob("*.safetensors"))
    sums = {file.relative_to(folder).as_posix(): checksum(file) for file in files}
    (folder / SEAL).write_text(json.dumps(sums, indent=1), encoding="utf-8")


def check(folder: Path) -> None:
    """Compare the weights in a folder with what it says of them.

    Raises:
        Failed: naming the file that differs.
    """
    for name, digest in read_json(folder / SEAL).items() if (folder / SEAL).is_file() else ():
        file = folder / name
        if file.resolve().is_relative_to(folder.resolve()) and file.is_file() and checksum(file) != digest:
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


def save_sealed(tensors: Mapping[str, Tensor], file: Path, told: Mapping[str, str]) -> None:
    """Write a safetensors file whose header has, beside what is `told`, the hash of its tensors."""
    save_file(dict(tensors), file, {**told, HEADER: digest(tensors)})


def read_json(file: Path) -> Mapping[str, Any]:
    """A JSON object from a file that sfumato wrote.

    Raises:
        Failed: the file is damaged.
    """
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
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
    except (OSError, SafetensorError, ValueError) as problem:
        raise Failed(
            f"{file} is damaged ({problem}). Copy the folder again, or save the model again."
        ) from problem
