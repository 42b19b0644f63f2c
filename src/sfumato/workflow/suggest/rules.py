"""The rules by which a recipe's values follow from data, base and machine.

From scratch they are those of the recipes in examples/ and of the demo, which were found by measuring; on a
base those that are usual for fine-tuning.
"""

from dataclasses import dataclass
from typing import Any

from sfumato.errors import Refused
from sfumato.models.lora import adapter
from sfumato.workflow.suggest.inspect_base import BaseFacts
from sfumato.workflow.suggest.inspect_data import DataFacts
from sfumato.workflow.suggest.measure_steps import StepSeconds

AIMS = ("speed", "quality", "tiny")
Values = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """Where training runs: the kind of its device (cpu, cuda, …) and the bytes that are free there."""

    device: str = "cpu"
    memory: int = 8 << 30


@dataclass(frozen=True)
class Size:
    """Of a model from scratch, for what a person waits for.

    learning_rate: for Adam falling linearly to 0, batch 16; side, clip_side: pixels; codec_steps: at most;
    minutes: what is waited for, unless it is said.
    """

    width: int
    depth: int
    heads: int
    learning_rate: float
    side: int
    clip_side: int
    codec_steps: int
    minutes: float


SIZES = {
    "tiny": Size(128, 5, 2, 2.5e-3, 32, 32, 400, 5),
    "speed": Size(192, 6, 3, 1.5e-3, 64, 48, 600, 20),
    "quality": Size(256, 8, 4, 1e-3, 128, 64, 1500, 60),
}
ON_GPU = {
    "tiny": SIZES["speed"],
    "speed": Size(256, 8, 4, 1e-3, 128, 64, 1500, 15),
    "quality": Size(384, 12, 6, 7e-4, 256, 96, 3000, 60),
}
PATCH = 2
FEWEST_STEPS = 300
SEEN, SEEN_EACH = 16_000, 150
"""More samples in all, or showings of each, are not asked for: more is only learned by heart."""
REST_SECONDS = 20.0
"""What a run takes beside its steps: loading, encoding captions, the last pictures."""
BESIDE = 0.4
"""Share of the bare steps' time that reading, averaging, previews, measurements and checkpoints take."""


def size_of(machine: Machine, aim: str) -> Size:
    """The size of a model from scratch."""
    return (SIZES if machine.device == "cpu" else ON_GPU)[aim]


def scratch_values(data: DataFacts, machine: Machine, aim: str) -> Values:
    """Everything but what depends on how long a step takes."""
    size = size_of(machine, aim)
    most = size.clip_side if data.clips else size.side
    stride = 4 if data.clips or most < 64 or 0 < data.side <= 48 else 8
    batch = min(16 if machine.device == "cpu" else 32, data.samples)
    values: Values = {
        "model.width": size.width,
        "model.depth": size.depth,
        "model.heads": size.heads,
        "model.patch": PATCH,
        "model.codec_stride": stride,
        "model.latent_channels": 24 if data.clips or stride == 8 else 16,
        "model.codec_batch": 8 if data.clips else 16,
        "data.resolution": side_of(data.side, most, stride * PATCH),
        "train.batch": batch,
        "train.learning_rate": size.learning_rate,
        "train.lr_schedule": "linear",
        "sample.steps": 16,
        "sample.guidance": 1.0 if data.captions == "none" else 2.5 if data.clips else 2.0,
    }
    if data.captions == "none":
        values["model.text_encoder"] = "none"
    elif data.classes:
        values["model.text_encoder"] = "labels"
    if data.oblong >= 0.1 and not data.clips:
        values["data.buckets"] = 5 if data.samples >= 100 else 2
    if data.clips:
        values |= clip_values(data)
    if data.samples < 40 and not data.has_split:
        values["data.held_out"] = 0.0
    return values


