"""Qwen-Image: a rectified flow over 2×2 patches that reads Qwen2.5-VL; latents are clips of one frame.

Source: Wu et al. 2025, arXiv:2508.02324.
"""

from typing import Any

import torch
from torch import Tensor

from sfumato.stages.family import Family, normed_like
from sfumato.stages.interface import Condition
from sfumato.stages.packing import patches, unpatched
from sfumato.stages.seeing import references


class QwenImage(Family):
    """Latents [B, 16, 1, H, W]; the pipeline leans only away from a negative that is given."""

    pipelines = ("QwenImagePipeline",)
    clock = "share of noise"
    even_sigmas = True
    normalises = ("factor", "channels")
    guidance = "true_cfg_scale"
    answers = ("tokens", "mask")

    def leans(self, network: Any, guidance: float, asked: bool) -> bool:
        """Only where a negative is given."""
        return asked and guidance > 1

    def lean(self, strong: Tensor, weak: Tensor, guidance: float) -> Tensor:
        """Each token keeps the prompted answer's norm."""
        height, width = strong.shape[-2:]
        tokens = patches(strong.squeeze(2))
        guided = patches(super().lean(strong, weak, guidance).squeeze(2))
        return unpatched(normed_like(guided, tokens), height, width).unsqueeze(2)

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_T − x_0 [B, 16, 1, H, W]."""
        height, width = x.shape[-2:]
        mask, beside = condition.get("mask"), references(condition)
        shapes = [(1, one.shape[-2] // 2, one.shape[-1] // 2) for one in (x, *beside)]
        out = network(
            hidden_states=torch.cat([patches(one.squeeze(2).to(x.dtype)) for one in (x, *beside)], 1),
            timestep=clock,
            encoder_hidden_states=condition["tokens"],
            encoder_hidden_states_mask=None if mask is None or bool(mask.all()) else mask.long(),
            img_shapes=[shapes] * len(x),
        ).sample
        return unpatched(out[:, : height * width // 4], height, width).unsqueeze(2)
