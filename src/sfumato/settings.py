"""A setting is a dataclass field that explains itself: its default, one line of help, and what it may be."""

from collections.abc import Iterable
from dataclasses import field
from typing import Any


def as_written(value: Any) -> Any:
    """A setting's value as TOML or JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def key(
    default: Any,
    help: str,
    *,
    choices: Iterable[str] = (),
    least: float | None = None,
    most: float | None = None,
    path: bool = False,
    words: Iterable[str] = (),
    hub: bool = False,
    many: bool = False,
    numbers: bool = False,
    file_after: str = "",
) -> Any:
    """A field of a settings dataclass.

    Args:
        default: the value when nothing is said; its type is the setting's type.
        help: one line, shown as the comment beside the key in a written recipe.
        choices: the words a string may be; empty for any.
        least, most: the bounds of a number, both allowed values.
        path: the string names a file or folder, relative to the recipe that says it.
        words: the words that stand for themselves where a path is expected.
        hub: `owner/name` may also be meant, where no such folder exists.
        many: a list of such strings may be given too. numbers: the list is one of numbers.
        file_after: what stands before the path in a string that ends in .safetensors.
    """
    rules = {"help": help, "choices": tuple(choices), "least": least, "most": most}
    kinds = {"path": path, "words": tuple(words), "hub": hub, "many": many, "numbers": numbers}
    kinds["file_after"] = file_after
    return field(default=default, metadata={**rules, **kinds})
