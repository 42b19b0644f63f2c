"""Networks that were distilled to read the guidance: one answer a step where others need two."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.errors import Refused
from sfumato.models.condition import Condition
from sfumato.models.control.controlnet import UNetControlNet
from sfumato.models.control.ip_adapter import UNetIPAdapter
from sfumato.models.guidance_policy import GuidancePolicy, PipelineGuidance
from sfumato.models.pretrained.family import Family


@dataclass(frozen=True)
class EmbeddedGuidance(PipelineGuidance):
    """The scale is read by the network, as `guidance` [B] of the condition.

    Args:
        has_guidance_embed: whether this network has a place for it.
    """

    has_guidance_embed: bool = False

    @property
    def is_embedded(self) -> bool:
        """As it was made."""
        return self.has_guidance_embed

    def embed_guidance(self, condition: Condition, scale: float) -> Condition:
        """The condition with the guidance, where the network reads it."""
        if not self.has_guidance_embed:
            return condition
        scales = torch.full((condition.size,), scale)
        return Condition({**condition, "guidance": scales}, negative=condition.negative)


class TrueCfgGuidance(EmbeddedGuidance):
    """A negative is leaned away from only by `true_cfg_scale`."""

    def guidance_at(self, scale: float, t: float, options: Mapping[str, Any]) -> float:
        """`scale` is for the network to read; the two answers are combined by `true_cfg_scale`."""
        return float(options["true_cfg_scale"])

    def needs_negative(self, scale: float, has_negative: bool) -> bool:
        """Only away from a negative that is given; else one answer is enough.

        Raises:
            Refused: a negative without a `true_cfg_scale` above 1.
        """
        if has_negative and not scale > 1:
            raise Refused(
                "This model reads its guidance and does not lean away from a negative by itself: "
                "leave the negative out, or give true_cfg_scale above 1 with it."
            )
        return has_negative


class GuidanceOrEmbedding(EmbeddedGuidance):
    """A network that reads its guidance leans away from nothing; one that does not leans as usual."""

    def needs_negative(self, scale: float, has_negative: bool) -> bool:
        """Where guidance is not read by the network.

        Raises:
            Refused: a negative that could not act.
        """
        if has_negative and self.has_guidance_embed:
            raise Refused(
                "This UNet reads its guidance, which leaves no way to lean from a negative: leave it out."
            )
        return scale > 1 and not self.has_guidance_embed


class GuidanceDistilled(Family):
    """Networks some of which read `guidance` [B] of the condition."""

    usual_guidance: ClassVar[float] = 3.5
    """What is read where the condition does not say."""

    def has_guidance_embed(self, network: Any) -> bool:
        """Whether this network reads its guidance; some of a family do not."""
        return bool(network.config.guidance_embeds)

    def guidance_policy(self, network: Any) -> GuidancePolicy:
        """The scale is read; a negative takes `true_cfg_scale`."""
        return TrueCfgGuidance(
            options={"true_cfg_scale": 1.0},
            has_own_form=True,
            has_guidance_embed=self.has_guidance_embed(network),
        )

    def guidance_values(self, x: Tensor, condition: Condition) -> Tensor:
        """The guidance [B] of this batch, beside its latents."""
        if "guidance" in condition:
            return condition["guidance"].to(x.device)
        return torch.full((len(x),), self.usual_guidance, device=x.device)


class UNetFamily(GuidanceDistilled):
    """UNets, of which those that consistency distillation made read the guidance beside the time."""

    network = "unet"
    controlnet = UNetControlNet()
    ip_adapter = UNetIPAdapter()
    patch = 1
    more_channels = (5,)
    addition_embed: ClassVar[str | None] = None
    """What the UNet reads beside its tokens, as its config names it."""
    usual_guidance = 7.5

    def why_incompatible(self, network: Any, pipe: Any, channels: int) -> str:
        """Also what is read, and what is read beside it."""
        config = network.config
        if config.addition_embed_type != self.addition_embed:
            said = (one or "nothing" for one in (config.addition_embed_type, self.addition_embed))
            return "its unet reads {} beside the words, not {}".format(*said)
        readers = (part for name, part in pipe.components.items() if name.startswith("text_encoder"))
        width = sum(part.config.hidden_size for part in readers if part is not None)
        taken = config.cross_attention_dim
        if width and isinstance(taken, int) and not config.encoder_hid_dim and taken != width:
            return f"its text encoder gives words of {width} numbers, its unet reads {taken}"
        return super().why_incompatible(network, pipe, channels)

    def has_guidance_embed(self, network: Any) -> bool:
        """Whether the UNet has a place for it."""
        return network.config.time_cond_proj_dim is not None

    def guidance_policy(self, network: Any) -> GuidancePolicy:
        """The scale is read, or the two answers are combined by it."""
        return GuidanceOrEmbedding(has_guidance_embed=self.has_guidance_embed(network))

    def timestep_cond(self, network: Any, x: Tensor, condition: Condition) -> Tensor | None:
        """What is embedded beside the time [B, D]; None where nothing is."""
        if not self.has_guidance_embed(network):
            return None
        return guidance_scale_embedding(
            self.guidance_values(x, condition) - 1, network.config.time_cond_proj_dim
        ).to(x.dtype)


def guidance_scale_embedding(numbers: Tensor, width: int) -> Tensor:
    """Sines and cosines [B, width] of 1000·numbers, as consistency models are told their guidance.

    Source: Luo et al. 2023, arXiv:2310.04378; diffusers' `get_guidance_scale_embedding`.
    """
    half = width // 2
    rates = torch.exp(torch.arange(half, device=numbers.device) * -(torch.tensor(1e4).log() / (half - 1)))
    angles = 1000 * numbers.float()[:, None] * rates
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))
