"""Wan 2.1 and 2.2: a rectified flow on clips that reads UMT5.

2.2 A14B holds two networks, one for much noise and one for little; 2.2 5B is told the time of every token.
Source: Wan Team 2025, arXiv:2503.20314.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.models.condition import Condition
from sfumato.models.guidance_policy import GuidancePolicy, PipelineGuidance
from sfumato.models.lora.layer_names import LayerNames, Rule, mlp, renamed, same
from sfumato.models.pretrained.family import Family

WAN: list[Rule] = [
    *[
        ((f"blocks.#.{ours}.{mine}",), f"blocks.#.{theirs}.{name}")
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for mine, name in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
    ],
    (("blocks.#.attn2.add_k_proj",), "blocks.#.cross_attn.k_img"),
    (("blocks.#.attn2.add_v_proj",), "blocks.#.cross_attn.v_img"),
    *mlp("blocks.#.ffn", "blocks.#.ffn"),
    *[
        ((f"blocks.#.{ours}.{norm}",), f"blocks.#.{theirs}.{norm}")
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for norm in ("norm_q", "norm_k")
    ],
    (("blocks.#.attn2.norm_added_k",), "blocks.#.cross_attn.norm_k_img"),
    (("blocks.#.norm2",), "blocks.#.norm3"),
    (("condition_embedder.time_embedder.linear_1",), "time_embedding.0"),
    (("condition_embedder.time_embedder.linear_2",), "time_embedding.2"),
    (("condition_embedder.time_proj",), "time_projection.1"),
    (("condition_embedder.text_embedder.linear_1",), "text_embedding.0"),
    (("condition_embedder.text_embedder.linear_2",), "text_embedding.2"),
    (("proj_out",), "head.head"),
    *same("patch_embedding"),
    *renamed({
        "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
        "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
        "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    }),
]  # fmt: skip


class Experts(nn.Module):
    """Two networks of one kind: `noisy` answers from `border` on (in thousandths), `clean` below."""

    def __init__(self, noisy: nn.Module, clean: nn.Module, border: float):
        super().__init__()
        self.noisy, self.clean, self.border = noisy, clean, border
        self.config: Any = noisy.config

    def forward(self, timestep: Tensor, return_dict: bool = False, **given: Tensor) -> tuple[Tensor]:
        """Each sample is answered by the network of its time."""
        loud, parts = timestep >= self.border, []
        for network, rows in ((self.noisy, loud), (self.clean, ~loud)):
            if bool(rows.any()):
                some = {name: tensor[rows] for name, tensor in given.items()}
                parts.append((rows, network(timestep=timestep[rows], return_dict=False, **some)[0]))
        out = parts[0][1].new_empty(len(timestep), *parts[0][1].shape[1:])
        for rows, part in parts:
            out[rows] = part
        return (out,)


@dataclass(frozen=True)
class WanGuidance(PipelineGuidance):
    """`guidance_scale_2` is the quiet expert's scale, below the time `border` (in thousandths)."""

    border: float | None = None

    def guidance_at(self, scale: float, t: float, options: Mapping[str, Any]) -> float:
        """`guidance_scale_2` where it is given and the quiet expert answers."""
        quiet = self.border is not None and 1000 * t < self.border
        return float(options["guidance_scale_2"]) if quiet and options["guidance_scale_2"] else scale


class Wan(Family):
    """Latents [B, 16, F, H, W]; tokens of a fixed length, zero after the words."""

    weighted_tokens = (("tokenizer",),)
    pipelines = ("WanPipeline",)
    layer_names = LayerNames(tuple(WAN), "original", "original", kohya_holds=r"blocks\..*")
    timestep_input = "thousandths"
    normalizes = ("factor", "channels")
    video, fps = True, 16.0

    def get_denoiser(self, pipe: Any) -> nn.Module:
        """Both networks where there are two; the one there is otherwise."""
        border = pipe.config.boundary_ratio
        if border is not None and pipe.transformer is not None and pipe.transformer_2 is not None:
            count = pipe.scheduler.config.num_train_timesteps
            return Experts(pipe.transformer, pipe.transformer_2, border * count)
        network: Any = pipe.transformer if pipe.transformer is not None else pipe.transformer_2
        network.register_to_config(expand_timesteps=bool(pipe.config.expand_timesteps))
        return network

    def set_denoiser(self, pipe: Any, network: nn.Module) -> None:
        """One network, or both."""
        if isinstance(network, Experts):
            pipe.register_modules(transformer=network.noisy, transformer_2=network.clean)
        else:
            name = "transformer" if pipe.transformer is not None else "transformer_2"
            pipe.register_modules(**{name: network})

    def guidance_policy(self, network: Any) -> GuidancePolicy:
        """With two experts, each may have a scale of its own."""
        border = network.border if isinstance(network, Experts) else None
        return WanGuidance(options={"guidance_scale_2": None}, has_own_form=True, border=border)

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_T − x_0 [B, 16, F, H, W]."""
        given = {"hidden_states": x, "encoder_hidden_states": condition["tokens"]}
        if "vision" in condition:
            given["encoder_hidden_states_image"] = condition["vision"].flatten(0, 1)
        if "known" in condition:
            given["hidden_states"] = torch.cat([x, condition["known"].to(x.dtype)], 1)
        if network.config.get("expand_timesteps") and not isinstance(network, Experts):
            asked = torch.ones_like(x[:, :1])
            if "first" in condition:
                given["hidden_states"] = self.finalize_latents(network, x, condition)
                asked[:, :, 0] = 0
            clock = (asked[:, 0, :, ::2, ::2] * clock.view(-1, 1, 1, 1)).flatten(1)
        return network(timestep=clock, return_dict=False, **given)[0]

    def finalize_latents(self, network: Any, x: Tensor, condition: Condition) -> Tensor:
        """A first frame that is given stays as it is."""
        if "first" not in condition:
            return x
        return torch.cat([condition["first"].to(x), x[:, :, 1:]], 2)
