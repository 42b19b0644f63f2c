"""Order: which samples step s trains on, as a pure function of (seed, s).

Nothing is iterated and nothing has a state: a run resumes at the very sample by asking for its step, and any
number of processes take their shares of the same batch.
"""

from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sfumato.errors import Refused
from sfumato.theory import noise


class BatchSampler:
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
        repeats: Sequence[float] | None = None,
    ):
        """
        Args:
            buckets: the bucket of each sample (any hashable: its shape).
            batch: samples in a batch, or that number for each bucket (a token budget).
            repeats: how often each sample occurs in an epoch; default once. Of samples with 2.5, each epoch
                shows all twice and half of them once more, the other half in the next.
        Raises:
            Refused: there are no samples, or a batch is empty.
        """
        if not len(buckets):
            raise Refused("There is nothing to train on: no sample was left. See the files set aside.")
        kinds = sorted(set(buckets), key=repr)
        number = {kind: i for i, kind in enumerate(kinds)}
        rows: list[list[int]] = [[] for _ in kinds]
        parts: list[dict[float, list[int]]] = [{} for _ in kinds]
        for index, kind in enumerate(buckets):
            times = 1 if repeats is None else repeats[index]
            rows[number[kind]] += [index] * int(times)
            if times % 1:
                parts[number[kind]].setdefault(times % 1, []).append(index)
        kept = [i for i, row in enumerate(rows) if row or parts[i]]
        self.members = [torch.tensor(rows[i], dtype=torch.int64) for i in kept]
        self.partial = [
            [
                PartialEpoch(torch.tensor(some), max(1, round(len(some) * share)))
                for share, some in parts[i].items()
            ]
            for i in kept
        ]
        self.counts = [
            len(rows) + sum(one.each for one in some)
            for rows, some in zip(self.members, self.partial, strict=True)
        ]
        self.kinds = [kinds[i] for i in kept]
        self.batches = [batch(kind) if callable(batch) else batch for kind in self.kinds]
        if min(self.batches) < 1:
            raise Refused(f"A batch of {min(self.batches)} samples is empty; set train.batch to 1 or more.")
        self.seed = seed
        self._permutation = lru_cache(maxsize=2 * len(kinds) + 2)(self._permute)
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    @property
    def largest(self) -> int:
        """Samples in the largest batch."""
        return max(self.batches)

    def _permute(self, bucket: int, epoch: int) -> list[int]:
        rows = self.members[bucket]
        for which, part in enumerate(self.partial[bucket]):
            rows = torch.cat([rows, part.of(epoch, self.seed, f"share {which} of bucket {bucket}")])
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
        return epoch * self.counts[bucket] // self.batches[bucket]

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
        size, count = self.batches[bucket], self.counts[bucket]
        places = range(number * size, (number + 1) * size)
        return [self._permutation(bucket, at // count)[at % count] for at in places], epoch

    def describe(self) -> dict[str, object]:
        """What a run of this order is like: steps of the first epoch, samples by bucket, those left over."""
        return {
            "steps_per_epoch": self.steps_before(1),
            "buckets": {
                str(kind): {"samples": count, "batch": size, "carried_over": count % size}
                for kind, count, size in zip(self.kinds, self.counts, self.batches, strict=True)
            },
        }


class PackedSampler(BatchSampler):
    """Batches of any shapes that hold about as many tokens each; every sample once an epoch, none left over.

    An epoch's permutation, laid out by its tokens, is cut into equal lengths: a sample belongs to the batch
    in which its middle lies.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        batch: int,
        seed: int = 0,
        repeats: Sequence[float] | None = None,
        least: int = 1,
    ):
        """
        Args:
            tokens: of each sample. batch: samples in a batch on average. repeats: as in `BatchSampler`.
            least: samples that a batch has to have, or it could not be shared.
        Raises:
            Refused: a batch might have fewer.
        """
        super().__init__([0] * len(tokens), 1, seed, repeats)
        self.tokens, self.each = list(tokens), max(1, round(self.counts[0] / batch))
        self._cut = lru_cache(maxsize=2)(self._cuts)
        length, most = sum(self.tokens) / len(tokens) * self.counts[0] / self.each, max(tokens)
        self._largest = int(length / min(tokens)) + 2
        if length < (least + 1) * most:
            raise Refused(
                f"A batch of {length:,.0f} tokens may have fewer than {least} samples, as they have up to "
                f"{most:,}. Raise train.batch, or leave data.token_budget out."
            )

    @property
    def largest(self) -> int:
        """Samples in the largest batch there can be."""
        return self._largest

    def steps_before(self, epoch: int) -> int:
        """Steps before an epoch begins."""
        return epoch * self.each

    def _cuts(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch."""
        rows = self._permutation(0, epoch)
        sizes = torch.tensor([self.tokens[row] for row in rows], dtype=torch.int64)
        twice = 2 * sizes.cumsum(0) - sizes  # of where a sample's middle lies
        batches: list[list[int]] = [[] for _ in range(self.each)]
        for row, place in zip(rows, (twice * self.each // (2 * sizes.sum())).tolist(), strict=True):
            batches[place].append(row)
        return batches

    def at(self, step: int) -> tuple[list[int], int]:
        """As `BatchSampler.at`."""
        epoch, number = divmod(step, self.each)
        return self._cut(epoch)[number], epoch

    def describe(self) -> dict[str, object]:
        """Steps of an epoch, samples, and how many a batch has on average."""
        return {"steps_per_epoch": self.each, "samples": self.counts[0], "batch": self.counts[0] / self.each}


@dataclass(frozen=True)
class PartialEpoch:
    """Samples of which an epoch shows `each`, taking turns: permutation after permutation of all of them."""

    indices: Tensor
    each: int

    def of(self, epoch: int, seed: int, purpose: str) -> Tensor:
        """Those that an epoch shows [each]."""
        count = len(self.indices)
        places = range(epoch * self.each, (epoch + 1) * self.each)
        turns = {turn: noise.permutation(count, seed, purpose, turn) for turn in {p // count for p in places}}
        return self.indices[torch.stack([turns[place // count][place % count] for place in places])]


@dataclass(frozen=True)
class CurriculumStage:
    """A stretch of training: its order, until which step (None: to the end), and where its samples begin."""

    order: BatchSampler
    until: int | None
    offset: int


class Curriculum:
    """One order after another, each on its own part of the samples: a curriculum of resolutions."""

    def __init__(self, stages: Sequence[CurriculumStage]) -> None:
        """The last stage has no end, the others end later and later."""
        self.stages = list(stages)

    @property
    def largest(self) -> int:
        """Samples in the largest batch."""
        return max(stage.order.largest for stage in self.stages)

    def at(self, step: int) -> tuple[list[int], int]:
        """As `BatchSampler.at`: each stage counts its own steps and epochs, from 0."""
        begin = 0
        for stage in self.stages:
            if stage.until is None or step < stage.until:
                indices, epoch = stage.order.at(step - begin)
                return [index + stage.offset for index in indices], epoch
            begin = stage.until
        raise ValueError("the last stage of a course has no end")


def rank_slice(indices: Sequence[int], rank: int, world: int) -> list[int]:
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
