"""HunyuanVideo: a rectified flow on clips that reads Llama and CLIP's summary, and hears its guidance.

Source: Kong et al. 2024, arXiv:2412.03603.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.stages.family import ATTENTION, Family
from sfumato.stages.interface import Condition


class HunyuanVideo(Family):
    """Latents [B, 16, F, H, W]; `guidance` [B] in the condition, by default 6, is told in thousandths.

    A negative is leaned away from only by `true_cfg_scale`.
    """

    pipelines = ("HunyuanVideoPipeline",)
    clock = "thousandths"
    video, fps = True, 15.0
    answers = ("tokens", "pooled", "mask")
    usual_guidance = 6.0
    knobs: ClassVar[Mapping[str, float | None]] = {"true_cfg_scale": 1.0}
    lora_targets = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def sigmas(self, steps: int) -> list[float] | None:
        """From 1 down to the last step before 0."""
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1].tolist()

    def told(self, network: Any, condition: Condition, guidance: float) -> Condition:
        """The network hears the guidance."""
        heard = torch.full((condition.size,), guidance)
        return Condition({**condition, "guidance": heard}, negative=condition.negative)

    def scale(self, network: Any, guidance: float, t: float, knobs: Mapping[str, Any]) -> float:
        """Guidance is heard; `true_cfg_scale` leans."""
        return float(knobs["true_cfg_scale"])

    def leans(self, network: Any, guidance: float, asked: bool) -> bool:
        """Only away from a negative that is given."""
        return asked and guidance > 1

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_T − x_0 [B, 16, F, H, W]."""
        usual = torch.full((len(x),), self.usual_guidance)
        heard = condition.get("guidance", usual).to(x)
        return network(
            hidden_states=x,
            timestep=clock,
            encoder_hidden_states=condition["tokens"],
            encoder_attention_mask=condition["mask"].to(x.dtype),
            pooled_projections=condition["pooled"],
            guidance=heard * 1000 if network.config.guidance_embeds else None,
            return_dict=False,
        )[0]
