"""A checkpoint that many processes write, each the rows it holds: no process ever has the whole.

All of them begin together; then each writes its files and, when they are on the disk, a note with their
checksums. The leading one waits for the notes, makes the manifest of them and renames the folder into its
place. Processes meet on the disk alone, so that a thread can do it beside the steps, and nothing is pickled.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.errors import Failed, Refused
from sfumato.run_folder import explain_disk_errors, move_into_place, remove_partial_files, write_atomic
from sfumato.training.distributed.processes import Processes
from sfumato.training.distributed.sharding import Shards
from sfumato.training.state import checkpoint
from sfumato.training.state.checkpoint import Tensors

PATIENCE_SECONDS = 1800.0
"""How long the leading process waits for what the others write."""


def staging_folder(folder: Path) -> Path:
    """Where the folder is written before it is renamed: all processes know it."""
    return folder.with_name(f".{folder.name}.shared.part")


def begin(folder: Path, groups: Mapping[str, Tensors], processes: Processes) -> None:
    """Make the place; every process calls it, outside threads.

    Raises:
        Failed: the disk has no room for the shares of all. Refused: it may not be written to.
    """
    if processes.is_rank_zero:
        with explain_disk_errors(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            remove_partial_files(folder.parent)
            checkpoint.check_disk_space(folder.parent, checkpoint.bytes_of(groups) * processes.count)
            staging_folder(folder).mkdir()
    processes.wait()


def local_shards(
    shards: Shards, groups: Mapping[str, Tensors]
) -> tuple[dict[str, dict[str, Tensor]], "FirstRows"]:
    """What this process writes of these groups: its rows; what is whole is the leading one's to write.

    Returns:
        the tensors of each group, and the place of each one's first number in its whole tensor.
    """
    part: dict[str, dict[str, Tensor]] = {}
    firsts: dict[str, dict[str, list[int]]] = {}
    for group, tensors in groups.items():
        mine, places = part.setdefault(group, {}), firsts.setdefault(group, {})
        for key, tensor in tensors.items():
            rows = shards.rows_of(key, tensor)
            if rows is None and shards.processes.is_rank_zero:
                mine[key], places[key] = tensor, [0] * tensor.ndim
            elif rows is not None and rows.count and (shards.copy == 0):
                mine[key], places[key] = tensor, [rows.first] + [0] * (tensor.ndim - 1)
    return part, firsts


FirstRows = Mapping[str, Mapping[str, list[int]]]


def write(
    folder: Path,
    groups: Mapping[str, Tensors],
    firsts: FirstRows,
    state: Mapping[str, Any],
    processes: Processes,
) -> Path:
    """Write this process's part; the leading one finishes the folder when all parts are there.

    Raises:
        Failed: the disk is full, or another process could not write. Refused: it may not be written to.
    """
    place, number = staging_folder(folder), processes.rank
    try:
        with explain_disk_errors(place):
            files: dict[str, Any] = {}
            for group, tensors in groups.items():
                if tensors:
                    file = place / f"{group}-{number + 1:05d}-of-{processes.count:05d}.safetensors"
                    checkpoint.write_file(file, tensors, firsts[group])
                    files[file.name] = checkpoint.checksum_entry(file)
            write_atomic(_note(place, number), json.dumps(files))
    except (Failed, Refused) as problem:
        (place / f".failed-{number:05d}").mkdir(exist_ok=True)
        raise problem
    if processes.is_rank_zero:
        _finish(folder, state, processes.count)
    return folder


def _note(place: Path, number: int) -> Path:
    return place / f".part-{number:05d}.json"


def _finish(folder: Path, state: Mapping[str, Any], count: int) -> None:
    """Wait for all notes, write state and manifest, rename."""
    place = staging_folder(folder)
    notes, ends = [_note(place, number) for number in range(count)], time.monotonic() + PATIENCE_SECONDS
    while not all(note.exists() for note in notes):
        if any(place.glob(".failed-*")) or time.monotonic() > ends:
            raise Failed(
                f"{folder}: another process of this run could not write its part of the checkpoint; it says "
                "why. The checkpoints written before are whole; give the same command again."
            )
        time.sleep(0.02)
    files: dict[str, Any] = {}
    for note in notes:
        files |= json.loads(note.read_bytes())
        note.unlink()
    with explain_disk_errors(folder):
        checkpoint.write_state_and_manifest(place, state, files)
        move_into_place(place, folder)
