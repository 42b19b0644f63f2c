"""HunyuanVideo: a rectified flow on clips that reads Llama and CLIP's summary, and hears its guidance.

Source: Kong et al. 2024, arXiv:2412.03603.
"""

from typing import Any

import torch
from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.models.lora.layer_names import (
    ADDED,
    BLOCK,
    DOUBLE_BLOCKS,
    SINGLE,
    LayerNames,
    Rule,
    mlp,
    qkv,
    renamed,
)
from sfumato.models.pretrained.family import ATTENTION
from sfumato.models.pretrained.guidance_embedding import GuidanceDistilled

REFINER = "context_embedder.token_refiner.refiner_blocks.#"
REFINED = "txt_in.individual_token_refiner.blocks.#"
HUNYUAN: list[Rule] = [
    (qkv(f"{BLOCK}.attn"), "double_blocks.#.img_attn_qkv"),
    (qkv(f"{BLOCK}.attn", *ADDED), "double_blocks.#.txt_attn_qkv"),
    ((f"{BLOCK}.attn.to_out.0",), "double_blocks.#.img_attn_proj"),
    ((f"{BLOCK}.attn.to_add_out",), "double_blocks.#.txt_attn_proj"),
    *mlp(f"{BLOCK}.ff", "double_blocks.#.img_mlp", "fc1", "fc2"),
    *mlp(f"{BLOCK}.ff_context", "double_blocks.#.txt_mlp", "fc1", "fc2"),
    ((*qkv(f"{SINGLE}.attn"), f"{SINGLE}.proj_mlp"), "single_blocks.#.linear1"),
    ((f"{SINGLE}.proj_out",), "single_blocks.#.linear2"),
    ((f"{BLOCK}.norm1.linear",), "double_blocks.#.img_mod.linear"),
    ((f"{BLOCK}.norm1_context.linear",), "double_blocks.#.txt_mod.linear"),
    ((f"{SINGLE}.norm.linear",), "single_blocks.#.modulation.linear"),
    (qkv(f"{REFINER}.attn"), f"{REFINED}.self_attn.qkv"),
    *renamed({
        "attn.to_out.0": "self_attn.proj", "ff.net.0.proj": "mlp.0", "ff.net.2": "mlp.2",
        "norm_out.linear": "adaLN_modulation.1", "norm1": "norm1", "norm2": "norm2",
    }, f"{REFINER}.", f"{REFINED}."),
    *renamed({
        "proj_in": "input_embedder", "time_text_embed.timestep_embedder.linear_1": "t_embedder.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.out_layer",
        "time_text_embed.text_embedder.linear_1": "c_embedder.in_layer",
        "time_text_embed.text_embedder.linear_2": "c_embedder.out_layer",
    }, "context_embedder.", "txt_in."),
    *renamed({
        "x_embedder.proj": "img_in.proj", "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "norm_out.linear": "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear",
    }),
]  # fmt: skip
"""Blocks as the makers call them, what is outside as ComfyUI does; it reads both."""
OF_MAKERS: list[Rule] = [
    (qkv(f"{REFINER}.attn"), f"{REFINED}.self_attn_qkv"),
    *renamed({
        "attn.to_out.0": "self_attn_proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2",
    }, f"{REFINER}.", f"{REFINED}."),
    *renamed({
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "c_embedder.linear_1",
        "time_text_embed.text_embedder.linear_2": "c_embedder.linear_2",
    }, "context_embedder.", "txt_in."),
    *renamed({
        "timestep_embedder.linear_1": "time_in.mlp.0", "timestep_embedder.linear_2": "time_in.mlp.2",
        "guidance_embedder.linear_1": "guidance_in.mlp.0", "guidance_embedder.linear_2": "guidance_in.mlp.2",
    }, "time_text_embed."),
]  # fmt: skip
OF_COMFYUI: list[Rule] = [
    *DOUBLE_BLOCKS,
    ((f"{SINGLE}.norm.linear",), "single_blocks.#.modulation.lin"),
]


class HunyuanVideo(GuidanceDistilled):
    """Latents [B, 16, F, H, W]; `guidance` [B] in the condition, by default 6, is told in thousandths.

    A negative is leaned away from only by `true_cfg_scale`.
    """

    pipelines = ("HunyuanVideoPipeline",)
    layer_names = LayerNames(
        tuple(HUNYUAN),
        "original",
        "original",
        kohya_holds=r"(single_)?transformer_blocks\..*",
        read_only=(*OF_MAKERS, *OF_COMFYUI),
    )
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