def side_of(of_data: int, most: int, unit: int) -> int:
    """Pixels a side: the data's own, up to a multiple of `unit`, where they are smaller than `most`."""
    own = -(-of_data // unit) * unit if of_data else most
    return max(min(own, most // unit * unit), 2 * unit)


def clip_values(data: DataFacts) -> Values:
    """Frames and rate of clips from scratch: as many as fit into the short ones, at most 13."""
    fps = min(8, max(1, round(data.fps))) if data.fps else 8
    length = int(data.seconds * fps + 0.5) if data.seconds else 9
    frames, stride = next(((one, by) for one, by in ((13, 4), (9, 2), (5, 2)) if one <= length), (3, 2))
    return {
        "model.codec_time_stride": stride,
        "data.frames": frames,
        "data.fps": fps,
        "data.short_clip_frames": [1],
    }


def steps_for(data: DataFacts, values: Values, size: Size, seconds: StepSeconds, minutes: float) -> Values:
    """The steps that the minutes hold, and all that follows from how many they are."""
    whole = 60 * minutes
    share = 0.2 if data.clips else 0.13
    codec = within(150, share * whole / seconds.codec, size.codec_steps)
    encoding = data.samples * seconds.codec / values["model.codec_batch"] / 2
    left = (whole - codec * seconds.codec - encoding - REST_SECONDS) / (1 + BESIDE)
    batch = values["train.batch"]
    most = max(FEWEST_STEPS, max(SEEN, SEEN_EACH * data.samples) // batch)
    steps = rounded(within(FEWEST_STEPS, left / seconds.denoiser, most))
    return {
        "model.codec_steps": rounded(codec),
        **of_steps(steps),
        "sample.every": rounded(within(steps / 20, 60 / seconds.denoiser, steps / 4)),
    }


def of_steps(steps: int) -> Values:
    """What follows from a number of steps: warm-up, average, and how often is saved and measured."""
    return {
        "train.steps": steps,
        "train.warmup_steps": within(10, steps / 25, 100),
        "train.ema": 0.99 if steps < 600 else 0.995 if steps < 6000 else 0.999,
        "train.save_every": rounded(max(1, steps / 8)),
        "train.validate_every": rounded(max(1, steps / 5)),
        "sample.every": rounded(max(1, steps / 10)),
    }


# ----------------------------------------------------------------
# On a base.

RATES = {"full": 1e-5, "controlnet": 1e-5, "edit": 1e-5}
"""Learning rates of pretrained networks by model.train; others 1e-4."""
OWN_RATES = {"full": 0.3}
"""Of networks of our own: shares of the rate that they were trained with; others the same again."""
RANKS = {"tiny": 4, "speed": 16, "quality": 32}
FACTORS = {"tiny": 0.5, "speed": 1.0, "quality": 2.0}
STORED = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.05, "nf4": 0.55}
"""Bytes of a number of a frozen base."""


def base_values(data: DataFacts, base: BaseFacts, machine: Machine, train: str, aim: str) -> Values:
    """All values of a recipe on a base, but for what minutes change.

    Raises:
        Refused: something is missing that this kind of training needs.
    """
    own = base.kind == "run"
    began = base.recipe
    values: Values = {"model.train": train}
    if train in adapter.KINDS:
        values["model.rank"] = RANKS[aim]
        values |= storage(base, machine)
    if base.parameters > 2e9:
        values["train.gradient_checkpointing"] = 1
    values["data.resolution"] = base.resolution
    if data.oblong >= 0.1 and not own and not base.frames:
        values["data.buckets"] = 5 if data.samples >= 100 else 2
    if own and began is not None and began.data.buckets > 1:
        values["data.buckets"] = began.data.buckets
    values |= base_frames(data, base) | companion_values(data, train)
    largest = 16 if own else 1 if machine.device == "cpu" and base.parameters > 5e8 else 4
    batch = began.train.batch if own and began is not None else largest
    rate = RATES.get(train, 1e-4)
    if own:
        first = began.train.learning_rate if began is not None else 1e-3
        rate = float(f"{first * OWN_RATES.get(train, 1.0):.2g}")
    each = 50 if train in ("controlnet", "ip-adapter", "edit") else 100
    fewest, most = (300, 3000) if own or train in adapter.KINDS else (500, 10_000)
    if data.samples < 40 and not data.has_split:
        values["data.held_out"] = 0.0
    steps = rounded(FACTORS[aim] * within(fewest, each * data.samples / min(4, data.samples), most))
    return values | {
        "train.batch": min(batch, data.samples),
        "train.learning_rate": rate,
        "train.lr_schedule": "linear" if own else "constant",
        **of_steps(steps),
    }


def storage(base: BaseFacts, machine: Machine) -> Values:
    """How a frozen base is stored, so that it takes at most half of the memory."""
    fits = [name for name, size in STORED.items() if base.parameters * size <= machine.memory / 2]
    stored = fits[0] if fits else "nf4"
    return {} if stored == "float32" else {"model.base_quantization": stored}


def base_frames(data: DataFacts, base: BaseFacts) -> Values:
    """Frames and rate: the base's own, fewer where the data's clips are shorter."""
    if not base.frames or (base.kind != "run" and not data.clips):
        return {}
    frames = base.frames
    if base.kind != "run" and data.seconds:
        fit = [one for one in (25, 17, 9) if one <= data.seconds * base.fps + 0.5]
        frames = fit[0] if fit else 9
    found: Values = {"data.frames": frames, "data.fps": base.fps}
    if not data.clips or data.stills or base.kind == "run":
        found["data.short_clip_frames"] = [1]
    return found


def companion_values(data: DataFacts, train: str) -> Values:
    """Where the pictures that guide come from.

    Raises:
        Refused: an edit without pictures to begin with.
    """
    if train == "controlnet" and "control" not in data.companions:
        return {"data.control_image": data.companions[0] if data.companions else "canny"}
    if train == "edit" and "edit_source" not in data.companions:
        if not data.companions:
            raise Refused(
                "An edit is learned from pairs, and no picture of the data has one beside it. Put the "
                "picture to begin with beside each as NAME.edit_source.png, or name it in a column "
                "edit_source."
            )
        return {"data.source_image": data.companions[0]}
    return {}


def within(fewest: float, wanted: float, most: float) -> int:
    """`wanted`, but neither fewer nor more."""
    return int(max(fewest, min(wanted, most)))


def rounded(number: float) -> int:
    """To two digits, as a person would write it."""
    return max(1, int(float(f"{number:.2g}")))
