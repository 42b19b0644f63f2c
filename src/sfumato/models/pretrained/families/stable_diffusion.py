"""Stable Diffusion 1.x and 2.x: a UNet that reads one CLIP; 2.x at 768 px answers with v instead of ε.

Source: Rombach et al. 2022, arXiv:2112.10752.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sfumato.errors import Refused
from sfumato.models.condition import Condition
from sfumato.models.lora.layer_names import LayerNames
from sfumato.models.lora.unet_names import UNET_BLOCKS, unet_names
from sfumato.models.pretrained.guidance_embedding import UNetFamily
from sfumato.models.pretrained.inpainting import beside


class StableDiffusion(UNetFamily):
    """Tokens [B, 77, D] of CLIP's last layer; steps are ids as whole numbers."""

    pipelines = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
    )
    layer_names = LayerNames((), "kohya", "plain", kohya_holds=UNET_BLOCKS, of_network=unet_names)
    comfyui_loads_whole = True
    weighted_tokens = (("tokenizer",),)
    prompt_only = ("clip_skip",)

    def read(self, pipe: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Tensor]:
        """As the pipeline does.

        Raises:
            Refused: clip_skip where the installed diffusers and transformers cannot do it together.
        """
        if options.get("clip_skip") and not hasattr(pipe.text_encoder, "text_model"):
            raise Refused(
                "clip_skip: diffusers looks for a part of CLIP that the installed transformers has no more. "
                "Leave it out, or install transformers below 5.6."
            )
        return super().read(pipe, prompts, options)

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """ε or v [B, 4, H, W]."""
        guidance = self.timestep_cond(network, x, condition)
        return network(
            beside(network, x, condition),
            clock,
            encoder_hidden_states=condition["tokens"],
            timestep_cond=guidance,
        ).sample
