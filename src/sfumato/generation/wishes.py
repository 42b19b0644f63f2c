"""What is to be drawn: one wish a picture, and which of them can be drawn together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from sfumato.errors import Refused
from sfumato.stages.seeing import pictures_of


@dataclass(frozen=True)
class Wish:
    """One picture to be drawn: what it shows, what it leans away from, and its own seed."""

    prompt: str
    negative: str | None
    seed: int
    shown: Mapping[str, list[Image.Image]] = field(default_factory=dict)

    @property
    def looks(self) -> list[tuple[str, tuple[int, int]]]:
        """The sizes of the pictures it is shown; only equal ones can be drawn together."""
        return [(name, one.size) for name, some in self.shown.items() for one in some]


def wishes(
    prompt: str | Sequence[str] | None,
    negative: str | Sequence[str] | None,
    seed: int | Sequence[int],
    shown: Mapping[str, Any],
) -> list[Wish]:
    """One wish a picture; single values serve all, and picture i of an int seed uses seed + i.

    `shown` holds pictures by the argument that brings them: one for all, one for each, or a list for each.

    Raises:
        Refused: lists of different lengths, or an empty one.
    """
    lists = {"prompt": prompt, "negative": negative, "seed": seed}
    lengths = {
        name: len(value)
        for name, value in lists.items()
        if isinstance(value, Sequence) and not isinstance(value, str)
    }
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        said = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise Refused(f"Lists must be as long as there are pictures, at least 1, but these have {said}.")
    many = [len(some) for some in shown.values() if isinstance(some, list | tuple)]
    count = next(iter(lengths.values()), max(many, default=1) if prompt is None else 1)
    prompts = [prompt or ""] * count if prompt is None or isinstance(prompt, str) else list(prompt)
    away = [negative] * count if negative is None or isinstance(negative, str) else list(negative)
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    seen = {name: pictures_of(some, count, name) for name, some in shown.items()}
    return [
        Wish(*wish, {name: some[i] for name, some in seen.items()})
        for i, wish in enumerate(zip(prompts, away, seeds, strict=True))
    ]


def together(todo: Sequence[Wish], most: int) -> Iterator[Sequence[Wish]]:
    """The wishes in order, at most so many at once, and only those that are shown pictures of equal sizes."""
    first = 0
    for last in range(1, len(todo) + 1):
        if last == len(todo) or last - first == most or todo[last].looks != todo[first].looks:
            yield todo[first:last]
            first = last
