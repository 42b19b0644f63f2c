"""The loss that tells: the same samples, the same noise, every time, noise level by noise level.

Paired noise makes two measurements differ by the weights alone; the gap between held-out samples and
trained ones is what the model learned by heart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from sfumato.models.at_once import AtOnce
from sfumato.run_folder import RunFolder
from sfumato.theory import noise
from sfumato.theory.definition import upload
from sfumato.training.distributed.processes import current_processes
from sfumato.training.objective.diffusion import DiffusionObjective, Encoded, NoiseDraw
from sfumato.training.precision import autocast, effective_precision

MEASURE_SEED = 7_177


@dataclass(frozen=True)
class NoiseLevelLoss:
    """The loss at one noise level: φ·2/π in [0, 1], 0 at the data and 1 at pure noise."""

    level: float
    loss: float
    error: float


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss over samples and levels, its standard error over samples, and both level by level."""

    loss: float
    error: float
    by_level: list[NoiseLevelLoss]


class ValidationLoss:
    """Measures a model on held-out samples and on as many trained ones; `measure` for `fit`.

    Args:
        objective: what is trained; its model, weighting and error are used.
        held_out: encoded held-out samples; train: the encoded training samples.
        run: where the events go.
        samples: how many of each are measured; levels: at how many quantiles of the training density.
        batch: samples at once; processes share the batches.
    """

    def __init__(
        self,
        objective: DiffusionObjective,
        held_out: Encoded,
        train: Encoded,
        run: RunFolder,
        *,
        samples: int = 64,
        levels: int = 8,
        batch: int = 16,
        precision: str = "auto",
    ) -> None:
        self.objective, self.run, self.levels, self.batch = objective, run, levels, batch
        self.sets = {"held_out": held_out, "train": train}
        self.indices = {split: sample_indices(len(encoded), samples) for split, encoded in self.sets.items()}
        self.precision = precision
        self.at_once = AtOnce(
            "samples to measure", "Set train.validate_every = 0, or use a larger GPU.", self._note
        )

    def _note(self, sentence: str) -> None:
        self.run.event("note", text=sentence)

    def __call__(self, step: int, weights: str) -> HeldOutLoss | None:
        """Record the loss of the weights the network has now, as `weights` ("ema" or "raw").

        Returns:
            the held-out loss; None if no sample is held out.
        """
        found = {
            split: self.measure(encoded, self.indices[split])
            for split, encoded in self.sets.items()
            if self.indices[split]
        }
        for split, one in found.items():
            by_level = [vars(level) for level in one.by_level]
            fields = {"step": step, "split": split, "weights": weights, "by_level": by_level}
            self.run.event("validation", loss=one.loss, error=one.error, **fields)
        if len(found) == 2:
            gap, error = generalization_gap(found["held_out"], found["train"])
            self.run.event("generalization_gap", step=step, weights=weights, gap=gap, error=error)
        return found.get("held_out")

    @torch.no_grad()
    def measure(self, encoded: Encoded, indices: Sequence[int]) -> HeldOutLoss:
        """The loss on these samples, each at every level with noise of its own."""
        processes = current_processes()
        parts = self._parts(encoded, indices)
        losses = torch.zeros(len(indices), self.levels, dtype=torch.float64)
        starts = [0, *accumulate(len(part) for part in parts)]
        for first in range(0, len(parts), processes.groups):
            # Every process computes as often as every other, or sharded weights could not be gathered.
            number = min(first + processes.group, len(parts) - 1)
            for level in range(self.levels):
                found = self._losses_as_memory_allows(encoded, parts[number], level)
                if first + processes.group < len(parts):
                    losses[starts[number] : starts[number + 1], level] = found.double().cpu()
        losses = processes.add(losses)
        angles = [
            float(self.objective.model.theory.angle(self._time(level))) * 2 / math.pi
            for level in range(self.levels)
        ]
        many = len(losses) > 1
        error = losses.mean(1).std(correction=1) / math.sqrt(len(losses)) if many else torch.tensor(0.0)
        spread = losses.std(0, correction=1) / math.sqrt(len(losses)) if many else losses[0] * 0
        by_level = [
            NoiseLevelLoss(angle, float(loss), float(bar))
            for angle, loss, bar in zip(angles, losses.mean(0), spread, strict=True)
        ]
        return HeldOutLoss(float(losses.mean()), float(error), by_level)

    def _time(self, level: int) -> Tensor:
        """The time [1] in the middle of the level-th equal share of the training density."""
        u = torch.tensor([(level + 0.5) / self.levels], dtype=torch.float64)
        return self.objective.density(self.objective.model.theory, u)

    def _parts(self, encoded: Encoded, indices: Sequence[int]) -> list[list[int]]:
        """Batches of samples of one latent shape."""
        shapes = getattr(encoded, "buckets", None)
        ordered = sorted(indices, key=lambda i: str(shapes[i])) if shapes is not None else list(indices)
        parts: list[list[int]] = []
        for index in ordered:
            alike = parts and (shapes is None or shapes[parts[-1][-1]] == shapes[index])
            if alike and len(parts[-1]) < self.batch:
                parts[-1].append(index)
            else:
                parts.append([index])
        return parts

    def _losses_as_memory_allows(self, encoded: Encoded, part: list[int], level: int) -> Tensor:
        """The losses of a batch; where memory is out in smaller ones, unless processes compute together."""
        t = self._time(level)
        if current_processes().count > 1:
            return self._losses(encoded, part, t, level)
        found = self.at_once(lambda some: self._losses(encoded, part[some], t, level), len(part))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _losses(self, encoded: Encoded, indices: list[int], t: Tensor, level: int) -> Tensor:
        objective = self.objective
        place = objective.model.device
        batch = encoded.read(indices, MEASURE_SEED, 0)
        x_0 = upload(batch.latents, place).float()
        shape = tuple(x_0.shape[1:])
        x_T = noise.normal(shape, MEASURE_SEED, batch.ids, step=level, purpose="held-out")
        kept = torch.zeros(len(batch.ids), dtype=torch.bool)
        drawn = NoiseDraw(t.expand(len(batch.ids)), upload(x_T, place), kept)
        with autocast(effective_precision(self.precision, place), place):
            return objective.measure(x_0, drawn, objective.rows(batch))


def generalization_gap(held_out: HeldOutLoss, train: HeldOutLoss) -> tuple[float, float]:
    """(held-out loss minus that of trained samples, its standard error): what was learned by heart."""
    return held_out.loss - train.loss, math.hypot(held_out.error, train.error)


def sample_indices(count: int, samples: int) -> list[int]:
    """Which of `count` samples are measured: a fixed random choice of `samples`, in rising order."""
    return sorted(noise.permutation(count, MEASURE_SEED, "held-out", 0)[:samples].tolist()) if count else []
