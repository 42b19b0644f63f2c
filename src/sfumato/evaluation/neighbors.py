"""A picture of a trained prompt should look most like the training picture of that prompt.

Likeness is the distance between pixels averaged 2×2: simple, the same for every model, and easily
checked by eye. A neighbour counts as right if its caption is the prompt or shares its last word
("red apple" and "green apple" are both apples).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

HOW = (
    "nearest neighbour among {count:,} training pictures, pixels averaged 2×2, same caption or same last word"
)


def downsample_2x2(pictures: Tensor) -> Tensor:
    """Pictures [B, 3, H, W], uint8 or in [-1, 1] → their 2×2 averages in [-1, 1], flat: [B, 3·H/2·W/2]."""
    pixels = pictures.float() / 127.5 - 1 if pictures.dtype == torch.uint8 else pictures.float()
    return F.avg_pool2d(pixels, 2).flatten(1)


class Neighbors:
    """A set of captioned pictures to be found again.

    Args:
        pictures: [N, 3, H, W], uint8 or in [-1, 1].
        captions: of each picture, all of its own.
    """

    def __init__(self, pictures: Tensor, captions: Sequence[Sequence[str]]) -> None:
        self.points = downsample_2x2(pictures)
        self.squares = self.points.square().sum(1)
        self.captions = [tuple(words) for words in captions]

    @property
    def how(self) -> str:
        """How likeness is judged, in words."""
        return HOW.format(count=len(self.points))

    def nearest(self, pictures: Tensor) -> list[int]:
        """Which of the set's pictures each of these [B, 3, H, W] is most like."""
        asked = downsample_2x2(pictures)
        return [int(index) for index in (self.squares - 2 * asked @ self.points.T).argmin(1)]

    def judge(self, pictures: Tensor, prompts: Sequence[str]) -> list[bool]:
        """Whether each picture's nearest neighbour is what its prompt asks for."""
        found = self.nearest(pictures)
        return [is_right(prompt, self.captions[index]) for prompt, index in zip(prompts, found, strict=True)]


def is_right(prompt: str, captions: Sequence[str]) -> bool:
    """Whether one of the captions is the prompt or ends with its last word."""
    wanted = _words(prompt)
    if not wanted:
        return False
    return any(words == wanted or words[-1:] == wanted[-1:] for words in map(_words, captions))


def _words(text: str) -> list[str]:
    kept = "".join(letter if letter.isalnum() else " " for letter in text.casefold())
    return kept.split()
