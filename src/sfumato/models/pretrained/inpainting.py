"""UNets that repaint: beside the noisy latents they read where to repaint, and the latents of what is kept.

In the condition these are `hole` [B, 1, h, w], 1 where it is repainted, and `kept` [B, C, h, w], the picture
with grey in the hole, encoded. Without them such a network is asked to paint everything.
Source: the inpainting checkpoints of Rombach et al. 2022, arXiv:2112.10752.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.models.interface import Denoiser

HOLE, KEPT = "hole", "kept"


def repaints(denoiser: Denoiser) -> bool:
    """Whether this is such a network: a UNet that reads 2·C + 1 channels and answers with C."""
    network: Any = denoiser.backbone
    if type(network).__name__ != "UNet2DConditionModel":
        return False
    return network.config.in_channels == 2 * network.config.out_channels + 1


def beside(network: Any, x: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    """What a UNet reads: x [B, C, h, w] itself, or with the hole and what is kept where it repaints."""
    if network.config.in_channels == x.shape[1]:
        return x
    if HOLE not in condition:
        return torch.cat([x, torch.ones_like(x[:, :1]), torch.zeros_like(x)], dim=1)
    return torch.cat([x, condition[HOLE].to(x), condition[KEPT].to(x)], dim=1)


def opening(pixels: Tensor) -> Tensor:
    """Masks as pixels [B, 3, H, W] in [-1, 1] → [B, 1, H, W], 1 where they are white."""
    return ((pixels.mean(1, keepdim=True) + 1) / 2 >= 0.5).to(pixels.dtype)


def hole_of(cover: Tensor, height: int, width: int) -> Tensor:
    """The opening [B, 1, H, W] for latents of these sides, as diffusers' pipelines have it."""
    return F.interpolate(cover, size=(height, width))
