"""LTX-Video: a rectified flow on strongly compressed clips that reads T5.

Source: HaCohen et al. 2024, arXiv:2501.00103.
"""

from typing import Any

from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.models.lora.layer_names import BLOCK, LayerNames, Rule, renamed, same
from sfumato.models.pretrained.family import Family

LTX: list[Rule] = [
    *same(
        *(
            f"{BLOCK}.{attn}.{name}"
            for attn in ("attn1", "attn2")
            for name in ("to_q", "to_k", "to_v", "to_out.0")
        ),
        f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff.net.2", "caption_projection.linear_1",
        "caption_projection.linear_2", "proj_out",
    ),
    *renamed({
        "proj_in": "patchify_proj", "time_embed.linear": "adaln_single.linear",
        "time_embed.emb.timestep_embedder.linear_1": "adaln_single.emb.timestep_embedder.linear_1",
        "time_embed.emb.timestep_embedder.linear_2": "adaln_single.emb.timestep_embedder.linear_2",
    }),
]  # fmt: skip


class LTXVideo(Family):
    """Latents [B, 128, F, H, W], one token each; places are told in seconds (25 pictures each) and pixels."""

    pipelines = ("LTXPipeline",)
    layer_names = LayerNames(tuple(LTX), "original", "")
    no_context_parallel = "diffusers gives its attention a mask for all heads, of which each process has some"
    timestep_input = "thousandths"
    even_sigmas = True
    normalizes = ("factor", "channels")
    patch = 1
    video = True
    weighted_tokens = (("tokenizer",),)
    prompt_outputs = ("tokens", "mask")
    per_second, stride, time_stride = 25, 32, 8

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_T − x_0 [B, 128, F, H, W]."""
        frames, height, width = x.shape[-3:]
        out = network(
            hidden_states=x.flatten(2).transpose(1, 2),
            encoder_hidden_states=condition["tokens"],
            timestep=clock,
            encoder_attention_mask=condition["mask"].to(x.dtype),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self.time_stride / self.per_second, self.stride, self.stride),
            return_dict=False,
        )[0]
        return out.transpose(1, 2).unflatten(2, (frames, height, width))
