"""Stable Diffusion 3 and 3.5: a rectified flow that reads two CLIPs and T5.

Source: Esser et al. 2024, arXiv:2403.03206.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.models.condition import Condition
from sfumato.models.control.controlnet import ControlNetAdapter, Given
from sfumato.models.control.ip_adapter import WHOLE, IPAdapterLayout, Tensors
from sfumato.models.interface import Model
from sfumato.models.lora.layer_names import ADDED, BLOCK, LayerNames, Rule, mlp, qkv, renamed, same
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
    ((f"{BLOCK}.norm1.linear",), "joint_blocks.#.x_block.adaLN_modulation.1"),
    ((f"{BLOCK}.norm1_context.linear",), "joint_blocks.#.context_block.adaLN_modulation.1"),
    *same("context_embedder"),
    *renamed({
        "pos_embed.proj": "x_embedder.proj", "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "norm_out.linear": "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear",
    }),
]  # fmt: skip


class StableDiffusion3ControlNet(ControlNetAdapter):
    """Latents beside the noise's; by InstantX's convention (the default) without summary and shift."""

    network = "SD3Transformer2DModel"
    control = "SD3ControlNetModel"
    encoding = "SD3"
    shared_config = (
        "attention_head_dim",
        "num_attention_heads",
        "in_channels",
        "patch_size",
        "pooled_projection_dim",
    )
    plain_config: ClassVar[Mapping[str, Any]] = {"extra_conditioning_channels": 0}

    def create(self, base: Any, layers: int, stride: int) -> nn.Module:
        """Half the blocks unless said otherwise."""
        return self.copy_of(base, layers or -(-base.config["num_layers"] // 2))

    def residuals(
        self, net: Any, args: tuple[Any, ...], given: Given, control: Tensor, weight: float
    ) -> Given:
        """Residuals of the blocks."""
        pooled, tokens = given["pooled_projections"], given["encoder_hidden_states"]
        blocks = net(
            hidden_states=given["hidden_states"],
            timestep=given["timestep"],
            controlnet_cond=control,
            encoder_hidden_states=None if net.config.joint_attention_dim is None else tokens,
            pooled_projections=torch.zeros_like(pooled) if self.ignores_pooled(net) else pooled,
            conditioning_scale=weight,
            return_dict=False,
        )[0]
        return {"block_controlnet_hidden_states": list(blocks)}

    def ignores_pooled(self, net: Any) -> bool:
        """Whether it reads no pooled embedding."""
        return bool(net.config.force_zeros_for_pooled_projection)

    def encode(self, net: Any, model: Model, pixels: Tensor) -> Tensor:
        """Without the shift for one that reads no pooled embedding."""
        latents, codec = model.encode(pixels), model.codec
        if not self.ignores_pooled(net):
            return latents
        return latents + codec.get_buffer("shift") / codec.get_buffer("scale")

    def encoding_of(self, net: Any) -> str:
        """Two ways to encode."""
        return f"{self.encoding} {self.ignores_pooled(net)}"


RESAMPLER_NAMES = (
    ("ln0", "0.norm1"), ("ln1", "0.norm2"), ("attn.to_q", "0.to_q"), ("attn.to_kv", "0.to_kv"),
    ("attn.to_out.0", "0.to_out"), ("adaln_norm", "1.0"), ("ff.net.0.proj", "1.1"), ("ff.net.2", "1.3"),
    ("adaln_proj", "2.1"),
)  # fmt: skip
"""diffusers' names in a layer of SD3's resampler, and those of the file it reads."""


def resampler_file_name(name: str) -> str:
    """A resampler's tensor by the name it has in a file."""
    if not name.startswith("layers."):
        return name
    _, layer, rest = name.split(".", 2)
    for ours, theirs in RESAMPLER_NAMES:
        if rest.startswith(f"{ours}."):
            return f"layers.{layer}.{theirs}.{rest.removeprefix(f'{ours}.')}"
    raise ValueError(f"{name} is no tensor of the resampler that is known")


class StableDiffusion3IPAdapter(IPAdapterLayout):
    """All features of a picture, resampled at each time, in every block."""

    network = "SD3Transformer2DModel"
    always_active = False
    projection = "image_proj"
    stacks = False

    def image_features(self, file: str = "") -> dict[str, Any]:
        """All patches, of the layer before the last."""
        return dict(WHOLE)

    def projector(self, network: Any) -> nn.Module:
        """The resampler."""
        return network.image_proj

    def file_name(self, name: str) -> str:
        """A tensor of the resampler by the name it has in a file."""
        return resampler_file_name(name)

    def create(self, network: Any, width: int) -> dict[str, Tensors]:
        """A new adapter of SD3: a resampler that reads the time, keys and values in every block."""
        from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
        from diffusers.models.embeddings import IPAdapterTimeImageProjection

        head, inner = network.config.attention_head_dim, network.inner_dim
        resampler = IPAdapterTimeImageProjection(
            embed_dim=width,
            output_dim=inner,
            hidden_dim=64 * max(1, inner // 64),
            heads=max(1, inner // 64),
            num_queries=16,
            timestep_in_dim=320,
        )
        tensors: Tensors = {}
        for place in range(len(network.attn_processors)):
            processor = SD3IPAdapterJointAttnProcessor2_0(
                hidden_size=inner,
                ip_hidden_states_dim=inner,
                head_dim=head,
                timesteps_emb_dim=resampler.proj_out.weight.shape[1],
            )
            processor.to_v_ip.weight.data.zero_()
            tensors |= {f"{place}.{name}": tensor.clone() for name, tensor in processor.state_dict().items()}
        projection = {self.file_name(name): tensor.clone() for name, tensor in resampler.state_dict().items()}
        return {"image_proj": projection, "ip_adapter": tensors}


class StableDiffusion3(Family):
    """Tokens are the CLIPs' (padded to T5's width) followed by T5's; padding is seen."""

    pipelines = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    layer_names = LayerNames(tuple(SD3), "plain", "original")
    comfyui_loads_whole = True
    timestep_input = "thousandths"
    controlnet = StableDiffusion3ControlNet()
    ip_adapter = StableDiffusion3IPAdapter()
    normalizes = ("factor", "shift")
    weighted_tokens = (("tokenizer", "tokenizer_2"), ("tokenizer_3",))
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
