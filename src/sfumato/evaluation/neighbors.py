"""A picture of a trained prompt should look most like the training picture of that prompt.

Likeness is the distance between pixels averaged 2×2: simple, the same for every model, and easily
checked by eye. A neighbor counts as right if one of its captions says what the prompt says. Beside every
such number stands what pure chance gives, from how often each caption occurs.
"""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST = 4
"""Captions that say different things, below which a share of right ones says little."""


def downsample_2x2(pictures: Tensor) -> Tensor:
    """Pictures [B, 3, H, W], uint8 or in [-1, 1] → their 2×2 averages in [-1, 1], flat: [B, 3·H/2·W/2]."""
    pixels = pictures.float() / 127.5 - 1 if pictures.dtype == torch.uint8 else pictures.float()
    return F.avg_pool2d(pixels, 2).flatten(1)


class Neighbors:
    """A set of captioned pictures to be found again.

    Args:
        pictures: [N, 3, H, W], uint8 or in [-1, 1].
        captions: of each picture, all of its own.
        namesakes: a caption with the prompt's last word is right too ("red apple" and "green apple" are both
            apples): for sets where that word is the thing's name, and for captions that were never trained.
    """

    def __init__(self, pictures: Tensor, captions: Sequence[Sequence[str]], namesakes: bool = False) -> None:
        self.points = downsample_2x2(pictures)
        self.squares = self.points.square().sum(1)
        self.captions = [tuple(words) for words in captions]
        self.namesakes = namesakes

    @property
    def how(self) -> str:
        """How likeness is judged, in words."""
        right = "the same caption or the same last word" if self.namesakes else "the same caption"
        return f"nearest of {len(self.points):,} training pictures, pixels averaged 2×2; right: {right}"

    def nearest(self, pictures: Tensor) -> list[int]:
        """Which of the set's pictures each of these [B, 3, H, W] is most like."""
        asked = downsample_2x2(pictures)
        return [int(index) for index in (self.squares - 2 * asked @ self.points.T).argmin(1)]

    def judge(self, pictures: Tensor, prompts: Sequence[str]) -> list[bool]:
        """Whether each picture's nearest neighbor is what its prompt asks for."""
        found = self.nearest(pictures)
        return [
            is_right(prompt, self.captions[index], self.namesakes)
            for prompt, index in zip(prompts, found, strict=True)
        ]

    def chance(self, prompts: Sequence[str]) -> float:
        """The share that is right where a picture's neighbor has nothing to do with its prompt."""
        shared: Counter[tuple[str, ...]] = Counter()
        for texts in self.captions:  # each counts once for what any of its captions is right for
            shared.update({self._asked(text) for text in texts} - {()})
        return sum(shared[self._asked(prompt)] for prompt in prompts) / (len(prompts) * len(self.captions))

    def _asked(self, text: str) -> tuple[str, ...]:
        """What of a text must be the same: all its words, or the last one."""
        words = _words(text)
        return tuple(words[-1:] if self.namesakes else words)

    @property
    def can_tell(self) -> bool:
        """Whether the captions say enough different things for the share of right ones to mean something."""
        return len({tuple(_words(text)) for texts in self.captions for text in texts[:1]}) >= FEWEST


def is_right(prompt: str, captions: Sequence[str], namesakes: bool = False) -> bool:
    """Whether one of the captions says what the prompt says, or with `namesakes` ends with its last word."""
    wanted = _words(prompt)
    if not wanted:
        return False
    return any(
        words == wanted or (namesakes and words[-1:] == wanted[-1:]) for words in map(_words, captions)
    )


def _words(text: str) -> list[str]:
    kept = "".join(letter if letter.isalnum() else " " for letter in text.casefold())
    return kept.split()
