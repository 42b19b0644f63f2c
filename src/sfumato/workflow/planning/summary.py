"""A plan in a dozen lines: what, how long, how much memory and disk, what is unusual, what is fetched."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.report.page import duration

LINES = 12
WHERE = {"command line": "the command line", "python": "Python", "base": "the base"}
PHASES = {
    "codec": "the codec",
    "encode": "encoding",
    "steps": "training",
    "measure": "measuring",
    "draw": "drawing",
}
"""The parts of a run, in order, as people say them."""
REPEATED = ("steps", "measure", "draw")
"""Those that a run that goes on has done in part."""
OFTEN = 1000
"""Times that each picture is shown, beyond which it is said."""


def summary(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `plan` found, as at most twelve lines of (word, text)."""
    if "fetch" in found:
        lines = [
            ("fetched", f"{name}: {_count(one['files'], 'file')}, {one['size']}, commit {one['commit'][:12]}")
            for name, one in found["fetch"].items()
        ]
        return [*lines, ("then", f"{found['then'].capitalize()}.")]
    lines = [
        ("run", _run(found)),
        ("data", _data(found)),
        ("model", _model(found)),
        ("training", _training(found)),
        ("drawing", _drawing(found)),
        ("time", _time(found)),
        ("memory", _memory(found)),
        ("disk", _disk(found)),
        ("fetched", "nothing"),
    ]
    notes, room = list(found["unusual"]), LINES - len(lines) - 1
    if len(notes) > room:
        notes[room - 1 :] = [f"{len(notes) - room + 1} more: --all"]
    lines += [("unusual", note) for note in notes or ["nothing"]]
    return [*lines, ("recipe", _recipe(found))]


def unusual(found: Mapping[str, Any], warnings: list[str]) -> list[str]:
    """Sentences about what someone should look at before it runs, what stops it first.

    Args:
        warnings: what is known of the recipe alone.
    """
    free, notes = found["free"], list[str]()
    for what, needed in (("memory", found["process_gb"]), ("disk", found["disk_gb"])):
        if needed > free[f"{what}_gb"]:
            notes.append(f"{needed:,.1f} GB of {what} are needed, {free[f'{what}_gb']:,.1f} GB are free.")
    held = max(found.get("device_gb", {}).values(), default=0)
    if held > free.get("device_gb", held):
        way = "train.gradient_checkpointing and train.gradient_accumulation help, or --fit SIZE"
        notes.append(f"{held:,.1f} GB of {found['device']} are needed of {free['device_gb']:,.1f} GB: {way}.")
    notes += found.get("changed", [])
    if aside := found["set_aside"]:
        first = f"{aside[0]['file']}: {aside[0]['reason']}"
        notes.append(f"{_count(len(aside), 'file')} set aside, the first is {first.rstrip('.')}.")
    if cut := found.get("tokens", {}).get("cut_off"):
        notes.append(f"{_count(cut, 'caption')} cut off after {found['tokens']['read']} tokens.")
    values = {name: entry["value"] for name, entry in found["recipe"].items()}
    if found["epochs"] > OFTEN:
        notes.append(
            f"Each picture is shown {found['epochs']:,.0f} times, so that it will be learned by heart."
        )
    elif found["epochs"] < 1:
        notes.append(f"Only {found['epochs']:.0%} of the pictures are shown: train.steps × train.batch.")
    if values["sample.every"] > values["train.steps"]:
        notes.append(f"Nothing is drawn before the end: sample.every is {values['sample.every']:,}.")
    return [*notes, *warnings]


def phases_left(found: Mapping[str, Any]) -> dict[str, float]:
    """Seconds that each part of the run still takes, by its plain name, in order."""
    steps = found["recipe"]["train.steps"]["value"]
    left = max(0.0, 1 - found["step"] / steps)
    return {
        name: found["phases"][key]["seconds"] * (left if key in REPEATED else 1.0)
        for key, name in PHASES.items()
        if key in found["phases"]
    }


def _value(found: Mapping[str, Any], name: str) -> Any:
    return found["recipe"][name]["value"]


def _run(found: Mapping[str, Any]) -> str:
    output, steps = shown_path(_value(found, "output")), _value(found, "train.steps")
    if found["run"] == "new":
        return f"{output}, new"
    if found["step"] >= steps:
        return f"{output}, has all of its {steps:,} steps: more with train.steps=N"
    return f"{output}, {found['run']}"


