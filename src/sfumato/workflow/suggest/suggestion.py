"""A recipe is suggested: its values by the rules, its steps by a measurement, written as commented TOML."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato import paths
from sfumato.data.settings import EMBEDDED
from sfumato.errors import Refused, nearest
from sfumato.recipe import RULES, Recipe
from sfumato.settings import toml
from sfumato.training import device as devices
from sfumato.workflow.planning.plan import plan
from sfumato.workflow.suggest import rules
from sfumato.workflow.suggest.inspect_base import inspect_base
from sfumato.workflow.suggest.inspect_data import DataFacts, inspect_data
from sfumato.workflow.suggest.measure_steps import StepSeconds, measure_steps
from sfumato.workflow.suggest.rules import Machine, Values

COMMENTS = {
    "model.base": "or the folder, .safetensors file or run of a model to go on from",
    "model.rank": "larger learns more, and more by heart",
    "model.width": "of the network; larger learns more, and is slower",
    "model.text_encoder": "minilm (captions), labels (classes) or none",
    "model.codec_steps": "the small VAE is trained first",
    "model.base_quantization": "so that the base fits into this machine's memory",
    "data.captions": "files (metadata or .txt beside), folder (class names) or none",
    "data.resolution": "pictures have about resolution x resolution pixels",
    "data.buckets": "shapes that pictures are sorted into; 1 crops all square",
    "data.held_out": "few pictures: all are learned from",
    "data.frames": "of a clip; one and a multiple of what shares a latent",
    "data.fps": "frames a second, whatever rate a file has",
    "data.short_clip_frames": "lengths for clips too short for that; 1 makes them stills",
    "data.control_image": "edges of the pictures themselves; or a column of pictures beside",
    "train.steps": "see above",
    "train.learning_rate": "found good for this network and batch",
    "train.gradient_checkpointing": "less memory, a third slower",
    "sample.every": "steps between pictures",
    "sample.prompts": "what is drawn; empty: captions of the data, trained and held out",
}
SECTIONS = ("model", "data", "train", "sample")


@dataclass(frozen=True)
class Suggestion:
    """A recipe for these data, on this base and machine.

    values: what is said, by dotted key; notes: sentences about what was seen and what follows from it; text:
    all of it as TOML.
    """

    values: Mapping[str, Any]
    notes: tuple[str, ...]
    text: str


def suggest_recipe(
    file: Path | str,
    data: str,
    base: str = "scratch",
    train: str = "full",
    minutes: float = 0.0,
    aim: str = "speed",
    measure: Callable[[Recipe], StepSeconds] | None = None,
    machine: Machine | None = None,
) -> Suggestion:
    """Look at data, base and machine, and choose.

    Args:
        file: where the recipe will be; paths in it are relative to that. Nothing is written.
        data: as data.train; base: as model.base; train: as model.train.
        minutes: that training may take; 0 from scratch: what a person waits for; on a base: as many steps as
            the data are good for.
        aim: speed, quality (a larger network, longer) or tiny.
        measure: tells the seconds of steps from scratch, by default by taking some; machine: instead of
            this one.
    Raises:
        Refused: data or a base that is none, a kind of training that cannot be.
    """
    file = Path(file)
    _check(base, train, aim, minutes)
    seen, there = inspect_base(base), inspect_data(data)
    where = devices.resolve("auto")
    machine = machine or Machine(where.type, devices.free_bytes(where))
    first: Values = {"output": f"runs/{file.stem}", "seed": 0, "model.base": _place(base, file)}
    named: Values = {"data.train": _place(data, file), "data.captions": there.captions}
    notes = [f"{data}: {there}."]
    if base == "scratch":
        values = first | named | rules.scratch_values(there, machine, aim)
        size = rules.size_of(machine, aim)
        seconds = (measure or measure_steps)(_recipe(values, data, base))
        minutes = minutes or size.minutes
        values |= rules.steps_for(there, values, size, seconds, minutes)
        notes.append(_time_words(values, seconds, minutes, there, machine))
    else:
        values = first | named | rules.base_values(there, seen, machine, train, aim)
        notes.append(f"{base}: {seen}.")
        if there.clips and not seen.frames:
            notes.append(f"{base} draws pictures: of clips, one frame each is learned from.")
        if minutes:
            notes.append(_fit_to_minutes(values, _recipe(values, data, base), minutes))
        else:
            notes.append(
                f"{values['train.steps']:,} steps are usual for so many samples; --minutes says otherwise."
            )
    values.setdefault("sample.prompts", [])
    return Suggestion(values, tuple(notes), toml_text(file, values, notes))


def _check(base: str, train: str, aim: str, minutes: float) -> None:
    """Raises Refused for words that are unknown, or do not go together."""
    kinds = RULES["model.train"]["choices"]
    if train not in kinds:
        raise Refused(f"--train {train} is not known.{nearest(train, kinds)}")
    if aim not in rules.AIMS:
        raise Refused(f"--for {aim} is not known.{nearest(aim, rules.AIMS)}")
    if minutes < 0:
        raise Refused(f"--minutes is {minutes:g}, but it must be above 0.")
    if base == "scratch" and train != "full":
        raise Refused(
            f"--train {train} needs a model that is there: give one by --base (a folder in diffusers' "
            "layout, a .safetensors file, a run), or leave --train out to train from scratch."
        )


def _place(given: str, file: Path) -> str:
    """A path as the recipe names it: relative to the recipe's own folder."""
    path = Path(given).expanduser()
    is_word = given in (*EMBEDDED, "scratch") or not path.exists()
    if is_word or path.is_absolute() or given.startswith("~") or file.parent == Path():
        return given
    return os.path.relpath(path, file.parent)


