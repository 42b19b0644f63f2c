"""Events as a page may take them: a stranger's events.jsonl holds any JSON, and has a page all the same.

What is of another type than a page can show is left out; an event without what its kind needs, too.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Event = dict[str, Any]
Clean = Callable[[Any], Any]
"""A value as a page may take it, None where it may not."""

LARGEST = 1e300
MOST_STEP = 2**53


def _number(value: Any) -> int | float | None:
    """A number that has a logarithm, or not a number, which charts leave out."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if value != value or -LARGEST < value < LARGEST else None


def _step(value: Any) -> int | None:
    is_step = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_STEP
    return value if is_step else None


def _text(value: Any) -> str | None:
    """A text that a file can be written with."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None


def _scalar(value: Any) -> Any:
    return _text(value) if isinstance(value, str) else _number(value)


def _list(of: Clean, hold: Any = None) -> Clean:
    """A list; what cannot be taken is left out, or, where places count, `hold` stands in its place."""

    def clean(value: Any) -> Any:
        if not isinstance(value, list):
            return None
        found = [of(one) for one in value]
        return [hold if one is None else one for one in found if one is not None or hold is not None]

    return clean


def _table(of: Clean) -> Clean:
    """A table of values of one kind, by texts."""

    def clean(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return None
        found = {_text(name) or "": of(one) for name, one in value.items()}
        return {name: one for name, one in found.items() if one is not None}

    return clean


def _record(needs: Iterable[str], **fields: Clean) -> Clean:
    """A table whose values have kinds of their own; other names are left out."""

    def clean(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return None
        found = {name: of(value[name]) for name, of in fields.items() if name in value}
        found = {name: one for name, one in found.items() if one is not None}
        return found if all(name in found for name in needs) else None

    return clean


def _one_of(*kinds: Clean) -> Clean:
    return lambda value: next((one for kind in kinds if (one := kind(value)) is not None), None)


ASIDE = _one_of(_number, _list(_record((), file=_text, reason=_text)))
METRIC = _one_of(_number, _record(("value",), value=_number, error=_number, note=_text))


def _summary(value: Any) -> Any:
    """What is said of the data: its own names, those that a page reads of their kinds."""
    if not isinstance(value, Mapping):
        return None
    known: dict[str, Clean] = {
        "samples": _number, "held_out": _number, "set_aside": ASIDE, "sizes": _table(_number)
    }  # fmt: skip
    found = {_text(name) or "": known.get(name, _scalar)(one) for name, one in value.items()}
    return {name: one for name, one in found.items() if one is not None}


FIELDS: dict[str, Clean] = {
    "step": _step,
    **dict.fromkeys(("kind", "split", "weights", "group", "name", "text", "reason", "device"), _text),
    **dict.fromkeys(("precision", "parallel", "file"), _text),
    **dict.fromkeys(("loss", "error", "gap", "learning_rate", "gradient_norm", "seconds", "time"), _number),
    **dict.fromkeys(("samples_per_second", "processes", "threads"), _number),
    "parameters": _one_of(_number, _table(_number)),
    "by_level": _list(_record(("level", "loss"), level=_number, loss=_number, error=_number)),
    "files": _list(_text, ""),
    "prompts": _list(_text, ""),
    "seeds": _list(_scalar, ""),
    "shown": _table(_list(_text, "")),
    "summary": _summary,
    "metrics": _table(METRIC),
    "accuracy": _table(_number),
    "notes": _table(_text),
}
NEEDS = {
    "step": ("step",),
    "validation": ("step", "loss"),
    "generalization_gap": ("step", "gap"),
    "phase": ("name",),
}
"""What a kind of event must have."""


def sound_events(events: Iterable[Event]) -> list[Event]:
    """The events that a page can take, of each what it can."""
    found = []
    for event in events:
        cleaned = {name: FIELDS[name](value) for name, value in event.items() if name in FIELDS}
        cleaned = {name: value for name, value in cleaned.items() if value is not None}
        if all(name in cleaned for name in NEEDS.get(cleaned.get("kind", ""), ())):
            found.append(cleaned)
    return found