def _data(found: Mapping[str, Any]) -> str:
    frames = _value(found, "data.frames")
    kind = f"samples of up to {frames} frames" if frames else "pictures"
    held = f", {found['held_out']:,} held out" if found["held_out"] else ""
    captions = f", {_count(found['captions'], 'caption')}"
    prior = f", beside {found['prior']} of the class" if "prior" in found else ""
    return (
        f"{found['samples']:,} {kind} of about {_value(found, 'data.resolution')} px{held}{captions}{prior}"
    )


def _model(found: Mapping[str, Any]) -> str:
    base, how = _value(found, "model.base"), _value(found, "model.train")
    whole, learns = found["parameters"], found["trained_parameters"]
    if base == "scratch":
        theory, text = _value(found, "model.theory") or "flow-matching", _value(found, "model.text_encoder")
        network = f"{_value(found, 'model.denoiser')} of {_millions(whole)} weights from scratch, {theory}"
        return f"{network}; codec {found['codec']}; text {text}"
    return f"{shown_path(base)}; {how}: {_millions(learns)} of {_millions(whole)} weights learn"


def _training(found: Mapping[str, Any]) -> str:
    steps, batch = _value(found, "train.steps"), _value(found, "train.batch")
    shared = f", {found['devices']} processes" if "devices" in found else ""
    where = f"{found['device']} in {found['precision']}{shared}"
    each = f"{found['seconds_per_step']:.2g} s each"
    often = f"{found['epochs']:,.0f}" if found["epochs"] >= 10 else f"{found['epochs']:.2g}"
    return f"{_count(steps, 'step')} of {batch:,} on {where}, {each}; every picture {often} times"


def _drawing(found: Mapping[str, Any]) -> str:
    every, steps = _value(found, "sample.every"), _value(found, "sample.steps")
    when = f"every {every:,} steps" if every else "at the end"
    whose = " (the base's own)" if found["recipe"]["sample.steps"]["origin"] == "base" else ""
    return f"{when}, in {_count(steps, 'step')}{whose} with guidance {_value(found, 'sample.guidance'):g}"


def _time(found: Mapping[str, Any]) -> str:
    left = {name: seconds for name, seconds in phases_left(found).items() if seconds >= 0.05}
    if not left:
        return "a moment"
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in left.items())
    how = "" if found["probed"] else " (counted, not tried)"
    return f"about {duration(sum(left.values()))}{how}: {parts}"


def _memory(found: Mapping[str, Any]) -> str:
    free = found["free"]
    host = f"{_size(found['process_gb'])} of {_size(free['memory_gb'])} that are free"
    if "device_gb" not in found:
        return f"{host}; a step {_size(found['memory_gb'])}"
    part, most = max(found["device_gb"].items(), key=lambda one: one[1])
    name = {"encode": "encoding", "steps": "training", "draw": "drawing"}[part]
    room = f"{_size(free['device_gb'])} that are free on {found['device']}"
    device = f"{_size(most)} of {room}, while {name}"
    return f"{device}; {host} on the host"


def _disk(found: Mapping[str, Any]) -> str:
    store = found["store_gb"]
    parts = f"encodings {_size(store)}, checkpoints {_size(found['disk_gb'] - store)}"
    return f"{_size(found['disk_gb'])} of {_size(found['free']['disk_gb'])} that are free: {parts}"


def _recipe(found: Mapping[str, Any]) -> str:
    origins = Counter(entry["origin"] for entry in found["recipe"].values())
    defaults = origins.pop("default", 0)
    said = [f"{_count(many, 'value')} from {WHERE.get(origin, origin)}" for origin, many in origins.items()]
    return f"{', '.join([*said, _count(defaults, 'default')])}; each of them: --all"


def _millions(count: float) -> str:
    return f"{count / 1e6:,.2f} M" if count < 1e8 else f"{count / 1e6:,.0f} M"


def _size(gigabytes: float) -> str:
    return f"{gigabytes:,.1f} GB" if gigabytes >= 1 else f"{gigabytes * 1000:.0f} MB"


def shown_path(word: str) -> str:
    """A path as short as it can be said from the current folder."""
    path = Path(word)
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else word


def _count(many: int, what: str) -> str:
    return f"{many:,} {what}{'s' * (many != 1)}"
