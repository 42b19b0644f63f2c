"""The events a page is made of: those whose entries are of the kinds that a run writes.

A line that has no check sum may come from anywhere; what it says is looked at before it is shown.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from sfumato.run_folder import RunFolder

Check = Callable[[Any], bool]
LARGEST = sys.float_info.max
"""An integer may be larger, and no chart can show it."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > LARGEST


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _listed(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _tabled(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _with(**checks: Check) -> Check:
    """A table in which these entries, where they are, pass their checks."""

    def check(value: Any) -> bool:
        return isinstance(value, dict) and all(
            value.get(name) is None or one(value[name]) for name, one in checks.items()
        )

    return check


def _is_level(value: Any) -> bool:
    return _tabled(_is_number)(value) and "level" in value and "loss" in value


def _is_metric(value: Any) -> bool:
    if not isinstance(value, dict):
        return True
    return "value" not in value or (
        _is_number(value["value"]) and _with(error=_is_number, note=_is_text)(value)
    )


_is_aside = _with(file=_is_text, reason=_is_text)

ENTRIES: Mapping[str, Check] = {
    "step": _is_step,
    **dict.fromkeys(("split", "weights", "group", "name", "text", "reason", "device", "file"), _is_text),
    **dict.fromkeys(("precision", "parallel"), _is_text),
    **dict.fromkeys(("loss", "error", "gap", "learning_rate", "gradient_norm"), _is_number),
    **dict.fromkeys(("samples_per_second", "seconds", "threads", "processes"), _is_number),
    **dict.fromkeys(("files", "prompts"), _listed(_is_text)),
    "seeds": _listed(lambda value: _is_text(value) or _is_number(value)),
    "shown": _tabled(_listed(_is_text)),
    "by_level": _listed(_is_level),
    "parameters": lambda value: _is_number(value) or _tabled(_is_number)(value),
    "metrics": _tabled(_is_metric),
    "accuracy": _tabled(_is_metric),
    "notes": lambda value: not isinstance(value, dict) or _tabled(_is_text)(value),
    "summary": _with(
        samples=_is_number,
        held_out=_is_number,
        sizes=lambda value: not isinstance(value, dict) or _tabled(_is_number)(value),
        set_aside=lambda value: _listed(_is_aside)(value) or _is_number(value),
    ),
}
"""{entry: whether a value of it can be shown}, where there is one."""
NEEDED = {
    "step": ("step",),
    "validation": ("step", "loss"),
    "generalization_gap": ("step", "gap"),
    "phase": ("name",),
    "data": ("summary",),
}
"""What an event of a kind cannot do without."""


def is_readable(event: Mapping[str, Any]) -> bool:
    """Whether an event can be shown."""
    needs = NEEDED.get(event["kind"], ())
    return all(event.get(name) is not None for name in needs) and all(
        event.get(name) is None or check(event[name]) for name, check in ENTRIES.items()
    )


def readable_events(run: RunFolder) -> tuple[list[dict[str, Any]], int]:
    """The events of a run that can be shown, in order of their steps, and how many others there are.

    Raises:
        Refused: events.jsonl is no file that can be read.
    """
    events = run.events()
    kept = [event for event in events if is_readable(event)]
    return kept, len(events) - len(kept)
