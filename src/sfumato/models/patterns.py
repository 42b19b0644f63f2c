"""Regular expressions of whoever wrote a file: for a time that is bounded, whatever they say."""

import time
from typing import Any

import regex

PATTERN_SECONDS = 2.0
"""That all patterns of one file may take together."""
LONGEST, MOST_COUNTS = 1000, 8
"""Letters of a pattern, and repetitions {n} in it: "(a{9999}){9999}" is built before it is tried."""


class BoundedPatterns:
    """Matches patterns that a file gives, for `PATTERN_SECONDS` in all."""

    def __init__(self) -> None:
        self.left = PATTERN_SECONDS
        self._known: dict[str, Any] = {}

    def fullmatch(self, pattern: str, text: str) -> bool:
        """Whether the pattern means all of the text.

        Raises:
            ValueError: it is no regular expression, or takes too long; the message says which.
        """
        began = time.monotonic()
        try:
            if len(pattern) > LONGEST or pattern.count("{") > MOST_COUNTS:
                raise ValueError("is no regular expression (it is too long)")
            if pattern not in self._known:
                self._known[pattern] = regex.compile(pattern)
            return self._known[pattern].fullmatch(text, timeout=max(self.left, 0.001)) is not None
        except TimeoutError:
            raise ValueError("takes too long") from None
        except (regex.error, OverflowError, RecursionError, MemoryError) as problem:
            raise ValueError(f"is no regular expression ({problem})") from problem
        finally:
            self.left -= time.monotonic() - began
