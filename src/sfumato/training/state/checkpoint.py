"""A checkpoint is a folder that says what it holds and can prove it.

`model`, `ema` and `optimizer` are safetensors (in shards where large), `state.json` holds all that is
no tensor, `manifest.json` the sha256 of each file. The folder appears by one rename; nothing in it is
ever unpickled. A damaged one is set aside by name, and the one before it is used.
"""

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sfumato.errors import MALFORMED, Failed, explain_malformed, parse_object
from sfumato.models.files import heading
from sfumato.run_folder import RunFolder, atomic_folder, checksum, explain_disk_errors, remove_partial_files

FORMAT = 1
SHARD_BYTES = 5_000_000_000
SPARE_BYTES = 16_000_000
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class CheckpointRetention:
    """Which checkpoints stay.

    newest: how many of the newest; every: those of every so many steps as well, 0 for none; best: the step
    whose checkpoint stays, 0 for none.
    """

    newest: int = 3
    every: int = 0
    best: int = 0


def bytes_of(groups: Mapping[str, Tensors]) -> int:
    """Of all tensors."""
    return sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())


def save(
    run: RunFolder,
    step: int,
    groups: Mapping[str, Tensors],
    state: Mapping[str, Any],
    keep: CheckpointRetention | None = None,
) -> Path:
    """Write the checkpoint of `step` and let older ones go.

    Args:
        groups: the tensors of each file, as {"model": …, "ema": …, "optimizer": …}.
        state: JSON.
    Returns:
        the checkpoint's folder.
    Raises:
        Failed: the disk has no room for it (asked before writing, so the older ones are whole).
        Refused: the run folder is not writable.
    """
    folder = prepare(run, step, groups)
    write(folder, groups, {"step": step, **state})
    publish(run, step, keep or CheckpointRetention())
    return folder


def prepare(run: RunFolder, step: int, groups: Mapping[str, Tensors]) -> Path:
    """Make sure that the checkpoint of `step` can be written; returns its folder.

    Raises:
        Failed: the disk has no room for it. Refused: the run folder is not writable.
    """
    with explain_disk_errors(run.checkpoints):
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        remove_partial_files(run.checkpoints)
    check_disk_space(run.checkpoints, bytes_of(groups))
    return run.checkpoint_folder(step)


def publish(run: RunFolder, step: int, keep: CheckpointRetention) -> None:
    """Record a checkpoint that stands in its place, point at the best one, and let older ones go."""
    run.event(
        "checkpoint", step=step, path=run.checkpoint_folder(step).relative_to(run.path).as_posix(), sync=True
    )
    if keep.best and run.checkpoint_folder(keep.best).is_dir():
        _link(run.checkpoints / "best", run.checkpoint_folder(keep.best).name)
    for folder in run.checkpoint_folders()[: -keep.newest]:
        number = int(folder.name.removeprefix("step-"))
        if number != keep.best and not (keep.every and number % keep.every == 0):
            gone = folder.with_name(f".{folder.name}.gone.part")
            folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def _link(link: Path, name: str) -> None:
    """Make `link` a link to `name` beside it, in one rename; where the disk has no links, leave it out."""
    if link.is_symlink() and str(link.readlink()) == name:
        return
    beside = link.with_name(f".{link.name}.part")
    beside.unlink(missing_ok=True)
    with suppress(OSError, NotImplementedError):
        beside.symlink_to(name)
        beside.replace(link)


