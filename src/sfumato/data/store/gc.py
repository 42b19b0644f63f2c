"""Collecting: what nobody needs any more leaves the store, beside running encodes and trainings.

Kept is what the runs need whose folders exist, what is younger than some days, and whatever else is asked.
A shard that a running process reads from is left whole; it is collected another time.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.data.store import leases, shard
from sfumato.data.store.store import KINDS, STRAY_SECONDS, Store

DAY = 24 * 3600.0


@dataclass
class KindUsage:
    """How much there is of one kind, and how much of it nobody needs: entries, and bytes of numbers."""

    entries: int = 0
    bytes: int = 0
    unused_entries: int = 0
    unused_bytes: int = 0
    damaged: int = 0


@dataclass
class GCReport:
    """What a store holds: shares by kind, its users, leftovers of killed writers; and what was freed."""

    shares: dict[str, KindUsage] = field(default_factory=dict)
    users: list[dict[str, Any]] = field(default_factory=list)
    leftover_bytes: int = 0
    freed_bytes: int = 0
    encoders: set[str] = field(default_factory=set)
    """Fingerprints of the encoders that somebody still needs."""

    @property
    def unused_bytes(self) -> int:
        """What collecting frees, about."""
        return sum(one.unused_bytes for one in self.shares.values()) + self.leftover_bytes


def collect(
    store: Store,
    keep: Mapping[str, Iterable[str]] | None = None,
    days: float = 30.0,
    remove: bool = False,
) -> GCReport:
    """Find what a store holds that nobody needs, and `remove` it.

    Args:
        keep: further keys, by kind, that somebody needs.
        days: what was written since is kept, whoever needs it.
    Raises:
        Refused: another process is collecting, or the store cannot be written.
    """
    with leases.collecting(store.root):
        found = GCReport()
        needed = {kind: set((keep or {}).get(kind, ())) for kind in KINDS}
        busy: dict[str, set[str]] = {kind: set() for kind in KINDS}
        young = time.time() - days * DAY
        for use in leases.read_leases(store.root):
            alive = use.busy or use.written_at > young or Path(use.owner.folder).exists()
            found.users.append(
                {"owner": use.owner.folder, "part": use.owner.part, "busy": use.busy, "kept": alive}
            )
            if not alive:
                if remove:
                    leases.remove(use)
                continue
            found.encoders |= set(use.encoders)
            for kind, keys in use.keys.items():
                needed[kind] |= keys
                if use.busy:
                    busy[kind] |= keys
        for kind in KINDS:
            share = found.shares[kind] = KindUsage()
            for path in shard.shard_files(store.root / kind):
                found.freed_bytes += _one_shard(path, needed[kind], busy[kind], young, share, remove)
            found.freed_bytes += _leftovers(store.root / kind, found, remove)
        if remove:
            store.refresh()
    return found


def _one_shard(
    path: Path, needed: set[str], busy: set[str], young: float, share: KindUsage, remove: bool
) -> int:
    """Count a shard's entries and `remove` those that nobody needs; returns the bytes freed."""
    try:
        entries = shard.read_header(path)
    except shard.DamagedShard:
        share.damaged += 1
        return 0
    share.entries += len(entries)
    share.bytes += sum(one.length for one in entries.values())
    if path.stat().st_mtime > young or not busy.isdisjoint(entries):
        return 0
    unused = {key: one for key, one in entries.items() if key not in needed}
    share.unused_entries += len(unused)
    share.unused_bytes += sum(one.length for one in unused.values())
    if not (unused and remove):
        return 0
    before, after = path.stat().st_size, 0
    if len(unused) < len(entries):
        data = shard.memory_map(path)
        kept = {key: shard.read_entry(data, one) for key, one in entries.items() if key not in unused}
        del data  # no longer mapped: some systems do not remove what is
        after = shard.write(path.parent, kept).stat().st_size
    path.unlink()
    return before - after


def _leftovers(folder: Path, found: GCReport, remove: bool) -> int:
    """Count what killed writers left in `folder`, and `remove` it; returns the bytes freed."""
    freed = 0
    for stray in folder.glob(".*.part"):
        if stray.is_file() and time.time() - stray.lstat().st_mtime > STRAY_SECONDS:
            found.leftover_bytes += stray.stat().st_size
            freed += stray.stat().st_size if remove else 0
            if remove:
                stray.unlink(missing_ok=True)
    return freed
