"""Pictures that a model is shown: what a user hands over, as lists of RGB pictures, one for each prompt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.errors import Refused
from sfumato.readers import media

Pictures = Sequence[Image.Image]
Encode = Callable[[Tensor], Tensor]
"""Pixels in [-1, 1] → normalised latents."""
SHOWN = ("image", "last_image")
"""Arguments that show pictures, by the pipelines' names."""


@dataclass(frozen=True)
class ImageCondition:
    """How training shows a model a picture, as a tensor of the condition.

    own: it is made from the sample's own picture or clip, else from the one it begins with (the source).
    encode: pixels [B, 3, (F,) H, W] in [-1, 1] → [B, …]. version: changes whenever its answers would.
    """

    own: bool
    encode: Encode
    version: str


def picture(one: Any) -> Image.Image:
    """A PIL picture, the path of one, uint8 [H, W, 3], or pixels [3, H, W] in [-1, 1], as RGB.

    It is read as training reads it: upright, on white where it is clear, 16 bits and profiles to 8-bit sRGB.

    Raises:
        Refused: anything else, or a file that cannot be read.
    """
    if isinstance(one, str | Path):
        one = _read(Path(one).expanduser(), str(one))
    if isinstance(one, Tensor) and one.ndim == 3 and one.is_floating_point():
        one = one.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    if isinstance(one, np.ndarray) and one.dtype == np.uint8 and one.ndim == 3:
        one = Image.fromarray(one)
    if not isinstance(one, Image.Image):
        raise Refused(
            f"A picture must be a PIL image, a path, uint8 [H, W, 3] or pixels [3, H, W] in [-1, 1], not "
            f"{type(one).__name__}."
        )
    return _read(one, "The picture")


def mask_picture(one: Any) -> Image.Image:
    """A mask, read as `picture` reads it, white where it acts.

    Raises:
        Refused: as `picture`, and a mask that tells by what is clear where it acts: on white it is white all
            over.
    """
    found = picture(one)
    source = Path(one).expanduser() if isinstance(one, str | Path) else one
    if isinstance(source, Path | Image.Image) and found.convert("L").getextrema()[0] > 250:
        alpha = media.open_picture(source).convert("RGBA").getchannel("A").getextrema()
        if alpha[0] < 255:
            name = one if isinstance(one, str | Path) else "The mask"
            raise Refused(
                f"{name} is white all over once what is clear in it lies on white. Save the mask without "
                "transparency: white where it acts, black elsewhere."
            )
    return found


def _read(source: Path | Image.Image, name: str) -> Image.Image:
    try:
        return media.read_picture(source)
    except media.Unreadable as problem:
        raise Refused(
            f"{name} cannot be read as a picture: {problem}. Give one of {', '.join(media.PICTURES)}."
        ) from problem


def images_per_prompt(shown: Any, count: int, name: str = "image") -> list[list[Image.Image]]:
    """The pictures of each of `count` prompts.

    One picture serves all prompts; a list holds one for each prompt, or a list of them; a plain list
    beside a single prompt is all its own.

    Raises:
        Refused: a list of another length.
    """
    if shown is None:
        return [[] for _ in range(count)]
    if not isinstance(shown, list | tuple):
        return [[picture(shown)]] * count
    if count == 1 and not any(isinstance(one, list | tuple) for one in shown):
        return [[picture(one) for one in shown]]
    if len(shown) == 1:
        shown = list(shown) * count
    if len(shown) != count:
        raise Refused(
            f"{name} holds {len(shown)} pictures for {count} prompts. Give one for all, one for each, or a "
            "list of lists."
        )
    return [[picture(p) for p in one] if isinstance(one, list | tuple) else [picture(one)] for one in shown]


def encoded(encode: Encode, pictures: Sequence[Tensor]) -> Tensor:
    """Normalised latents [B, C, …] of preprocessed pictures [1, 3, …] of one size.

    Raises:
        Refused: sizes differ.
    """
    sizes = {tuple(one.shape[1:]) for one in pictures}
    if len(sizes) > 1:
        said = ", ".join(sorted(f"{size[-1]}×{size[-2]}" for size in sizes))
        raise Refused(f"Pictures of one batch must have one size, but these have {said}. Draw them apart.")
    return encode(torch.cat(list(pictures)))


def references(named: Mapping[str, Tensor]) -> list[Tensor]:
    """The latents under `reference`, `reference_2`, …, in order."""
    found = []
    while (name := reference_name(len(found))) in named:
        found.append(named[name])
    return found


def encode_references(
    shown: Sequence[Pictures], prepare: Callable[[Image.Image], Tensor], encode: Encode
) -> dict[str, Tensor]:
    """The pictures of every prompt as `reference`, `reference_2`, …, from the pixels that `prepare` makes."""
    return {
        reference_name(number): encoded(encode, [prepare(one) for one in pictures])
        for number, pictures in enumerate(transpose_images(shown))
    }


def reference_name(place: int) -> str:
    """reference, reference_2, reference_3, …"""
    return "reference" if place == 0 else f"reference_{place + 1}"


def transpose_images(shown: Sequence[Pictures]) -> list[list[Image.Image]]:
    """The first pictures of all prompts, the second ones, …

    Raises:
        Refused: prompts that are shown different numbers of pictures.
    """
    if len({len(pictures) for pictures in shown}) > 1:
        raise Refused("Prompts of one batch must be shown equally many pictures. Draw them apart.")
    return [list(place) for place in zip(*shown, strict=True)]
