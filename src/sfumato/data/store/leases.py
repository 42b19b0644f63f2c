"""Uses: what each run needs of a store, written down beside the shards, so that the rest can be collected.

A use lives as long as its owner (a run's folder) exists. A process that works with a use has a lease on it,
which ends with the process however it ends; collecting leaves the shards of such a use as they are.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sfumato.errors import Refused
from sfumato.locks import FileLease, LockHeld, exclusive, is_leased
from sfumato.run_folder import explain_disk_errors, write_atomic

FORMAT = "sfumato-use-1"
FOLDER = "uses"
GATE = ".gate"
"""Who begins to use the store goes through it one by one, and who collects it keeps it shut."""


@dataclass(frozen=True)
class Owner:
    """Who needs something: a run's folder, and which part of it where the parts need different things."""

    folder: str
    part: str = ""


@dataclass(frozen=True)
class Lease:
    """What one run needs: its owner's folder, the keys of each kind, the fingerprints of its encoders.

    busy: a process is working with it now; written: when, in seconds since 1970.
    """

    owner: Owner
    keys: Mapping[str, frozenset[str]]
    encoders: tuple[str, ...]
    written_at: float
    busy: bool
    file: Path


def acquire(
    root: Path, owner: Owner, keys: Mapping[str, Iterable[str]], encoders: Iterable[str]
) -> FileLease:
    """Write down what `owner` needs, and hold it; returns what holds it until it is released.

    Waits while the store is being collected.

    Raises:
        Refused: the store cannot be written. Failed: the disk is full.
    """
    folder = root / FOLDER
    with explain_disk_errors(folder):
        folder.mkdir(exist_ok=True)
    whose = json.dumps([owner.folder, owner.part])
    file = folder / f"{hashlib.sha256(whose.encode()).hexdigest()[:24]}.safetensors"
    metadata = {"format": FORMAT, "owner": whose, "encoders": json.dumps(sorted(encoders))}
    data = save({kind: _bytes(some) for kind, some in keys.items()}, metadata)
    with explain_disk_errors(folder), exclusive(root / GATE):
        is_leased(file)  # removes what killed processes left
        lease = FileLease(file)
        if not file.exists() or file.read_bytes() != data:
            write_atomic(file, data)
        else:
            os.utime(file)
    return lease


def read_leases(root: Path) -> list[Lease]:
    """All uses of a store; a damaged one is left out (its run writes it again). Ask inside `collecting`."""
    found = []
    for file in sorted((root / FOLDER).glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as held:
                metadata = held.metadata() or {}
                keys = {kind: _texts(held.get_tensor(kind)) for kind in held.keys()}  # noqa: SIM118
            if metadata.get("format") != FORMAT:
                continue
            encoders, (folder, part) = json.loads(metadata["encoders"]), json.loads(metadata["owner"])
            owner = Owner(str(folder), str(part))
            written_at = file.stat().st_mtime
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        known = tuple(map(str, encoders))
        found.append(Lease(owner, keys, known, written_at, is_leased(file), file))
    return found


def remove(use: Lease) -> None:
    """Remove a use that nobody works with."""
    use.file.unlink(missing_ok=True)


@contextmanager
def collecting(root: Path) -> Iterator[None]:
    """Let nobody begin to use the store for the length of a block.

    Raises:
        Refused: somebody is collecting, or just beginning to use it; or it cannot be written.
    """
    with ExitStack() as stack:
        try:
            with explain_disk_errors(root):
                stack.enter_context(exclusive(root / GATE, wait=False))
        except LockHeld:
            raise Refused(
                f"{root} is being collected, or a run is just beginning to use it. Give the command again."
            ) from None
        yield


def _bytes(keys: Iterable[str]) -> torch.Tensor:
    """Keys of 32 hexadecimal digits as uint8 [N, 16], in order."""
    listed = sorted(set(keys))
    if not listed:
        return torch.zeros(0, 16, dtype=torch.uint8)
    return torch.frombuffer(bytearray.fromhex("".join(listed)), dtype=torch.uint8).reshape(-1, 16)


def _texts(rows: torch.Tensor) -> frozenset[str]:
    text = rows.numpy().tobytes().hex()
    return frozenset(text[at : at + 32] for at in range(0, len(text), 32))
