"""Images that guide, made from pictures: control images (black says nothing), random masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from sfumato.data.sources.sample import HELD_OUT, Sample, identity
from sfumato.errors import Refused, one_of
from sfumato.readers import media

if TYPE_CHECKING:
    from torch import Tensor

# ----------------------------------------------------------------
# Control pictures made from pictures: white on black, so that black says nothing.
#
# canny: thin edges (Canny 1986), soft-edge: the strength of the gradient, sketch: lines as a pen would draw
# them, the darker sides of a difference of Gaussians (Winnemöller et al. 2012). By scikit-image.


VERSION = 1


def _canny(gray: np.ndarray) -> np.ndarray:
    from skimage.feature import canny

    return canny(gray, sigma=max(1.0, min(gray.shape) / 256), low_threshold=0.05, high_threshold=0.12)


def _soft_edge(gray: np.ndarray) -> np.ndarray:
    from skimage.filters import gaussian, sobel

    strength = sobel(gaussian(gray, max(0.5, min(gray.shape) / 256)))
    return np.clip(strength / 0.25, 0, 1) ** 0.7


def _sketch(gray: np.ndarray) -> np.ndarray:
    from skimage.filters import difference_of_gaussians

    sigma = max(0.7, min(gray.shape) / 160)
    difference = np.abs(difference_of_gaussians(gray, sigma, 1.6 * sigma))
    return np.clip(difference / 0.05 - 0.35, 0, 1)


KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sketch": _sketch,
    "canny": _canny,
    "soft-edge": _soft_edge,
}


def kind_of(word: str) -> str:
    """The kind a word means, "soft edge" as "soft-edge"; any other word stays as it is."""
    plain = "-".join(word.lower().replace("_", " ").replace("-", " ").split())
    return plain if plain in KINDS else word


def control_image(pixels: Tensor, kind: str) -> Tensor:
    """The control pictures of pixels [B, 3, H, W] in [-1, 1], as such pixels; colors count as lightness does.

    Of clips [B, 3, F, H, W], every frame's.

    Raises:
        Refused: no such kind, or scikit-image is not installed.
    """
    import torch  # here: names of controls are looked up without

    if pixels.ndim == 5:
        frames = control_image(pixels.transpose(1, 2).flatten(0, 1), kind)
        return frames.unflatten(0, (len(pixels), -1)).transpose(1, 2)
    draw = KINDS[one_of("Control", kind_of(kind), KINDS)]
    try:
        import skimage  # noqa: F401
    except ImportError as missing:
        raise Refused(
            f'Making a "{kind}" needs scikit-image: pip install "sfumato[control]". Or name a column of '
            "control pictures as data.control_image."
        ) from missing
    found = []
    for picture in pixels.detach().float().cpu():
        channels = (picture.numpy().astype(np.float64) + 1) / 2
        drawn = np.max([draw(channel) for channel in channels], axis=0)  # an edge between colors is one too
        found.append(torch.from_numpy(drawn.astype(np.float32) * 2 - 1).expand(3, -1, -1))
    return torch.stack(found).to(pixels)


# ----------------------------------------------------------------
# Masks drawn at random, for models that learn to repaint: boxes, ovals and strokes, white is repainted.
#
# Which mask a picture gets is a function of (seed, its name, the mask's number); each is a sample of its own,
# so that what is kept of the picture is encoded once for each mask and stored.


WHOLE = 0.1
"""Share of masks that repaint everything, so that drawing from words alone is not forgotten."""


def random_mask(size: tuple[int, int], seed: int, name: str, number: int) -> Image.Image:
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


def mask_of_sample(sample: Sample, seed: int, number: int) -> Image.Image:
    """A mask of the size of a sample's picture."""
    return random_mask(media.size_of(sample.source()), seed, sample.name, number)


def with_random_masks(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
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
            companions={**sample.companions, "mask": partial(mask_of_sample, sample, seed, number)},
        )
        for sample in samples
        for number in range(1 if sample.split == HELD_OUT else count)
    ]
