"""Pictures drawn in the shapes their captions were learned in: a caption's picture may be wide or tall."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.generation import Pipeline

Size = tuple[int, int]
"""(width, height) in pixels."""


def draw_in_sizes(
    model: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sizes: Sequence[Size | None],
    watch: Callable[[int, int], None] | None = None,
    guides: Mapping[str, Sequence[Any]] | None = None,
    **options: Any,
) -> list[Any]:
    """Draw each prompt at its own size, those of one size together; None is the model's own size.

    Options are those of `Pipeline.generate`, guides those that bring one picture for each prompt;
    `watch` hears (what is done, in all) of everything.
    """
    drawn: dict[int, Any] = {}
    for size in dict.fromkeys(sizes):
        mine = [index for index, one in enumerate(sizes) if one == size]
        before = len(drawn)

        def report_progress(done: int, total: int, mine: list[int] = mine, before: int = before) -> None:
            if watch is not None:
                each = total // len(mine)
                watch(before * each + done, len(prompts) * each)

        width, height = size or (None, None)
        given: dict[str, Any] = {"seed": [seeds[index] for index in mine], "width": width, "height": height}
        given |= {name: [some[index] for index in mine] for name, some in (guides or {}).items()}
        pictures = model.generate(
            [prompts[index] for index in mine], watch=report_progress, **given, **options
        )
        drawn |= dict(zip(mine, pictures, strict=True))
    return [drawn[index] for index in range(len(prompts))]


def squeeze_to_square(picture: Tensor, side: int) -> Tensor:
    """A picture, uint8 [3, H, W], squeezed into [3, side, side], so that all shapes can be compared."""
    if picture.shape[-2:] == (side, side):
        return picture
    pixels = F.interpolate(picture[None].float(), (side, side), mode="bilinear", antialias=True)[0]
    return pixels.round().clamp(0, 255).to(torch.uint8)
