"""What sfumato says when it stops: input that is refused, or a run that failed."""

from collections.abc import Iterable
from difflib import get_close_matches


class Refused(ValueError):
    """The user's input cannot be taken; the message names culprit, rule and way out. Exit code 2."""


class Failed(RuntimeError):
    """The run could not go on although its input was accepted. Exit code 1."""


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
