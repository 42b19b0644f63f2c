"""FLUX.1 dev and schnell: a rectified flow over 2×2 patches that reads CLIP's summary and T5.

Source: Black Forest Labs 2024; Labs et al. 2025, arXiv:2506.15742.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.models.condition import Condition
from sfumato.models.control.controlnet import ControlNetAdapter, Given
from sfumato.models.control.ip_adapter import IPAdapterLayout, Tensors, small_normal, summary_projection
from sfumato.models.lora.layer_names import (
    ADDED,
    BLOCK,
    DOUBLE_BLOCKS,
    SINGLE,
    LayerNames,
    Rule,
    qkv,
    renamed,
)
from sfumato.models.networks.tokens import patchify, position_ids, unpatchify
from sfumato.models.pretrained.family import ATTENTION, called_with
from sfumato.models.pretrained.guidance_embedding import GuidanceDistilled
from sfumato.models.pretrained.image_inputs import references

FLUX: list[Rule] = [
    *DOUBLE_BLOCKS,
    ((*qkv(f"{SINGLE}.attn"), f"{SINGLE}.proj_mlp"), "single_blocks.#.linear1"),
    ((f"{SINGLE}.proj_out",), "single_blocks.#.linear2"),
    ((f"{SINGLE}.norm.linear",), "single_blocks.#.modulation.lin"),
    *renamed({
        "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }),
    *[
        ((f"time_text_embed.{ours}.linear_{n}",), f"{theirs}.{layer}")
        for ours, theirs in (
            ("timestep_embedder", "time_in"), ("text_embedder", "vector_in"),
            ("guidance_embedder", "guidance_in"),
        )
        for n, layer in (("1", "in_layer"), ("2", "out_layer"))
    ],
]  # fmt: skip
OF_OTHERS: list[Rule] = [
    (qkv(f"{SINGLE}.attn"), "single_blocks.#.linear1_qkv"),
    (qkv(f"{BLOCK}.attn"), "blocks.#.attn.a_to_qkv"),
    (qkv(f"{BLOCK}.attn", *ADDED), "blocks.#.attn.b_to_qkv"),
    *renamed({
        "attn.to_out.0": "attn.a_to_out", "attn.to_add_out": "attn.b_to_out", "ff.net.0.proj": "ff_a.0",
        "ff.net.2": "ff_a.2", "ff_context.net.0.proj": "ff_b.0", "ff_context.net.2": "ff_b.2",
        "norm1.linear": "norm1_a.linear", "norm1_context.linear": "norm1_b.linear",
    }, f"{BLOCK}.", "blocks.#."),
    ((*qkv(f"{SINGLE}.attn"), f"{SINGLE}.proj_mlp"), "single_blocks.#.to_qkv_mlp"),
    *renamed({"proj_out": "proj_out", "norm.linear": "norm.linear"}, f"{SINGLE}.", "single_blocks.#."),
]  # fmt: skip
"""Names of XLabs (linear1_qkv, as ComfyUI says it) and of DiffSynth-Studio."""


class FluxControlNet(ControlNetAdapter):
    """Packed latents; residuals of double and single blocks."""

    network = "FluxTransformer2DModel"
    control = "FluxControlNetModel"
    encoding = "Flux"
    prompted_only = True
    shared_config = (
        "attention_head_dim", "num_attention_heads", "in_channels", "joint_attention_dim", "guidance_embeds",
        "pooled_projection_dim",
    )  # fmt: skip
    plain_config: ClassVar[Mapping[str, Any]] = {"num_mode": None, "conditioning_embedding_channels": None}

    def create(self, base: Any, layers: int, stride: int) -> nn.Module:
        """A fifth of the blocks of each kind unless said otherwise, as diffusers' script has it."""
        double, single = base.config["num_layers"], base.config["num_single_layers"]
        net = self.copy_of(base, layers or -(-double // 5), layers or -(-single // 5))
        for part in (net.controlnet_x_embedder,):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
        return net

    def residuals(
        self, net: Any, args: tuple[Any, ...], given: Given, control: Tensor, weight: float
    ) -> Given:
        """Residuals of both kinds of blocks."""
        names = (
            "hidden_states", "timestep", "pooled_projections", "encoder_hidden_states", "txt_ids", "img_ids"
        )  # fmt: skip
        shared = {name: given[name] for name in names}
        guidance = given.get("guidance") if net.config.guidance_embeds else None
        double, single = net(
            **shared,
            guidance=guidance,
            controlnet_cond=patchify(control),
            conditioning_scale=weight,
            return_dict=False,
        )
        found = {"controlnet_block_samples": double, "controlnet_single_block_samples": single}
        return {name: list(value) for name, value in found.items() if value is not None}


class FluxIPAdapter(IPAdapterLayout):
    """A few tokens beside those of the text, in every double block."""

    network = "FluxTransformer2DModel"

    def create(self, network: Any, width: int) -> dict[str, Tensors]:
        """A new adapter of FLUX's double blocks."""
        into, inner, tensors = network.config.joint_attention_dim, network.inner_dim, {}
        for place in range(network.config.num_layers):
            for which, weight in (("k", small_normal(inner, into)), ("v", torch.zeros(inner, into))):
                tensors[f"{place}.to_{which}_ip.weight"] = weight
                tensors[f"{place}.to_{which}_ip.bias"] = torch.zeros(inner)
        return {"image_proj": summary_projection(width, into), "ip_adapter": tensors}


class Flux(GuidanceDistilled):
    """dev was distilled to read its guidance (`guidance` [B] in the condition, by default 3.5)."""

    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline")
    layer_names = LayerNames(
        tuple(FLUX),
        "plain",
        "original",
        kohya_holds=r"(?!norm_out|proj_out).*",
        read_only=tuple(OF_OTHERS),
    )
    comfyui_loads_whole = True
    timestep_input = "share of noise"
    controlnet = FluxControlNet()
    ip_adapter = FluxIPAdapter()
    even_sigmas = True
    normalizes = ("factor", "shift")
    weighted_tokens = (("tokenizer_2",),)
    prompt_outputs = ("tokens", "pooled")
    prompt_only = ("prompt_2",)
    lora_targets = (
        *ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_T − x_0 [B, 16, H, W]."""
        height, width = x.shape[-2:]
        beside = references(condition)
        places = [position_ids(height // 2, width // 2, x.device)]
        for latents in beside:
            places.append(position_ids(latents.shape[-2] // 2, latents.shape[-1] // 2, x.device))
            places[-1][:, 0] = 1  # a reference stands behind the picture
        tokens = condition["tokens"]
        out = network(
            hidden_states=torch.cat([patchify(x), *(patchify(latents.to(x.dtype)) for latents in beside)], 1),
            timestep=clock,
            guidance=self.guidance_values(x, condition) if self.has_guidance_embed(network) else None,
            pooled_projections=condition["pooled"],
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(tokens.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=torch.cat(places).to(x.dtype),
            return_dict=False,
        )[0]
        return unpatchify(out[:, : height * width // 4], height, width)

    def info(self, pipe: Any) -> dict[str, Any]:
        """The pipeline's; schnell's four steps, which its pipeline leaves to the user."""
        known = super().info(pipe)
        quick = not pipe.transformer.config.guidance_embeds
        steps = 4 if quick else called_with(type(pipe))["num_inference_steps"]
        return known | {"steps": steps, "guidance": 1.0 if quick else known["guidance"]}
