"""Order: which samples step s trains on, as a pure function of (seed, s).

Nothing is iterated and nothing has a state: a run resumes at the very sample by asking for its step, and any
number of processes take their shares of the same batch.
"""

from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache

import torch

from sfumato.errors import Refused
from sfumato.theory import noise


class Order:
    """Batches in which all samples have one bucket, each sample once an epoch.

    The samples of a bucket form an endless stream, one permutation after the other, cut into batches. Epoch e
    has the batches that end within the bucket's first (e + 1)·n samples and not within its first e·n, so what
    is left over at the end of an epoch opens the next one and nothing is dropped. The batches of an epoch
    are shuffled over the buckets.
    """

    def __init__(
        self,
        buckets: Sequence[Hashable],
        batch: int | Callable[[Hashable], int],
        seed: int = 0,
        repeats: Sequence[int] | None = None,
    ):
        """
        Args:
            buckets: the bucket of each sample (any hashable: its shape).
            batch: samples in a batch, or that number for each bucket (a token budget).
            repeats: how often each sample occurs in an epoch; default once.
        Raises:
            Refused: there are no samples, or a batch is empty.
        """
        if not len(buckets):
            raise Refused("There is nothing to train on: no sample was left. See the files set aside.")
        kinds = sorted(set(buckets), key=repr)
        number = {kind: i for i, kind in enumerate(kinds)}
        rows: list[list[int]] = [[] for _ in kinds]
        for index, kind in enumerate(buckets):
            rows[number[kind]] += [index] * (1 if repeats is None else repeats[index])
        kept = [i for i, row in enumerate(rows) if row]
        self.members = [torch.tensor(rows[i]) for i in kept]
        self.kinds = [kinds[i] for i in kept]
        self.batches = [batch(kind) if callable(batch) else batch for kind in self.kinds]
        if min(self.batches) < 1:
            raise Refused(f"A batch of {min(self.batches)} samples is empty; set train.batch to 1 or more.")
        self.seed = seed
        self._permutation = lru_cache(maxsize=2 * len(kinds) + 2)(self._permute)
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def _permute(self, bucket: int, epoch: int) -> list[int]:
        rows = self.members[bucket]
        return rows[noise.permutation(len(rows), self.seed, f"order of bucket {bucket}", epoch)].tolist()

    def _shuffle(self, epoch: int) -> list[tuple[int, int]]:
        """(bucket, number of the batch in that bucket's stream) of every batch of an epoch."""
        listed = [
            (bucket, number)
            for bucket in range(len(self.members))
            for number in range(self._before(bucket, epoch), self._before(bucket, epoch + 1))
        ]
        return [
            listed[i] for i in noise.permutation(len(listed), self.seed, "order of batches", epoch).tolist()
        ]

    def _before(self, bucket: int, epoch: int) -> int:
        """Batches of a bucket before an epoch."""
        return epoch * len(self.members[bucket]) // self.batches[bucket]

    def steps_before(self, epoch: int) -> int:
        """Steps before an epoch begins."""
        return sum(self._before(bucket, epoch) for bucket in range(len(self.members)))

    def epoch_of(self, step: int) -> int:
        """The epoch a step falls into."""
        high = 1
        while self.steps_before(high) <= step:
            high *= 2
        return bisect_right(range(high + 1), step, key=self.steps_before) - 1

    def at(self, step: int) -> tuple[list[int], int]:
        """The samples of a step (counted from 0) as indices, and the epoch it falls into."""
        epoch = self.epoch_of(step)
        bucket, number = self._shuffled(epoch)[step - self.steps_before(epoch)]
        size, count = self.batches[bucket], len(self.members[bucket])
        places = range(number * size, (number + 1) * size)
        return [self._permutation(bucket, at // count)[at % count] for at in places], epoch

    def describe(self) -> dict[str, object]:
        """What a run of this order is like: steps of the first epoch, samples by bucket, those left over."""
        return {
            "steps_per_epoch": self.steps_before(1),
            "buckets": {
                str(kind): {"samples": len(rows), "batch": size, "carried_over": len(rows) % size}
                for kind, rows, size in zip(self.kinds, self.members, self.batches, strict=True)
            },
        }


def share(indices: Sequence[int], rank: int, world: int) -> list[int]:
    """The part of a global batch that process `rank` of `world` takes; together they take all, in order.

    Raises:
        Refused: the batch cannot be divided evenly.
    """
    if len(indices) % world:
        raise Refused(
            f"A batch of {len(indices)} cannot be shared by {world} processes; "
            f"set train.batch to a multiple of {world}."
        )
    each = len(indices) // world
    return list(indices[rank * each : (rank + 1) * each])
