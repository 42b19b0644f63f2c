"""What is to be drawn: one request a picture, and which of them can be drawn together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from sfumato.errors import Refused
from sfumato.models.pretrained.image_inputs import images_per_prompt


@dataclass(frozen=True)
class SampleRequest:
    """One picture to be drawn: what it shows, what it leans away from, and its own seed."""

    prompt: str
    negative: str | None
    seed: int
    shown: Mapping[str, list[Image.Image]] = field(default_factory=dict)

    @property
    def image_sizes(self) -> list[tuple[str, tuple[int, int]]]:
        """The sizes of the pictures it is shown; only equal ones can be drawn together."""
        return [(name, one.size) for name, some in self.shown.items() for one in some]


def parse_requests(
    prompt: str | Sequence[str] | None,
    negative: str | Sequence[str] | None,
    seed: int | Sequence[int],
    shown: Mapping[str, Any],
) -> list[SampleRequest]:
    """One request a picture; single values serve all, and picture i of an int seed uses seed + i.

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
    seen = {name: images_per_prompt(some, count, name) for name, some in shown.items()}
    for text in (*prompts, *away):
        check_is_unicode(text or "")
    return [
        SampleRequest(*request, {name: some[i] for name, some in seen.items()})
        for i, request in enumerate(zip(prompts, away, seeds, strict=True))
    ]


def check_is_unicode(text: str) -> None:
    """Raises Refused for a text that no tokenizer reads: one that came in from bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(
            f"The prompt {text[:60]!r} is no UTF-8. Write it in UTF-8, or set the terminal to it."
        ) from None


def batches(todo: Sequence[SampleRequest], most: int) -> Iterator[Sequence[SampleRequest]]:
    """The requests in order, at most so many at once, and only such as are shown pictures of equal sizes."""
    first = 0
    for last in range(1, len(todo) + 1):
        if last == len(todo) or last - first == most or todo[last].image_sizes != todo[first].image_sizes:
            yield todo[first:last]
            first = last
