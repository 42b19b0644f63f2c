"""Masks drawn at random, for models that learn to repaint: boxes, ovals and strokes, white is repainted.

Which mask a picture gets is a function of (seed, its name, the mask's number); each is a sample of its own,
so that what is kept of the picture is encoded once for each mask and stored.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

from sfumato.errors import Refused

from . import media
from .sample import HELD_OUT, Sample, identity

WHOLE = 0.1
"""Share of masks that repaint everything, so that drawing from words alone is not forgotten."""


def drawn(size: tuple[int, int], seed: int, name: str, number: int) -> Image.Image:
    """Mask number `number` of the picture of this name and size (width, height), grey."""
    chance = np.random.default_rng([seed, identity(name), number])
    mask = Image.new("L", size, 0)
    if chance.random() < WHOLE:
        return Image.new("L", size, 255)
    pen = ImageDraw.Draw(mask)
    if chance.random() < 0.5:
        sides = [max(1, round(side * chance.uniform(0.25, 0.75))) for side in size]
        left, top = (int(chance.integers(0, side - own + 1)) for side, own in zip(size, sides, strict=True))
        shape = pen.rectangle if chance.random() < 0.5 else pen.ellipse
        shape((left, top, left + sides[0] - 1, top + sides[1] - 1), fill=255)
        return mask
    for _ in range(int(chance.integers(1, 4))):
        wide = max(2, round(min(size) * chance.uniform(0.08, 0.25)))
        corners = chance.uniform(0, 1, (int(chance.integers(2, 6)), 2)) * size
        pen.line([tuple(corner) for corner in corners], fill=255, width=wide, joint="curve")
        for x, y in corners:
            pen.ellipse((x - wide / 2, y - wide / 2, x + wide / 2, y + wide / 2), fill=255)
    return mask


def of_sample(sample: Sample, seed: int, number: int) -> Image.Image:
    """A mask of the size of a sample's picture."""
    return drawn(media.size_of(sample.source()), seed, sample.name, number)


def masked(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """The samples with `count` masks each, held-out ones with one.

    Raises:
        Refused: a sample has a mask already.
    """
    named = next((sample.name for sample in samples if "mask" in sample.companions), "")
    if named:
        raise Refused(
            f"data.random_masks = {count} draws masks, but {named} has one in the column mask. Leave one of "
            "them out."
        )
    return [
        replace(
            sample,
            name=f"mask {number} of {sample.name}",
            companions={**sample.companions, "mask": partial(of_sample, sample, seed, number)},
        )
        for sample in samples
        for number in range(1 if sample.split == HELD_OUT else count)
    ]
