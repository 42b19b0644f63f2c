"""What is minimised: a loss for every sample, as a pure function of the weights, the seed and the step.

    x_t = C_t · (x_0, x_T),   loss = w(t) · mean (out − C^ε_t · (x_0, x_T))²

A step's batch is computed in parts (accumulation, processes); a sample's time, noise and dropped
caption depend on the sample, not on the part it is in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from sfumato.errors import Refused
from sfumato.models.condition import Condition
from sfumato.models.interface import Model
from sfumato.theory import densities, noise
from sfumato.theory.definition import upload
from sfumato.training.objective.frame_timesteps import FrameTimes, by_frame, mean_of_unknown
from sfumato.training.objective.prefetch import Reader
from sfumato.training.objective.timestep_importance import TimestepImportance
from sfumato.training.objective.user_loss import UserLoss
from sfumato.training.settings import TrainSettings


class Losses(NamedTuple):
    """The losses [b] of one part of a batch, with their gradient, whose they are, and the batch's size."""

    per_sample: Tensor
    ids: Sequence[int]
    of: int


class Objective(Protocol):
    """What `fit` minimises."""

    def losses(self, step: int, part: int, parts: int) -> Losses:
        """The losses of part `part` of the `parts` into which the batch of `step` (0, 1, …) is divided."""
        ...

    def name_of(self, sample: int) -> str:
        """What the user calls the sample of this id."""
        ...


class EncodedBatch(Protocol):
    """Samples as they are stored: latents [B, C, …], one mapping of condition rows each."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def latents(self) -> Tensor: ...

    @property
    def conditions(self) -> Sequence[Mapping[str, Tensor]]: ...


class Encoded(Protocol):
    """Encoded samples: what `sfumato.data` keeps in the store, or anything like it."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def null(self) -> Mapping[str, Tensor]: ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], seed: int, epoch: int) -> EncodedBatch:
        """The samples at these indices."""
        ...


class Order(Protocol):
    """Which samples a step takes: a pure function of the step."""

    def at(self, step: int) -> tuple[Sequence[int], int]:
        """(indices, epoch) of `step` (0, 1, …)."""
        ...


ReadText = Callable[[Sequence[str]], list[dict[str, Tensor]]]
"""Captions → what they mean, one mapping of rows each; "" is the caption that says nothing."""


