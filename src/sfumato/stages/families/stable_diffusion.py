"""Stable Diffusion 1.x and 2.x: a UNet that reads one CLIP; 2.x at 768 px answers with v instead of ε.

Source: Rombach et al. 2022, arXiv:2112.10752.
"""

from typing import Any

from torch import Tensor

from sfumato.stages.hearing import UNetThatMayHear
from sfumato.stages.inpainting import beside
from sfumato.stages.interface import Condition


class StableDiffusion(UNetThatMayHear):
    """Tokens [B, 77, D] of CLIP's last layer; steps are told as whole numbers."""

    pipelines = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
    )
    prompt_only = ("clip_skip",)

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """ε or v [B, 4, H, W]."""
        heard = self.beside_time(network, x, condition)
        return network(
            beside(network, x, condition),
            clock,
            encoder_hidden_states=condition["tokens"],
            timestep_cond=heard,
        ).sample