def _recipe(values: Mapping[str, Any], data: str, base: str) -> Recipe:
    """The recipe of these values, checked as a file would be; data and base as they were given."""
    here = {**values, "data.train": data, "model.base": base}
    return Recipe().overridden([f"{name}={toml(value)}" for name, value in here.items()], "new")


def _fit_to_minutes(values: Values, recipe: Recipe, minutes: float) -> str:
    """Choose the steps on a base by a plan, which takes one; the sentence about them."""
    step = max(1e-6, float(plan(recipe)["seconds_per_step"]))
    steps = rules.rounded(max(1, (60 * minutes - rules.REST_SECONDS) / step / (1 + rules.BESIDE)))
    values |= rules.of_steps(steps)
    return f"A step takes {step:.2g} s here, so {minutes:g} minutes are about {steps:,} steps."


def _time_words(
    values: Values, seconds: StepSeconds, minutes: float, data: DataFacts, machine: Machine
) -> str:
    """How long training from scratch will take, and why not longer or shorter."""
    steps, codec = values["train.steps"], values["model.codec_steps"]
    takes = steps * seconds.denoiser * (1 + rules.BESIDE) + codec * seconds.codec + rules.REST_SECONDS
    takes += data.samples * seconds.codec / values["model.codec_batch"] / 2
    words = (
        f"On this machine's {machine.device} a step takes {seconds.denoiser:.2g} s: {steps:,} steps and the "
        f"codec's {codec:,} are about {takes / 60:.2g} minutes."
    )
    if takes > 66 * minutes:
        return f"{words} {minutes:g} are too few to draw anything; --for tiny is quicker."
    if takes < 50 * minutes:
        return f"{words} Of {minutes:g} more would only learn these {data.samples:,} by heart."
    return words


def toml_text(file: Path, values: Mapping[str, Any], notes: list[str]) -> str:
    """The recipe as TOML: how it is run and what was seen first, then its sections."""
    lines = [
        f"# {paths.command('plan', file)}     says what will run",
        f"# {paths.command('train', file)}    trains; the same command resumes",
        "#",
        *(f"# {' '.join(note.split())}" for note in notes),
        *(_line(name, values[name]) for name in ("output", "seed")),
    ]
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        lines += [_line(name, value) for name, value in values.items() if name.startswith(f"{section}.")]
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any) -> str:
    said = f"{name.rpartition('.')[2]} = {toml(value)}"
    comment = COMMENTS.get(name, "")
    if name == "model.base" and value != "scratch":
        comment = ""
    return f"{said:<27} # {comment}" if comment else said
