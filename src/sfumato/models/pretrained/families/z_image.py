"""Z-Image: a single-stream transformer that reads Qwen3, is told the share of signal, answers x_0 − x_T.

Source: Z-Image Team 2025, arXiv:2511.22699.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.models.guidance_policy import GuidancePolicy, PipelineGuidance
from sfumato.models.lora.layer_names import LayerNames, Rule, refined_attention, renamed, same
from sfumato.models.pretrained.family import Family
from sfumato.theory import guidance

Z_IMAGE: list[Rule] = [
    *refined_attention("attention"),
    *same(
        *(
            f"{place}.#.feed_forward.w{n}"
            for place in ("layers", "noise_refiner", "context_refiner")
            for n in "123"
        ),
        "layers.#.adaLN_modulation.0", "noise_refiner.#.adaLN_modulation.0",
        "t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1",
    ),
    *renamed({
        "all_x_embedder.2-1": "x_embedder", "all_final_layer.2-1.linear": "final_layer.linear",
        "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    }),
]  # fmt: skip


class ZImageGuidance(PipelineGuidance):
    """The scale counts from 0."""

    def needs_negative(self, scale: float, has_negative: bool) -> bool:
        """Guidance 0 is none."""
        return scale > 0

    def combine(self, strong: Tensor, weak: Tensor, scale: float) -> Tensor:
        """strong + g·(strong − weak)."""
        return guidance.extrapolate_from_strong(strong, weak, scale)


class ZImage(Family):
    """Tokens of unequal length; guidance counts from 0, as the pipeline's: strong + g·(strong − weak)."""

    pipelines = ("ZImagePipeline",)
    layer_names = LayerNames(
        tuple(Z_IMAGE), "shared", "plain", kohya_holds=r"(layers|noise_refiner|context_refiner)\..*"
    )
    comfyui_loads_whole = True
    timestep_input = "share of signal"
    sign = -1
    even_sigmas = True
    normalizes = ("factor", "shift")

    def read(self, pipe: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Tensor]:
        """As the pipeline does; its list of prompts becomes tokens and mask."""
        rows, _ = pipe.encode_prompt(
            list(prompts), device=pipe.device, do_classifier_free_guidance=False, **options
        )
        return dict(Condition.stack([{"tokens": row} for row in rows]))

    def guidance_policy(self, network: Any) -> GuidancePolicy:
        """The pipeline's own form."""
        return ZImageGuidance(has_own_form=True)

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_0 − x_T [B, 16, H, W]."""
        tokens, mask = condition["tokens"], condition["mask"]
        words = [row[kept] for row, kept in zip(tokens, mask, strict=True)]
        out = network(list(x.unsqueeze(2).unbind(0)), clock, words, return_dict=False)[0]
        return torch.stack(list(out)).squeeze(2)
