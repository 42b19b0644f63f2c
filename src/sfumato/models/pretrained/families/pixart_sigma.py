"""PixArt-Σ: a small transformer on SDXL's latents that reads T5; it also answers a variance, left out here.

Source: Chen et al. 2024, arXiv:2403.04692.
"""

from typing import Any

from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.models.lora.layer_names import LayerNames
from sfumato.models.pretrained.family import Family


class PixArtSigma(Family):
    """Tokens with their mask; α, whose pipeline shares the network, is also told size and ratio."""

    pipelines = ("PixArtSigmaPipeline",)
    layer_names = LayerNames((), "plain", "")
    comfyui_loads_whole = True
    prompt_outputs = ("tokens", "mask")

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """ε [B, 4, H, W], without the variance."""
        out = network(
            x,
            encoder_hidden_states=condition["tokens"],
            encoder_attention_mask=condition["mask"].to(x.dtype),
            timestep=clock,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return out[:, : x.shape[1]]
