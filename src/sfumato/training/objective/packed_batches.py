"""Packed batches: one step holds samples of several shapes, whose tokens the network reads as one sequence.

Every draw and every loss is that of the sample alone, so packing changes which samples meet in a step and
nothing else. Losses come shape by shape.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.profiler import record_function

from sfumato.errors import Refused
from sfumato.theory.definition import upload
from sfumato.training.objective.diffusion import DiffusionObjective, Losses, PreparedBatch
from sfumato.training.objective.prefetch import Reader


class PackedLatents(NamedTuple):
    """One part of a batch, ready to be computed, shape by shape; the batch's size."""

    groups: list[PreparedBatch]
    of: int

    @property
    def ids(self) -> list[int]:
        """Of all its samples, in the order of their losses."""
        return [one for group in self.groups for one in group.batch.ids]


def indices_by_shape(indices: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """The places of indices whose samples have one shape, smaller shapes first."""
    found: dict[tuple[int, ...], list[int]] = {}
    for place, index in enumerate(indices):
        found.setdefault(tuple(shapes[index]), []).append(place)
    return [found[shape] for shape in sorted(found)]


class PackedObjective(DiffusionObjective):
    """The same error, of batches whose samples have several shapes; `encoded.buckets` says which.

    Raises:
        Refused: the network answers samples of one shape at a time.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        if not self.model.denoiser.supports_packing:
            raise Refused(why_not_packable(type(self.model.denoiser).__name__))
        self._packs: Reader[PackedLatents] = Reader(self.pack)

    def pack(self, step: int, part: int, parts: int) -> PackedLatents:
        """Read and draw one part of a batch."""
        (mine, epoch, count), groups = self.taken(step, part, parts), []
        drawn = self.draw_times([self.encoded.ids[index] for index in mine], step, part, parts)
        for places in indices_by_shape(mine, cast(Any, self.encoded).buckets):
            batch = self.encoded.read([mine[place] for place in places], self.seed, epoch)
            x_0 = upload(batch.latents, self.model.device).float()
            own = self.draw_noise(drawn.rows(places), batch.ids, x_0, step)
            groups.append(PreparedBatch(batch, x_0, own, count))
        return PackedLatents(groups, count)

    def losses(self, step: int, part: int, parts: int) -> Losses:
        """The losses [b] of one part of the batch of `step`, shape by shape."""
        with record_function("data"):
            ready = self._packs(step, part, parts)
        inputs = [self.model_inputs(one.x_0, one.drawn, self.rows(one.batch)) for one in ready.groups]
        latents, conditions = [x for x, _ in inputs], [condition for _, condition in inputs]
        answers = self.model.predict_packed(latents, [one.drawn.t for one in ready.groups], conditions)
        found = [
            self.weighed(self.weighted_loss(answer, one.x_0, one.drawn, condition), one.drawn)
            for answer, one, condition in zip(answers, ready.groups, conditions, strict=True)
        ]
        return Losses(torch.cat(found), ready.ids, ready.of)

    def describe_part(self, step: int, part: int, parts: int) -> dict[str, Any]:
        """What one part of a step was made of, for the black box."""
        groups = self.pack(step, part, parts).groups
        found: dict[str, list[Any]] = {}
        for one in groups:
            for name, some in self.describe(one).items():
                found.setdefault(name, []).extend(some)
        return found


def why_not_packable(name: str) -> str:
    """The sentence about a network that cannot read several shapes as one sequence."""
    return (
        "train.sequence_packing joins samples of several shapes in one sequence, which our own DiT reads; "
        f"{name} "
        "answers samples of one shape at a time. Leave train.sequence_packing out; data.token_budget = true "
        "makes the batches of all buckets cost alike."
    )
