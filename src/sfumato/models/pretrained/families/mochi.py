"""Mochi: a rectified flow on clips that reads T5; it is told the share of signal and answers x_0 − x_T.

Source: Genmo 2024, Mochi 1 model card.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.models.lora.layer_names import ADDED, BLOCK, LayerNames, Rule, qkv, renamed
from sfumato.models.pretrained.family import Family

MOCHI: list[Rule] = [
    (qkv(f"{BLOCK}.attn1"), "blocks.#.attn.qkv_x"),
    (qkv(f"{BLOCK}.attn1", *ADDED), "blocks.#.attn.qkv_y"),
    ((f"{BLOCK}.attn1.to_out.0",), "blocks.#.attn.proj_x"),
    ((f"{BLOCK}.attn1.to_add_out",), "blocks.#.attn.proj_y"),
    *renamed({
        "ff.net.0.proj": "mlp_x.w1", "ff.net.2": "mlp_x.w2", "ff_context.net.0.proj": "mlp_y.w1",
        "ff_context.net.2": "mlp_y.w2", "norm1.linear": "mod_x", "norm1_context.linear": "mod_y",
        "norm1_context.linear_1": "mod_y",
    }, f"{BLOCK}.", "blocks.#."),
    *renamed({
        "patch_embed.proj": "x_embedder.proj", "time_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_embed.pooler.to_kv": "t5_y_embedder.to_kv", "time_embed.pooler.to_q": "t5_y_embedder.to_q",
        "time_embed.pooler.to_out": "t5_y_embedder.to_out", "time_embed.caption_proj": "t5_yproj",
        "norm_out.linear": "final_layer.mod", "proj_out": "final_layer.linear",
    }),
]  # fmt: skip
GATED = (f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff_context.net.0.proj")
"""Feed-forwards whose gate is the first half in the original code, the second in diffusers."""


class Mochi(Family):
    """Latents [B, 12, F, H, W]; the schedule is linear for its first half and quadratic for the other."""

    pipelines = ("MochiPipeline",)
    layer_names = LayerNames(tuple(MOCHI), "original", "", swapped=GATED)
    timestep_input = "thousandths of signal"
    sign = -1
    normalizes = ("factor", "channels")
    video, fps = True, 30.0
    weighted_tokens = (("tokenizer",),)
    prompt_outputs = ("tokens", "mask")

    def size(self, pipe: Any) -> tuple[int, int]:
        """The pipeline's own."""
        return pipe.default_height, pipe.default_width

    def sigmas(self, steps: int) -> list[float] | None:
        """As its makers walk; a single step is the whole way."""
        from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

        return [1.0] if steps == 1 else linear_quadratic_schedule(steps, 0.025)

    def read(self, pipe: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Tensor]:
        """As the pipeline reads one prompt: an empty one, where its config says so, is all padding."""
        rows = [super(Mochi, self).read(pipe, [prompt], options) for prompt in prompts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_0 − x_T [B, 12, F, H, W]."""
        return network(
            hidden_states=x,
            encoder_hidden_states=condition["tokens"],
            timestep=clock,
            encoder_attention_mask=condition["mask"],
            return_dict=False,
        )[0]
