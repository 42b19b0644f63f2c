"""Sampling times that were fitted to a model, kept in a file beside its weights."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from sfumato.errors import MALFORMED, Refused, parse_object
from sfumato.run_folder import write_atomic
from sfumato.theory.times import FittedGrid

TIMES = "times.json"


def home_of(folder: Path) -> Path:
    """Where a model's or run's times are kept.

    Raises:
        Refused: unless it is a folder.
    """
    if not folder.is_dir():
        raise Refused(f"{folder} is no folder. Give the folder of a model or of a run.")
    if folder.parent.name == "checkpoints" and (folder / "manifest.json").is_file():
        folder = folder.parent.parent
    return folder / "model" if (folder / "model").is_dir() else folder


def read_times(home: Path) -> FittedGrid | None:
    """The times kept in a folder, None where there are none.

    Raises:
        Refused: they are damaged.
    """
    file = home / TIMES
    if not file.is_file():
        return None
    try:
        stored = parse_object(file.read_text(encoding="utf-8"))
        if "check" in stored and stored.pop("check") != _check(stored):
            raise ValueError("it does not have the checksum it was written with")
        return FittedGrid.from_dict(stored)
    except MALFORMED as problem:  # a Refused is one, too
        raise Refused(f"{file} is damaged ({problem}). Delete it, or fit the times again.") from problem


def write_times(home: Path, pilot: FittedGrid) -> Path:
    """Keep times in a folder, in place of older ones; the file."""
    stored = pilot.to_dict()
    write_atomic(home / TIMES, json.dumps({**stored, "check": _check(stored)}))
    return home / TIMES


def _check(stored: Mapping[str, object]) -> str:
    """What changes when any of the numbers does."""
    return f"{zlib.crc32(json.dumps(stored, sort_keys=True).encode()):08x}"
