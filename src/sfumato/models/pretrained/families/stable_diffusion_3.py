"""Stable Diffusion 3 and 3.5: a rectified flow that reads two CLIPs and T5.

Source: Esser et al. 2024, arXiv:2403.03206.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.models.lora.layer_names import ADDED, BLOCK, LayerNames, Rule, mlp, qkv
from sfumato.models.pretrained import schedulers
from sfumato.models.pretrained.family import ATTENTION, Family

SD3: list[Rule] = [
    (qkv(f"{BLOCK}.attn"), "joint_blocks.#.x_block.attn.qkv"),
    (qkv(f"{BLOCK}.attn2"), "joint_blocks.#.x_block.attn2.qkv"),
    (qkv(f"{BLOCK}.attn", *ADDED), "joint_blocks.#.context_block.attn.qkv"),
    ((f"{BLOCK}.attn.to_out.0",), "joint_blocks.#.x_block.attn.proj"),
    ((f"{BLOCK}.attn2.to_out.0",), "joint_blocks.#.x_block.attn2.proj"),
    ((f"{BLOCK}.attn.to_add_out",), "joint_blocks.#.context_block.attn.proj"),
    *mlp(f"{BLOCK}.ff", "joint_blocks.#.x_block.mlp", "fc1", "fc2"),
    *mlp(f"{BLOCK}.ff_context", "joint_blocks.#.context_block.mlp", "fc1", "fc2"),
]


class StableDiffusion3(Family):
    """Tokens are the CLIPs' (padded to T5's width) followed by T5's; padding is seen."""

    pipelines = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    layer_names = LayerNames(tuple(SD3), "plain", "original")
    comfyui_loads_whole = True
    timestep_input = "thousandths"
    normalizes = ("factor", "shift")
    prompt_outputs = ("tokens", "", "pooled")
    prompt_only = ("prompt_2", "prompt_3", "clip_skip")
    lora_targets = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def shift(self, config: Mapping[str, Any], tokens: int, steps: int) -> float:
        """By tokens where the scheduler asks (3.5 medium's largest shift is 1.16)."""
        return schedulers.shift_by_tokens(config, tokens, 1.16)

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_T − x_0 [B, 16, H, W]."""
        return network(
            hidden_states=x,
            timestep=clock,
            encoder_hidden_states=condition["tokens"],
            pooled_projections=condition["pooled"],
        ).sample
