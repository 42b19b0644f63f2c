"""Several processes or machines fill one store without talking: each takes a share, then waits for the rest.

What a process could not encode it writes down beside the store, so that the others do not wait for it. One
that dies leaves its share to those that go on.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from sfumato.run_folder import write_atomic

PAUSE = 0.1  # seconds between looks


def name_of(keys: Iterable[str]) -> str:
    """A name for one piece of common work: the hash of all keys it is about."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:24]


def begin(root: Path, work: str, rank: int, world: int) -> Path:
    """Take back what this process said of the same work before; returns where it will say it again."""
    folder = root / "parts"
    if world > 1:
        folder.mkdir(exist_ok=True)
    mine = folder / f"{work}.{rank}-of-{world}.json"
    mine.unlink(missing_ok=True)
    return mine


def wait_for_others(
    mine: Path,
    failed: Mapping[tuple[str, ...], str],
    patience: float,
    progress: Callable[[int, int, str], None],
) -> dict[tuple[str, ...], str]:
    """Say that this process is done, and wait until all are; returns everyone's failures.

    Waiting ends after `patience` seconds in which no shard came: whoever is missing by then has died.
    """
    write_atomic(mine, json.dumps([[list(keys), reason] for keys, reason in failed.items()]))
    work, _, place = mine.name.partition(".")
    world = int(place.split("-")[2].partition(".")[0])
    others = [mine.with_name(f"{work}.{rank}-of-{world}.json") for rank in range(world)]
    seen, since = -1, time.monotonic()
    while not all(other.exists() for other in others):
        progress(sum(other.exists() for other in others), world, "waiting for other processes")
        there = sum(1 for _ in mine.parent.parent.glob("*/*.safetensors"))
        if there != seen:
            seen, since = there, time.monotonic()
        if time.monotonic() - since > patience:
            break
        time.sleep(PAUSE)
    everyone = dict(failed)
    for other in others:
        if other.exists():
            everyone |= {tuple(keys): reason for keys, reason in json.loads(other.read_bytes())}
    return everyone
