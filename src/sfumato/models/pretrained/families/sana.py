"""Sana: a linear-attention transformer on latents of a deep autoencoder that reads Gemma 2.

Source: Xie et al. 2024, arXiv:2410.10629.
"""

from typing import Any

from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.models.pretrained.family import Family


class Sana(Family):
    """The instruction that enhances a prompt is written before prompts, not before negatives."""

    pipelines = ("SanaPipeline",)
    timestep_input = "thousandths"
    patch = 1
    prompt_outputs = ("tokens", "mask")
    prompt_only = ("complex_human_instruction",)
    lora_targets = ("to_q", "to_k", "to_v")

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_T − x_0 [B, 32, H, W], without a variance where there is one."""
        out = network(
            x,
            encoder_hidden_states=condition["tokens"],
            encoder_attention_mask=condition["mask"].to(x.dtype),
            timestep=clock * network.config.timestep_scale,
        ).sample
        return out[:, : x.shape[1]]
