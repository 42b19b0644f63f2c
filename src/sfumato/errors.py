"""What sfumato says when it stops: input that is refused, or a run that failed."""

import json
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from typing import Any


class _Sentence(Exception):
    """A problem whose sentence may quote what a file says: it steers no terminal that shows it."""

    def __str__(self) -> str:
        return for_terminal(super().__str__())


class Refused(_Sentence, ValueError):
    """The user's input cannot be taken; the message names culprit, rule and way out. Exit code 2."""


class Failed(_Sentence, RuntimeError):
    """The run could not go on although its input was accepted. Exit code 1."""


MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, OSError)
"""What goes wrong where a file does not say what it should; torch has RuntimeError for bad sizes."""


@contextmanager
def explain_malformed(file: object, way_out: str, verdict: str = "is damaged") -> Iterator[None]:
    """Turn what goes wrong while a file's words are taken as they stand into one sentence.

    For a block that reads one file and believes it: of what a stranger wrote, any part may be of any type.

    Raises:
        Failed: naming the file. What the block refuses itself goes on.
    """
    try:
        yield
    except (Refused, Failed):
        raise
    except MALFORMED as problem:
        if type(problem).__name__ == "OutOfMemoryError":
            raise
        said = " ".join(str(problem).split())[:200]
        raise Failed(f"{file} {verdict} ({type(problem).__name__}: {said}). {way_out}") from problem


def check_types(settings: Any) -> None:
    """Raises TypeError unless each field of a dataclass that a file filled in is of its default's kind."""
    for one in fields(settings):
        value, usual = getattr(settings, one.name), one.default
        kinds = (int, float) if isinstance(usual, float) else (type(usual),)
        if isinstance(usual, tuple) and isinstance(value, tuple):
            value, kinds = next((part for part in value if not isinstance(part, str)), ""), (str,)
        if type(value) not in kinds:
            raise TypeError(f"{one.name} is a {type(value).__name__}")


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object that a text is.

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is a {type(found).__name__}, not a JSON object")
    return found


def nearest(word: str, options: Iterable[str]) -> str:
    """A half sentence that offers the option most like `word`, or all of them if none is close."""
    known = sorted(options)
    close = get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else f" Known: {', '.join(known)}."


def one_of(kind: str, word: str, options: Iterable[str]) -> str:
    """`word` itself if it is one of `options`.

    Raises:
        Refused: naming the kind, the word and the nearest option.
    """
    known = list(options)
    if word not in known:
        raise Refused(f'{kind} "{word}" is not known.{nearest(word, known)}')
    return word


# ----------------------------------------------------------------
# What others wrote, shown: no text of a file moves the cursor, changes the title or turns a line around.


def printable(name: object) -> str:
    """A name that can be shown and written anywhere, on one line and in its own order of letters.

    Bytes that are no text appear as \\xNN, what breaks a line or turns its direction by its number.
    """
    shown = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in shown)


JOINERS = "\u200c\u200d"
"""What joins letters or parts letters of one word: of many scripts, and of emoji."""


def for_terminal(text: str) -> str:
    """A text of several lines as a terminal may get it: what would steer it appears by its number."""
    return "".join(ascii(one)[1:-1] if _steers(one) else one for one in text)


def json_for_terminal(value: Any, indent: int | None = None) -> str:
    """A value as JSON that reads as the value, and steers no terminal; paths and the like as texts."""
    text = json.dumps(value, ensure_ascii=False, default=str, indent=indent)
    return "".join(json.dumps(one)[1:-1] if _steers(one) else one for one in text)


def _steers(letter: str) -> bool:
    """Whether it is a control, half a letter, or a mark that breaks lines or changes their direction."""
    if letter in "\n\t" or letter in JOINERS:
        return False
    return unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")
