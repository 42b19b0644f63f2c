"""HunyuanVideo: a rectified flow on clips that reads Llama and CLIP's summary, and hears its guidance.

Source: Kong et al. 2024, arXiv:2412.03603.
"""

from typing import Any

import torch
from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.models.lora.layer_names import ADDED, BLOCK, SINGLE, LayerNames, Rule, mlp, qkv
from sfumato.models.pretrained.family import ATTENTION
from sfumato.models.pretrained.guidance_embedding import GuidanceDistilled

HUNYUAN: list[Rule] = [
    (qkv(f"{BLOCK}.attn"), "double_blocks.#.img_attn_qkv"),
    (qkv(f"{BLOCK}.attn", *ADDED), "double_blocks.#.txt_attn_qkv"),
    ((f"{BLOCK}.attn.to_out.0",), "double_blocks.#.img_attn_proj"),
    ((f"{BLOCK}.attn.to_add_out",), "double_blocks.#.txt_attn_proj"),
    *mlp(f"{BLOCK}.ff", "double_blocks.#.img_mlp", "fc1", "fc2"),
    *mlp(f"{BLOCK}.ff_context", "double_blocks.#.txt_mlp", "fc1", "fc2"),
    ((*qkv(f"{SINGLE}.attn"), f"{SINGLE}.proj_mlp"), "single_blocks.#.linear1"),
    ((f"{SINGLE}.proj_out",), "single_blocks.#.linear2"),
]


class HunyuanVideo(GuidanceDistilled):
    """Latents [B, 16, F, H, W]; `guidance` [B] in the condition, by default 6, is told in thousandths.

    A negative is leaned away from only by `true_cfg_scale`.
    """

    pipelines = ("HunyuanVideoPipeline",)
    layer_names = LayerNames(tuple(HUNYUAN), "original", "original")
    timestep_input = "thousandths"
    video, fps = True, 15.0
    prompt_outputs = ("tokens", "pooled", "mask")
    usual_guidance = 6.0
    lora_targets = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def sigmas(self, steps: int) -> list[float] | None:
        """From 1 down to the last step before 0."""
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1].tolist()

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_T − x_0 [B, 16, F, H, W]."""
        return network(
            hidden_states=x,
            timestep=clock,
            encoder_hidden_states=condition["tokens"],
            encoder_attention_mask=condition["mask"].to(x.dtype),
            pooled_projections=condition["pooled"],
            guidance=1000 * self.guidance_values(x, condition).to(x)
            if self.has_guidance_embed(network)
            else None,
            return_dict=False,
        )[0]
