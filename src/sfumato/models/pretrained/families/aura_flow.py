"""AuraFlow: a rectified flow on SDXL's latents that reads UMT5, whose padding it sees.

Source: Fal 2024; Esser et al. 2024, arXiv:2403.03206.
"""

from typing import Any

from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.models.lora.layer_names import LayerNames, Rule, renamed
from sfumato.models.pretrained.family import Family

BOTH = {"linear_1": "c_fc1", "linear_2": "c_fc2", "out_projection": "c_proj"}
JOINT, ALONE = "joint_transformer_blocks.#.", "single_transformer_blocks.#."
AURA_FLOW: list[Rule] = [
    *renamed({
        "attn.to_q": "attn.w2q", "attn.to_k": "attn.w2k", "attn.to_v": "attn.w2v",
        "attn.to_out.0": "attn.w2o",
        "attn.add_q_proj": "attn.w1q", "attn.add_k_proj": "attn.w1k", "attn.add_v_proj": "attn.w1v",
        "attn.to_add_out": "attn.w1o", "norm1.linear": "modX.1", "norm1_context.linear": "modC.1",
    }, JOINT, "double_layers.#."),
    *renamed(BOTH, f"{JOINT}ff.", "double_layers.#.mlpX."),
    *renamed(BOTH, f"{JOINT}ff_context.", "double_layers.#.mlpC."),
    *renamed({
        "attn.to_q": "attn.w1q", "attn.to_k": "attn.w1k", "attn.to_v": "attn.w1v",
        "attn.to_out.0": "attn.w1o",
        "norm1.linear": "modCX.1",
    }, ALONE, "single_layers.#."),
    *renamed(BOTH, f"{ALONE}ff.", "single_layers.#.mlp."),
    *renamed({
        "time_step_proj.linear_1": "t_embedder.mlp.0", "time_step_proj.linear_2": "t_embedder.mlp.2",
        "context_embedder": "cond_seq_linear", "pos_embed.proj": "init_x_linear", "proj_out": "final_linear",
        "norm_out.linear": "modF.1",
    }),
]  # fmt: skip


class AuraFlow(Family):
    """Tokens of a fixed length, zero where there are no words."""

    weighted_tokens = (("tokenizer",),)
    pipelines = ("AuraFlowPipeline",)
    layer_names = LayerNames(tuple(AURA_FLOW), "plain", "")
    comfyui_loads_whole = True
    timestep_input = "share of noise"

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_T − x_0 [B, 4, H, W]."""
        return network(x, encoder_hidden_states=condition["tokens"], timestep=clock).sample
