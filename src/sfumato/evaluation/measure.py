"""A measure is a number with its error and the words that say how it was taken."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """value ± error; error is one standard error, None where a single measurement gives none.

    chance: the value that pure chance gives, of shares that are right.
    """

    value: float
    error: float | None = None
    note: str = ""
    chance: float | None = None

    def __str__(self) -> str:
        beside = "" if self.error is None else f" ± {self.error:.2g}"
        return f"{self.value:.4g}{beside}" + ("" if self.chance is None else f" (chance {self.chance:.2g})")

    def to_dict(self) -> dict[str, Any]:
        """As a table for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None and value != ""}


def mean_with_error(values: Sequence[float], note: str = "") -> Measure:
    """The mean of repetitions, with its standard error from their spread.

    Raises:
        ValueError: without any values.
    """
    if not values:
        raise ValueError("a measure needs at least one value")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Measure(mean, None, note)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Measure(mean, math.sqrt(variance / len(values)), note)


def proportion(right: Sequence[bool], note: str = "") -> Measure:
    """The share that is right, with its binomial standard error (rule of succession, so never 0)."""
    count = len(right)
    if not count:
        raise ValueError("a share needs at least one answer")
    value, smooth = sum(right) / count, (sum(right) + 1) / (count + 2)
    return Measure(value, math.sqrt(smooth * (1 - smooth) / count), note)
