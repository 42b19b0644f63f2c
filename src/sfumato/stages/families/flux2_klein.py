"""FLUX.2 klein: a rectified flow on patchified latents that reads three layers of Qwen3.

Source: Black Forest Labs 2025, FLUX.2 model card.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.stages.family import Family
from sfumato.stages.interface import Condition


class Flux2Klein(Family):
    """Latents are the autoencoder's, 2×2 in channels, normalised by its batch norm: [B, 128, H, W]."""

    pipelines = ("Flux2KleinPipeline",)
    clock = "share of noise"
    even_sigmas = True
    patch = 1
    gather = 2
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")

    def statistics(self, vae: Any) -> tuple[Tensor, Tensor]:
        """The running statistics of the autoencoder's last batch norm."""
        deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        return vae.bn.running_mean.clone().view(-1, 1, 1), deviation.view(-1, 1, 1)

    def shift(self, config: Mapping[str, Any], tokens: int, steps: int) -> float:
        """Fitted by its makers to tokens and steps."""
        from diffusers.pipelines.flux2 import pipeline_flux2_klein

        return pipeline_flux2_klein.compute_empirical_mu(image_seq_len=tokens, num_steps=steps)

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_T − x_0 [B, 128, H, W]."""
        height, width = x.shape[-2:]
        tokens = condition["tokens"]
        one = torch.arange(1, device=x.device)
        axes = [torch.arange(side, device=x.device) for side in (height, width, tokens.shape[1])]
        out = network(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=clock,
            guidance=None,
            encoder_hidden_states=tokens,
            txt_ids=torch.cartesian_prod(one, one, one, axes[2]).expand(len(x), -1, -1),
            img_ids=torch.cartesian_prod(one, axes[0], axes[1], one).expand(len(x), -1, -1),
        ).sample
        return out.transpose(1, 2).unflatten(2, (height, width))

    def info(self, pipe: Any) -> dict[str, Any]:
        """The pipeline's; distilled ones take four steps and no guidance."""
        known = super().info(pipe)
        return known | ({"steps": 4, "guidance": 1.0} if pipe.config.is_distilled else {})
