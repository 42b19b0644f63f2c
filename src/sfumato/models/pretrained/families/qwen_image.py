"""Qwen-Image: a rectified flow over 2×2 patches that reads Qwen2.5-VL; latents are clips of one frame.

Source: Wu et al. 2025, arXiv:2508.02324.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.models.condition import Condition
from sfumato.models.control.controlnet import ControlNetAdapter, Given
from sfumato.models.guidance_policy import GuidancePolicy, PipelineGuidance
from sfumato.models.lora.layer_names import LayerNames
from sfumato.models.networks.tokens import patchify, unpatchify
from sfumato.models.pretrained.family import Family
from sfumato.models.pretrained.image_inputs import references
from sfumato.theory import guidance


class QwenImageGuidance(PipelineGuidance):
    """Only away from a negative that is given; each token keeps the prompted answer's norm."""

    def needs_negative(self, scale: float, has_negative: bool) -> bool:
        """Only where a negative is given."""
        return has_negative and scale > 1

    def combine(self, strong: Tensor, weak: Tensor, scale: float) -> Tensor:
        """weak + scale · (strong − weak), each token of 2 × 2 latents of the prompted norm."""
        height, width = strong.shape[-2:]
        tokens = patchify(strong.squeeze(2))
        guided = patchify(super().combine(strong, weak, scale).squeeze(2))
        return unpatchify(guidance.keep_norm(guided, tokens), height, width).unsqueeze(2)


class QwenImageControlNet(ControlNetAdapter):
    """Packed latents; residuals of the blocks."""

    network = "QwenImageTransformer2DModel"
    control = "QwenImageControlNetModel"
    encoding = "QwenImage"
    prompted_only = True
    shared_config = ("attention_head_dim", "num_attention_heads", "in_channels", "joint_attention_dim")
    plain_config: ClassVar[Mapping[str, Any]] = {"extra_condition_channels": 0}

    def create(self, base: Any, layers: int, stride: int) -> nn.Module:
        """A twelfth of the blocks unless said otherwise (5 of 60)."""
        net = self.copy_of(base, layers or -(-base.config["num_layers"] // 12))
        nn.init.zeros_(net.controlnet_x_embedder.weight)
        nn.init.zeros_(net.controlnet_x_embedder.bias)
        return net

    def residuals(
        self, net: Any, args: tuple[Any, ...], given: Given, control: Tensor, weight: float
    ) -> Given:
        """Residuals of the blocks."""
        names = (
            "hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_mask", "img_shapes"
        )  # fmt: skip
        blocks = net(
            **{name: given.get(name) for name in names},
            controlnet_cond=patchify(control.squeeze(2)),
            conditioning_scale=weight,
            return_dict=False,
        )
        return {"controlnet_block_samples": list(blocks)}


class QwenImage(Family):
    """Latents [B, 16, 1, H, W]; the pipeline leans only away from a negative that is given."""

    pipelines = ("QwenImagePipeline",)
    layer_names = LayerNames((), "shared", "plain", kohya_holds=r"transformer_blocks\..*")
    comfyui_loads_whole = True
    timestep_input = "share of noise"
    controlnet = QwenImageControlNet()
    even_sigmas = True
    normalizes = ("factor", "channels")
    guidance = "true_cfg_scale"
    prompt_outputs = ("tokens", "mask")

    def guidance_policy(self, network: Any) -> GuidancePolicy:
        """The pipeline's own form."""
        return QwenImageGuidance(has_own_form=True)

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_T − x_0 [B, 16, 1, H, W]."""
        height, width = x.shape[-2:]
        mask, beside = condition.get("mask"), references(condition)
        if mask is not None and all_count(condition, mask):
            mask = None
        shapes = [(1, one.shape[-2] // 2, one.shape[-1] // 2) for one in (x, *beside)]
        out = network(
            hidden_states=torch.cat([patchify(one.squeeze(2).to(x.dtype)) for one in (x, *beside)], 1),
            timestep=clock,
            encoder_hidden_states=condition["tokens"],
            encoder_hidden_states_mask=None if mask is None else mask.long(),
            img_shapes=[shapes] * len(x),
        ).sample
        return unpatchify(out[:, : height * width // 4], height, width).unsqueeze(2)


def all_count(condition: Condition, mask: Tensor) -> bool:
    """Whether every token counts; in training on a GPU, for which nobody should wait, what the host knows."""
    if condition.is_unpadded:
        return True
    is_training = torch.is_grad_enabled() and mask.device.type != "cpu"
    return not is_training and bool(mask.all())