def write(folder: Path, groups: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
    """Write tensors, state and manifest as one folder, which appears when all of it is on the disk.

    Raises:
        Failed: the disk has no room for it. Refused: it is not writable.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_disk_space(folder.parent, bytes_of(groups))
    with atomic_folder(folder) as beside:
        for group, tensors in groups.items():
            _write_group(beside, group, tensors)
        write_state_and_manifest(
            beside, state, {file.name: checksum_entry(file) for file in beside.iterdir()}
        )


def checksum_entry(file: Path) -> dict[str, Any]:
    """What the manifest says of a file, by which damage is seen."""
    return {"sha256": checksum(file), "bytes": file.stat().st_size}


def write_state_and_manifest(folder: Path, state: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Write `state.json`, and the manifest of it and of these files."""
    file = folder / "state.json"
    file.write_text(json.dumps({"format": FORMAT, **state}, indent=1), encoding="utf-8")
    listed = dict(sorted({**files, file.name: checksum_entry(file)}.items()))
    manifest = json.dumps({"format": FORMAT, "files": listed}, indent=1)
    (folder / "manifest.json").write_text(manifest, encoding="utf-8")


def check_disk_space(place: Path, nbytes: int, what: str = "the next checkpoint") -> None:
    """Raises Failed unless the disk of `place` has room for so many bytes."""
    need, free = SPARE_BYTES + nbytes, shutil.disk_usage(place).free
    if free < need:
        raise Failed(
            f"{place}: {what} needs {need / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB. "
            "The checkpoints written before are whole; make room or lower train.keep_checkpoints, and give "
            "the same command again."
        )


def _write_group(folder: Path, group: str, tensors: Tensors) -> None:
    """Write `group` as one safetensors file, or as many as its size asks for."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        write_file(folder / f"{group}{part}.safetensors", shard)


def write_file(file: Path, tensors: Tensors, firsts: Mapping[str, list[int]] | None = None) -> None:
    """Write one safetensors file; with `firsts`, its tensors are rows of larger ones, which begin there."""
    here: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        if kept.numel() and kept.untyped_storage().data_ptr() in places:
            kept = kept.clone()  # of memory that another has too, which safetensors would refuse
        places.add(kept.untyped_storage().data_ptr())
        here[name] = kept
    try:
        save_file(here, file, None if firsts is None else heading(dict(firsts)))
    except SafetensorError as problem:
        if "os error 28" in str(problem) or "os error 122" in str(problem):
            raise OSError(errno.ENOSPC, "No space left on device") from problem
        raise


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if every byte is as it was written."""
    manifest = folder / "manifest.json"
    try:
        listed = parse_object(manifest.read_bytes())
        expected = {str(name): str(entry["sha256"]) for name, entry in listed["files"].items()}
    except FileNotFoundError:
        return f"{manifest} is missing"
    except MALFORMED as problem:
        return f"{manifest} cannot be read ({problem})"
    for name, digest in expected.items():
        file = folder / name
        if file.parent != folder or not file.is_file():
            return f"{file} is missing"
        if checksum(file) != digest:
            return f"{file} does not have the checksum it was written with"
    if "state.json" not in expected:
        return f"{manifest} does not list state.json"
    return None


def newest_intact(run: RunFolder, say: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint that is whole; None if the run has none yet.

    Args:
        say: told of each damaged one, which is then renamed out of the way (`damaged-step-…`); without
            it, damaged ones are only passed over.
    Raises:
        Failed: there are checkpoints, and all are damaged.
    """
    reasons = []
    for folder in reversed(run.checkpoint_folders()):
        reason = find_damage(folder)
        if reason is None:
            return folder
        reasons.append(reason)
        if say is not None:
            say(f"{reason}: {folder.name} is set aside, the checkpoint before it is used.")
            _set_aside(run, folder, reason)
    if reasons or (run.checkpoints.is_dir() and any(run.checkpoints.glob("damaged-*"))):
        what = reasons[0] if reasons else f"{run.checkpoints} holds only damaged checkpoints"
        raise Failed(
            f"{what}, and there is no earlier checkpoint to go back to. "
            f"Remove {run.checkpoints} to start again from step 0, or choose another output."
        )
    return None


def _set_aside(run: RunFolder, folder: Path, reason: str) -> None:
    place = folder.with_name(f"damaged-{folder.name}")
    number = 1
    while place.exists():
        number += 1
        place = folder.with_name(f"damaged-{folder.name}-{number}")
    with explain_disk_errors(folder):
        folder.rename(place)
    run.event("damaged_checkpoint", file=place.relative_to(run.path).as_posix(), reason=reason, sync=True)


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        Failed: it was written by a newer sfumato.
    """
    with explain_malformed(folder / "state.json", "Remove this checkpoint; the one before it is used."):
        state = parse_object((folder / "state.json").read_bytes())
        if state["format"] > FORMAT:
            raise Failed(
                f"{folder} has checkpoint format {state['format']}, this sfumato reads up to {FORMAT}. "
                "Use the version that wrote it, or a newer one."
            )
        return state


def saved_precision(run: RunFolder) -> str | None:
    """The precision of the newest checkpoint that tells it; None before the first."""
    for folder in reversed(run.checkpoint_folders()):
        with suppress(Failed, OSError, ValueError, KeyError):  # a damaged one is named when the run goes on
            return str(read_state(folder)["precision"])
    return None
