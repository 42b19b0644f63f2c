"""PixArt-Σ: a small transformer on SDXL's latents that reads T5; it also answers a variance, left out here.

Source: Chen et al. 2024, arXiv:2403.04692.
"""

from typing import Any

from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.models.lora.layer_names import BLOCK, LayerNames, Rule, qkv, renamed
from sfumato.models.pretrained.family import Family

PIXART: list[Rule] = [
    (qkv(f"{BLOCK}.attn1"), "blocks.#.attn.qkv"),
    (qkv(f"{BLOCK}.attn2", "to_k", "to_v"), "blocks.#.cross_attn.kv_linear"),
    *renamed({
        "attn1.to_out.0": "attn.proj", "attn2.to_q": "cross_attn.q_linear", 
        "attn2.to_out.0": "cross_attn.proj",
        "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2",
    }, f"{BLOCK}.", "blocks.#."),
    *renamed({
        "pos_embed.proj": "x_embedder.proj", "adaln_single.linear": "t_block.1", 
        "proj_out": "final_layer.linear",
        "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    }),
]  # fmt: skip


class PixArtSigma(Family):
    """Tokens with their mask; α, whose pipeline shares the network, is also told size and ratio."""

    pipelines = ("PixArtSigmaPipeline",)
    layer_names = LayerNames(tuple(PIXART), "plain", "")
    comfyui_loads_whole = True
    weighted_tokens = (("tokenizer",),)
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
