"""Regions: in parts of the picture other prompts are drawn.

Each prompt is asked about the whole picture, and the answers are blended by where they belong: at one x_t and
one time every theory's answers add up as its clean samples do. So this works for every family, and what
grows across a border still fits together. (MultiDiffusion, Bar-Tal et al. 2023, arXiv:2302.08113.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import Refused
from sfumato.generation.image_guidance import fit_image
from sfumato.models.pretrained.image_inputs import mask_picture

Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Regions:
    """Prompts, and how much of each latent is theirs.

    shares [R + 1, 1, …, h, w]: of the picture's own prompt, then of each region's; they add up to 1.
    """

    prompts: tuple[str, ...] = ()
    shares: Tensor | None = None

    def __bool__(self) -> bool:
        return bool(self.prompts)

    def blended(self, answers: Sequence[Denoise]) -> Denoise:
        """One denoiser of the picture's own and the regions', in order."""
        assert self.shares is not None
        shares = self.shares

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            parts = [share.to(x_t) * ask(x_t, t) for share, ask in zip(shares, answers, strict=True)]
            return torch.stack(parts).sum(0)

        return denoise


def parse_regions(options: dict[str, Any], shape: Sequence[int], size: tuple[int, int]) -> Regions:
    """The regions in `generate`'s options, which lose them: [(mask, prompt), …], white where the prompt acts.

    Where masks overlap they share; where none is, the picture's own prompt acts.

    Args:
        shape: [C, (F,) h, w] of the latents; size: (width, height) in pixels.
    Raises:
        Refused: no pairs, or a mask that is black all over.
    """
    said = options.pop("regions", None)
    if not said:
        return Regions()
    if not all(isinstance(one, list | tuple) and len(one) == 2 and isinstance(one[1], str) for one in said):
        raise Refused('regions must be pairs of a mask and a prompt: [("left.png", "a red apple"), …].')
    masks = torch.stack([fit_image(mask_picture(mask), *size).mean(0, keepdim=True) for mask, _ in said])
    masks = F.adaptive_avg_pool2d((masks + 1) / 2, (shape[-2], shape[-1]))
    for share, (_, prompt) in zip(masks, said, strict=True):
        if not bool(share.any()):
            raise Refused(f'The mask of the region "{prompt}" is black all over: white is where it acts.')
    masks = masks / masks.sum(0, keepdim=True).clamp(min=1)
    shares = torch.cat([1 - masks.sum(0, keepdim=True), masks])
    shares = shares.unsqueeze(2) if len(shape) == 4 else shares
    return Regions(tuple(prompt for _, prompt in said), shares)
