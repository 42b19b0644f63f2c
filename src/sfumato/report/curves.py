"""The curves of a run: its loss over steps and over noise levels, its rates and norms."""

from collections.abc import Iterable
from typing import Any

from markupsafe import Markup

from sfumato.report.charts import Line, chart, downsample, smooth

Event = dict[str, Any]
MOST_LEVELS = 6


def losses(events: list[Event]) -> tuple[list[Markup], list[Markup]]:
    """Every chart of a run that has something to show: (large ones, small ones)."""
    steps = [event for event in events if event.get("kind") == "step"]
    held_out = [event for event in events if event.get("kind") == "validation"]
    gaps = [event for event in events if event.get("kind") == "generalization_gap"]
    large = [_over_steps(steps, held_out), over_levels(held_out), _levels_over_steps(held_out), _gap(gaps)]
    small = [
        _figure("Gradient norm", steps, "gradient_norm", 3, log=True),
        _figure("Learning rate", steps, "learning_rate", 4),
        _figure("Samples per second", steps, "samples_per_second", 2),
    ]
    return [one for one in large if one], [one for one in small if one]


def _measured(held_out: Iterable[Event], split: str) -> list[Event]:
    """Measurements of one split, of the averaged weights where there are any, in order of steps."""
    of_split = [event for event in held_out if event.get("split") == split]
    averaged = [event for event in of_split if event.get("weights") == "ema"]
    return sorted(averaged or of_split, key=lambda event: event.get("step") or 0)


def _over_steps(steps: list[Event], held_out: list[Event]) -> Markup:
    finite = [event for event in steps if isinstance(event.get("loss"), int | float)]
    x, y = [event["step"] for event in finite], [event["loss"] for event in finite]
    lines = []
    if x:
        lines.append(Line("each step", *downsample(x, y), color=0, faint=True))
        lines.append(Line("training, smoothed", *downsample(x, smooth(y, len(y) / 60), 240), color=0))
    for split, name, color in (
        ("train", "training, fixed noise", 2),
        ("held_out", "held out, fixed noise", 1),
    ):
        found = _measured(held_out, split)
        if found:
            error = [event.get("error") or 0.0 for event in found]
            where, what = [event["step"] for event in found], [event["loss"] for event in found]
            lines.append(Line(name, where, what, error, color=color, points=True))
    note = "Held-out loss uses the same noise every time, so its points compare; bars are standard errors."
    return chart(
        "Loss",
        lines,
        x="step",
        y="loss",
        log_y=True,
        width=1060,
        height=320,
        note=note if len(lines) > 2 else "",
    )


def _gap(gaps: list[Event]) -> Markup:
    """Held-out loss minus that of trained pictures, over the run: what was learned by heart."""
    lines = []
    for weights, name, color in (("raw", "raw weights", 2), ("ema", "averaged weights", 1)):
        found = sorted(
            (event for event in gaps if event.get("weights") == weights),
            key=lambda event: event.get("step") or 0,
        )
        if found:
            error = [event.get("error") or 0.0 for event in found]
            where, what = [event["step"] for event in found], [event["gap"] for event in found]
            lines.append(Line(name, where, what, error, color=color, points=True))
    if not lines:
        return Markup("")
    note = "Held-out loss minus that of trained pictures: as it rises, they are learned by heart."
    return chart(
        "Generalisation gap", lines, x="step", y="loss", zero=True, width=1060, height=240, note=note
    )


def over_levels(held_out: list[Event]) -> Markup:
    """The newest measurements by noise level, with error bars."""
    lines = []
    for split, name, color in (("train", "training pictures", 2), ("held_out", "held-out pictures", 1)):
        found = [event for event in _measured(held_out, split) if event.get("by_level")]
        if found:
            levels = found[-1]["by_level"]
            error = [one.get("error") or 0.0 for one in levels]
            where, what = [one["level"] for one in levels], [one["loss"] for one in levels]
            lines.append(Line(name, where, what, error, color=color, points=True))
    note = "0 is clean, 1 is noise. Where held-out lies above training, the model remembers."
    return chart("Loss by noise level", lines, x="noise level", y="loss", log_y=True, note=note)


def _levels_over_steps(held_out: list[Event]) -> Markup:
    """How the held-out loss fell at each noise level, as a share of the first measurement."""
    found = [event for event in _measured(held_out, "held_out") if event.get("by_level")]
    if len(found) < 3:
        return Markup("")
    levels = [one["level"] for one in found[0]["by_level"]]
    chosen = levels if len(levels) <= MOST_LEVELS else _evenly_spaced(levels, MOST_LEVELS)
    lines = []
    for index, level in enumerate(chosen):
        share = index / max(len(chosen) - 1, 1)
        color = f"color-mix(in oklab, var(--c1) {100 * share:.0f}%, var(--c0))"
        points = [
            (event["step"], one["loss"])
            for event in found
            for one in event["by_level"]
            if one["level"] == level
        ]
        where, what = [step for step, _ in points], [loss for _, loss in points]
        lines.append(Line(f"{level:.2g}", where, what, color=color, points=len(where) < 30))
    return chart(
        "Held-out loss at each noise level",
        lines,
        x="step",
        y="loss",
        log_y=True,
        note="From clean to noise.",
    )


def _evenly_spaced(levels: list[float], most: int) -> list[float]:
    return [levels[round(index * (len(levels) - 1) / (most - 1))] for index in range(most)]


def _figure(title: str, steps: list[Event], name: str, color: int, log: bool = False) -> Markup:
    found = [event for event in steps if isinstance(event.get(name), int | float)]
    x, y = [event["step"] for event in found], [event[name] for event in found]
    if not x or (log and min(y) <= 0):
        log = False
    lines = [] if not x else [Line(title.lower(), *downsample(x, y, 240), color=color)]
    return chart(title, lines, x="step", y="", log_y=log, zero=not log, width=380, height=220)
