"""Encoding ahead of training where a store may take only so much of the disk."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from sfumato.data.encoding.batch_sampler import BatchSampler, Curriculum
from sfumato.data.encoding.encoded_dataset import EncodedDataset
from sfumato.data.encoding.ring_dataset import RingDataset
from sfumato.data.encoding.streaming_dataset import StreamingDataset
from sfumato.errors import Refused
from sfumato.recipe import Recipe
from sfumato.run_folder import write_atomic
from sfumato.settings import parse_bytes
from sfumato.training.distributed.processes import BatchSplit, current_processes
from sfumato.training.objective.diffusion import part_slice
from sfumato.training.objective.packed_batches import indices_by_shape

FOLDER = "rings"
OWNER = "owner.json"


def cache_limit_bytes(recipe: Recipe) -> float:
    """Bytes that a run's encoded pictures may take; infinite where nothing is said.

    Raises:
        Refused: it is no size, or the recipe streams already.
    """
    limit = recipe.data.cache_limit
    if not limit:
        return float("inf")
    if recipe.data.stream:
        raise Refused("data.stream keeps no pictures, data.cache_limit says how many: leave one of them out.")
    try:
        return parse_bytes(limit)
    except Refused:
        raise Refused(f'data.cache_limit = "{limit}" is no size. Write, for example, "20GB".') from None


def as_ring_dataset(found: StreamingDataset, recipe: Recipe) -> RingDataset | None:
    """The set as one that is encoded ahead into a ring of the recipe's size; None if all of it fits."""
    limit = cache_limit_bytes(recipe)
    locations = [some for item in found.items for some in (item.pictures, *item.companions.values())]
    if sum(place.length for some in locations for place in some) <= limit:
        return None
    processes = current_processes()
    home = home_of(recipe)
    home.mkdir(parents=True, exist_ok=True)
    write_atomic(home / OWNER, json.dumps({"owner": recipe.output}))
    named = {one.name: getattr(found, one.name) for one in fields(StreamingDataset)}
    return RingDataset(
        **named,
        ring=home / f"{processes.rank}-of-{processes.count}",
        limit=int(limit / processes.count),
    )


def home_of(recipe: Recipe) -> Path:
    """Where the rings of a run lie."""
    name = hashlib.sha256(recipe.output.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return Path(recipe.data.cache_dir).expanduser() / FOLDER / name


def start_encoding_ahead(train: EncodedDataset, order: BatchSampler | Curriculum, recipe: Recipe) -> None:
    """Let a bounded set encode what this process's next steps show; any other set needs nothing."""
    if not isinstance(train, RingDataset):
        return
    division = BatchSplit.of(recipe.train, current_processes())

    def reads_of(step: int) -> Sequence[tuple[Sequence[int], int]]:
        indices, epoch = order.at(step)
        read = [indices[part_slice(len(indices), part, division.parts)] for part in division.mine]
        if recipe.train.sequence_packing:
            read = [
                [one[at] for at in places] for one in read for places in indices_by_shape(one, train.buckets)
            ]
        return [(some, epoch) for some in read]

    largest = -(-order.largest // division.parts) * len(division.mine)
    train.start_prefetch(reads_of, largest, recipe.seed)


def stop_encoding_ahead(train: EncodedDataset, finished: bool) -> None:
    """Training has ended; where it `finished`, its ring is of no use any more."""
    if isinstance(train, RingDataset):
        train.close(finished)
