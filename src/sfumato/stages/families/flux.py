"""FLUX.1 dev and schnell: a rectified flow over 2×2 patches that reads CLIP's summary and T5.

Source: Black Forest Labs 2024; Labs et al. 2025, arXiv:2506.15742.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.stages.family import ATTENTION, Family, called_with
from sfumato.stages.interface import Condition
from sfumato.stages.packing import grid_places, patches, unpatched
from sfumato.stages.seeing import references


class Flux(Family):
    """dev was distilled to hear its guidance (`guidance` [B] in the condition, by default 3.5)."""

    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline")
    clock = "share of noise"
    even_sigmas = True
    answers = ("tokens", "pooled")
    prompt_only = ("prompt_2",)
    usual_guidance = 3.5
    knobs: ClassVar[Mapping[str, float | None]] = {"true_cfg_scale": 1.0}
    lora_targets = (
        *ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip

    def told(self, network: Any, condition: Condition, guidance: float) -> Condition:
        """dev hears the guidance; schnell has none."""
        if not network.config.guidance_embeds:
            return condition
        heard = torch.full((condition.size,), guidance)
        return Condition({**condition, "guidance": heard}, negative=condition.negative)

    def scale(self, network: Any, guidance: float, t: float, knobs: Mapping[str, Any]) -> float:
        """Guidance is heard; `true_cfg_scale` leans."""
        return float(knobs["true_cfg_scale"])

    def leans(self, network: Any, guidance: float, asked: bool) -> bool:
        """Only away from a negative that is given, by `true_cfg_scale`; else one answer is enough."""
        return asked and guidance > 1

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_T − x_0 [B, 16, H, W]."""
        height, width = x.shape[-2:]
        beside = references(condition)
        places = [grid_places(height // 2, width // 2, x.device)]
        for latents in beside:
            places.append(grid_places(latents.shape[-2] // 2, latents.shape[-1] // 2, x.device))
            places[-1][:, 0] = 1  # a reference stands behind the picture
        heard = None
        if network.config.guidance_embeds:
            usual = torch.full((len(x),), self.usual_guidance)
            heard = condition.get("guidance", usual).to(x.device)
        tokens = condition["tokens"]
        out = network(
            hidden_states=torch.cat([patches(x), *(patches(latents.to(x.dtype)) for latents in beside)], 1),
            timestep=clock,
            guidance=heard,
            pooled_projections=condition["pooled"],
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(tokens.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=torch.cat(places).to(x.dtype),
        ).sample
        return unpatched(out[:, : height * width // 4], height, width)

    def info(self, pipe: Any) -> dict[str, Any]:
        """The pipeline's; schnell's four steps, which its pipeline leaves to the user."""
        known = super().info(pipe)
        quick = not pipe.transformer.config.guidance_embeds
        steps = 4 if quick else called_with(type(pipe))["num_inference_steps"]
        return known | {"steps": steps, "guidance": 1.0 if quick else known["guidance"]}