def part_slice(count: int, part: int, parts: int) -> slice:
    """The positions of part `part` when `count` samples are divided into `parts` as evenly as can be."""
    return slice(count * part // parts, count * (part + 1) // parts)


# ----------------------------------------------------------------------------- diffusion


@dataclass
class NoiseDraw:
    """What is drawn for a part of a batch.

    t [b] in the theory's time, or of each frame [b, F], float64 and on the host, where all that follows from
    it alone is computed; x_T like x_0, dropped [b] bool: captions left out;
    without: the same for each companion by name; known [b, F] bool: frames that are given. Of adaptive times,
    the quantiles [b] that were drawn and what their losses weigh [b].
    """

    t: Tensor
    x_T: Tensor
    dropped: Tensor
    without: Mapping[str, Tensor] = field(default_factory=dict)
    known: Tensor | None = None
    quantiles: Tensor | None = None
    importance: Tensor | None = None

    def of(self, form: Callable[..., Tensor], x_0: Tensor) -> Tensor:
        """A theory's `mix` or `target` of (x_0, x_T, t); frame by frame where frames have their own times."""
        return by_frame(form, x_0, self.x_T, self.t) if self.t.ndim > 1 else form(x_0, self.x_T, self.t)

    def rows(self, at: slice | list[int]) -> "NoiseDraw":
        """The same of some of the samples."""
        without = {name: dropped[at] for name, dropped in self.without.items()}
        known, quantiles, importance = (
            None if one is None else one[at] for one in (self.known, self.quantiles, self.importance)
        )
        return NoiseDraw(self.t[at], self.x_T[at], self.dropped[at], without, known, quantiles, importance)


class PreparedBatch(NamedTuple):
    """One part of a batch, ready to be computed: as stored, x_0 on the device, draws, the batch's size."""

    batch: EncodedBatch
    x_0: Tensor
    drawn: NoiseDraw
    of: int


class DiffusionObjective:
    """The error of a model's answer at random times, on encoded samples.

    Args:
        model: its theory says what is mixed and regressed, its `predict` answers.
        encoded: the samples; order: which of them a step takes.
        settings: `timestep_sampling`, `stratified_timesteps`, `weighting`.
        seed: every draw follows from it.
        caption_dropout: share of samples whose caption's tensors are replaced by `encoded.null`.
        condition_dropout: share of samples shown without a companion ("control", …): its tensors are then 0.
        loss: one's own in place of (answer − target)².
        read_text: reads the captions of each step, where the text encoders are trained too.
    Raises:
        Refused: unknown density or weighting.
    """

    read_text: ReadText | None = None

    def __init__(
        self,
        model: Model,
        encoded: Encoded,
        order: Order,
        settings: TrainSettings,
        seed: int,
        caption_dropout: float = 0.1,
        loss: UserLoss | None = None,
        condition_dropout: Mapping[str, float] | None = None,
        read_text: ReadText | None = None,
    ) -> None:
        self.model = model
        self.encoded = encoded
        self.order = order
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.condition_dropout = dict(condition_dropout or {})
        self.read_text = read_text
        self.stratified = settings.stratified_timesteps
        self.guidance_told = settings.guidance_told
        self.frame_times = FrameTimes.of(settings)
        self.density = densities.density(settings.timestep_sampling)
        self.timestep_importance = TimestepImportance() if settings.timestep_importance_sampling else None
        self.weighting = densities.weighting("unit" if settings.weighting == "none" else settings.weighting)
        self.loss = loss
        self._names: dict[int, str] = {}
        self._reader: Reader[PreparedBatch] = Reader(self.prepare)

    def prepare(self, step: int, part: int, parts: int) -> PreparedBatch:
        """Read and draw one part of a batch; a thread does it while the part before is computed."""
        mine, epoch, count = self.taken(step, part, parts)
        batch = self.encoded.read(mine, self.seed, epoch)
        x_0 = upload(batch.latents, self.model.device).float()
        return PreparedBatch(batch, x_0, self.draw(batch.ids, x_0, step, part, parts), count)

    def taken(self, step: int, part: int, parts: int) -> tuple[Sequence[int], int, int]:
        """The samples that one part of a batch takes, their epoch, and the whole batch's size."""
        indices, epoch = self.order.at(step)
        prefetch = getattr(self.encoded, "prefetch", None)
        if prefetch is not None:  # a set that encodes ahead
            prefetch(step)
        return indices[part_slice(len(indices), part, parts)], epoch, len(indices)

    def name_of(self, sample: int) -> str:
        """The file or row the sample came from."""
        if not self._names:
            self._names = dict(zip(self.encoded.ids, self.encoded.names, strict=True))
        return self._names.get(sample, f"sample {sample}")

    def losses(self, step: int, part: int, parts: int) -> Losses:
        """The losses [b] of one part of the batch of `step`."""
        with record_function("data"):
            ready = self._reader(step, part, parts)
        found = self.measure(ready.x_0, ready.drawn, self.rows(ready.batch))
        return Losses(self.weighed(found, ready.drawn), ready.batch.ids, ready.of)

    def weighed(self, losses: Tensor, drawn: NoiseDraw) -> Tensor:
        """The losses [b], weighed where times are drawn more often than others, which hears of them."""
        if self.timestep_importance is None or drawn.quantiles is None or drawn.importance is None:
            return losses
        self.timestep_importance.record(drawn.quantiles, losses.detach())
        return losses * upload(drawn.importance.to(losses.dtype), losses.device)

    def rows(self, batch: EncodedBatch) -> Sequence[Mapping[str, Tensor]]:
        """What guides each sample; where the network hears it, also how its picture was cut."""
        conditions = batch.conditions
        if self.read_text is not None:
            read = self.read_text(batch.captions)  # pyright: ignore[reportAttributeAccessIssue]
            conditions = [{**row, **words} for row, words in zip(conditions, read, strict=True)]
        micro_conditioning = self.model.denoiser.micro_conditioning
        if not micro_conditioning:
            return conditions
        cuts = batch.time_ids.unbind()  # pyright: ignore[reportAttributeAccessIssue]
        return [{**row, micro_conditioning: cut} for row, cut in zip(conditions, cuts, strict=True)]

    def draw(self, ids: Sequence[int], x_0: Tensor, step: int, part: int = 0, parts: int = 1) -> NoiseDraw:
        """Times, noise and dropped captions of these samples in this step."""
        return self.draw_noise(self.draw_times(ids, step, part, parts), ids, x_0, step)

    def draw_times(self, ids: Sequence[int], step: int, part: int = 0, parts: int = 1) -> NoiseDraw:
        """All that is drawn for these samples but the noise, whatever their shapes."""
        u = noise.uniform(self.seed, ids, step=step, purpose="time")
        if self.stratified:
            u = self._spread(u, step, part, parts)
        importance = None
        if self.timestep_importance is not None:
            u, importance = self.timestep_importance(u, step)
        dropped = noise.uniform(self.seed, ids, step=step, purpose="caption") < self.caption_dropout
        without = {
            name: noise.uniform(self.seed, ids, step=step, purpose=f"without {name}") < share
            for name, share in self.condition_dropout.items()
        }
        quantiles = None if importance is None else u
        t = self.density(self.model.theory, u)
        return NoiseDraw(t, torch.empty(len(ids), 0), dropped, without, None, quantiles, importance)

    def draw_noise(self, drawn: NoiseDraw, ids: Sequence[int], x_0: Tensor, step: int) -> NoiseDraw:
        """With the noise of samples x_0 [b, C, …], and of clips the times of their frames."""
        t, known, shape = drawn.t, None, tuple(x_0.shape[1:])
        x_T = noise.normal(shape, self.seed, ids, step=step, purpose="noise")  # the same on every machine
        if x_0.ndim == 5 and not self.frame_times.is_plain:
            frames = x_0.shape[2]
            t, known = self.frame_times(self.model.theory, self.density, t, frames, self.seed, ids, step)
            known = upload(known, x_0.device)
        return replace(drawn, t=t, x_T=upload(x_T, x_0.device), known=known)

    def _spread(self, u: Tensor, step: int, part: int, parts: int) -> Tensor:
        """Put each of the u [b] into its own of the batch's equal strata, which a permutation deals out."""
        count = len(self.order.at(step)[0])
        strata = noise.permutation(count, self.seed, "strata", step)[part_slice(count, part, parts)]
        return (strata.to(u) + u) / count

    def measure(self, x_0: Tensor, drawn: NoiseDraw, rows: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """The weighted losses [b] of the model's answers."""
        x_t, condition = self.model_inputs(x_0, drawn, rows)
        return self.weighted_loss(self.model.predict(x_t, drawn.t, condition), x_0, drawn, condition)

    def model_inputs(
        self, x_0: Tensor, drawn: NoiseDraw, rows: Sequence[Mapping[str, Tensor]]
    ) -> tuple[Tensor, Condition]:
        """What the model is shown, and told beside the time; known frames are shown as they are."""
        condition = Condition.stack(self.apply_dropout(rows, drawn))
        if self.guidance_told:
            condition = self.model.denoiser.guidance.embed_guidance(condition, self.guidance_told)
        condition = condition.to(x_0.device, x_0.dtype)
        x_t = drawn.of(self.model.theory.mix, x_0)
        if drawn.known is not None:
            x_t = torch.where(drawn.known[:, None, :, None, None], x_0, x_t)
        return x_t, condition

    def weighted_loss(self, answer: Tensor, x_0: Tensor, drawn: NoiseDraw, condition: Condition) -> Tensor:
        """The weighted losses [b] of an answer; known frames are not asked for."""
        theory, t = self.model.theory, drawn.t
        error = self.error(answer.float(), x_0, drawn, condition)
        if error.ndim == 1:
            return error * upload(self.weighting(theory, t).to(error.dtype), error.device)
        if drawn.known is not None:
            weight = self.weighting(theory, t.flatten()).unflatten(0, t.shape).to(error.dtype)
            return mean_of_unknown(error, upload(weight, error.device), drawn.known)
        error = self.model.denoiser.mask_error(error, condition)
        return error.flatten(1).mean(1) * upload(self.weighting(theory, t).to(error.dtype), error.device)

    def error(self, answer: Tensor, x_0: Tensor, drawn: NoiseDraw, condition: Condition) -> Tensor:
        """(answer − target)² elementwise, or what one's own loss makes of both: shaped so, or [b].

        Raises:
            Refused: one loss a sample, where parts of a sample are not asked for.
        """
        target = drawn.of(self.model.theory.target, x_0)
        if self.loss is None:
            return squared(answer, target)
        known: dict[str, Any] = {"t": upload(drawn.t, x_0.device), "x_0": x_0, "condition": condition}
        if "x_t" in self.loss.arguments:
            known["x_t"] = drawn.of(self.model.theory.mix, x_0)
        error = self.loss(answer, target, known | {"theory": self.model.theory})
        if error.ndim == 1 and (drawn.known is not None or self.masks(answer, condition)):
            raise Refused(
                f"train.loss: {self.loss.word} gives one loss a sample, but frames that are given here are "
                "not asked for and have to be left out. Let it give errors shaped like the answer."
            )
        return error

    def masks(self, answer: Tensor, condition: Condition) -> bool:
        """Whether the denoiser leaves out parts of an error of this shape."""
        return self.model.denoiser.mask_error(answer, condition).shape != answer.shape

    def apply_dropout(
        self, rows: Sequence[Mapping[str, Tensor]], drawn: NoiseDraw
    ) -> list[dict[str, Tensor]]:
        """The condition rows with what was dropped replaced: captions by null, companions by zeros."""
        null = dict(self.encoded.null)
        if self.read_text is not None and bool(drawn.dropped.any()):
            null = self.read_text([""])[0]
        result = [
            {**row, **null} if gone else dict(row)
            for row, gone in zip(rows, drawn.dropped.tolist(), strict=True)
        ]
        for name, gone in drawn.without.items():
            for row, is_gone in zip(result, gone.tolist(), strict=True):
                mine = [one for one in row if is_gone and (one == name or one.startswith(f"{name}."))]
                row |= {one: torch.zeros_like(row[one]) for one in mine}
        return result

    def describe_part(self, step: int, part: int, parts: int) -> dict[str, Any]:
        """What one part of a step was made of, for the black box: names, captions and times."""
        return self.describe(self.prepare(step, part, parts))

    def describe(self, prepared: PreparedBatch) -> dict[str, Any]:
        """Names, captions and times of what was prepared."""
        batch, x_0, drawn, _ = prepared
        return {
            "samples": [self.name_of(sample) for sample in batch.ids],
            "ids": list(batch.ids),
            "times": drawn.t.tolist(),
            "captions_dropped": drawn.dropped.tolist(),
            "latents_finite": x_0.flatten(1).isfinite().all(1).tolist(),
        }


def squared(answer: Tensor, target: Tensor) -> Tensor:
    """(answer − target)², elementwise."""
    return (answer - target) ** 2
