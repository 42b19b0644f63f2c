"""Networks that were distilled to hear the guidance: one answer a step where others need two."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.errors import Refused
from sfumato.stages.family import Family
from sfumato.stages.interface import Condition


class HearsGuidance(Family):
    """`guidance` [B] in the condition; a negative is leaned away from only by `true_cfg_scale`."""

    usual_guidance: ClassVar[float] = 3.5
    """What is heard where the condition does not say."""
    knobs: ClassVar[Mapping[str, float | None]] = {"true_cfg_scale": 1.0}

    def hears(self, network: Any) -> bool:
        """Whether this network does; some of a family do not."""
        return bool(network.config.guidance_embeds)

    def told(self, network: Any, condition: Condition, guidance: float) -> Condition:
        """The condition with the guidance, where it is heard."""
        if not self.hears(network):
            return condition
        heard = torch.full((condition.size,), guidance)
        return Condition({**condition, "guidance": heard}, negative=condition.negative)

    def heard(self, x: Tensor, condition: Condition) -> Tensor:
        """The guidance [B] of this batch, beside its latents."""
        return condition.get("guidance", torch.full((len(x),), self.usual_guidance)).to(x.device)

    def scale(self, network: Any, guidance: float, t: float, knobs: Mapping[str, Any]) -> float:
        """Guidance is heard; `true_cfg_scale` leans."""
        return float(knobs["true_cfg_scale"])

    def leans(self, network: Any, guidance: float, asked: bool) -> bool:
        """Only away from a negative that is given; else one answer is enough."""
        return asked and guidance > 1


class UNetThatMayHear(HearsGuidance):
    """UNets, of which those that consistency distillation made hear the guidance beside the time."""

    network = "unet"
    patch = 1
    more_channels = (5,)
    added: ClassVar[str | None] = None
    """What the UNet hears beside its tokens, as its config names it."""
    usual_guidance = 7.5
    knobs: ClassVar[Mapping[str, float | None]] = {}

    def misfit(self, network: Any, pipe: Any, channels: int) -> str:
        """Also what is read, and what is heard beside it."""
        config = network.config
        if config.addition_embed_type != self.added:
            said = (one or "nothing" for one in (config.addition_embed_type, self.added))
            return "its unet hears {} beside the words, not {}".format(*said)
        readers = (part for name, part in pipe.components.items() if name.startswith("text_encoder"))
        width = sum(part.config.hidden_size for part in readers if part is not None)
        taken = config.cross_attention_dim
        if width and isinstance(taken, int) and not config.encoder_hid_dim and taken != width:
            return f"its text encoder gives words of {width} numbers, its unet reads {taken}"
        return super().misfit(network, pipe, channels)

    def hears(self, network: Any) -> bool:
        """Whether the UNet has a place for it."""
        return network.config.time_cond_proj_dim is not None

    def scale(self, network: Any, guidance: float, t: float, knobs: Mapping[str, Any]) -> float:
        """As asked."""
        return guidance

    def leans(self, network: Any, guidance: float, asked: bool) -> bool:
        """Where guidance is not heard.

        Raises:
            Refused: a negative that could not act.
        """
        if asked and self.hears(network):
            raise Refused(
                "This UNet hears its guidance, which leaves no way to lean from a negative: leave it out."
            )
        return guidance > 1 and not self.hears(network)

    def beside_time(self, network: Any, x: Tensor, condition: Condition) -> Tensor | None:
        """What is heard beside the time [B, D]; None where nothing is."""
        if not self.hears(network):
            return None
        return sinusoids(self.heard(x, condition) - 1, network.config.time_cond_proj_dim).to(x.dtype)


def sinusoids(numbers: Tensor, width: int) -> Tensor:
    """Sines and cosines [B, width] of 1000·numbers, as consistency models are told their guidance.

    Source: Luo et al. 2023, arXiv:2310.04378; diffusers' `get_guidance_scale_embedding`.
    """
    half = width // 2
    rates = torch.exp(torch.arange(half, device=numbers.device) * -(torch.tensor(1e4).log() / (half - 1)))
    angles = 1000 * numbers.float()[:, None] * rates
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))
