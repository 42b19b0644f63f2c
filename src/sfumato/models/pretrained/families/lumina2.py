"""Lumina-Image 2: a transformer that reads Gemma 2; it is told the share of signal and answers x_0 − x_T.

Source: Qin et al. 2025, arXiv:2503.21758.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.models.guidance_policy import GuidancePolicy, PipelineGuidance
from sfumato.models.lora.layer_names import LayerNames, Rule, refined_attention, renamed, same
from sfumato.models.pretrained.family import Family
from sfumato.theory import guidance

LUMINA2: list[Rule] = [
    *refined_attention("attn"),
    *[
        ((f"{place}.#.feed_forward.linear_{n}",), f"{place}.#.feed_forward.w{n}")
        for place in ("layers", "noise_refiner", "context_refiner")
        for n in "123"
    ],
    *renamed({
        "layers.#.norm1.linear": "layers.#.adaLN_modulation.1",
        "noise_refiner.#.norm1.linear": "noise_refiner.#.adaLN_modulation.1",
        "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_caption_embed.caption_embedder.1": "cap_embedder.1",
        "norm_out.linear_1": "final_layer.adaLN_modulation.1", "norm_out.linear_2": "final_layer.linear",
    }),
    *same("x_embedder"),
]  # fmt: skip


class Lumina2Guidance(PipelineGuidance):
    """Each row of latents keeps the prompted answer's norm."""

    def combine(self, strong: Tensor, weak: Tensor, scale: float) -> Tensor:
        """weak + scale · (strong − weak), of the prompted norm."""
        return guidance.keep_norm(super().combine(strong, weak, scale), strong)


class Lumina2(Family):
    """The system prompt is written before prompts, not before negatives."""

    pipelines = ("Lumina2Pipeline", "Lumina2Text2ImgPipeline")
    layer_names = LayerNames(tuple(LUMINA2), "original", "original")
    timestep_input = "share of signal"
    sign = -1
    even_sigmas = True
    normalizes = ("factor", "shift")
    prompt_outputs = ("tokens", "mask")

    def read_negative(
        self, pipe: Any, prompts: Sequence[str | None], options: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """As the pipeline does beside any prompt."""
        words = [prompt or "" for prompt in prompts]
        _, _, tokens, mask = pipe.encode_prompt(
            words, True, negative_prompt=words, device=pipe.device, **options
        )
        return {"tokens": tokens, "mask": mask.bool()}

    def shift(self, config: Mapping[str, Any], tokens: int, steps: int) -> float:
        """The pipeline counts the latents' channels (16) for tokens."""
        return super().shift(config, 16, steps)

    def guidance_policy(self, network: Any) -> GuidancePolicy:
        """The pipeline's own form."""
        return Lumina2Guidance(has_own_form=True)

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_0 − x_T [B, 16, H, W]."""
        return network(
            hidden_states=x,
            timestep=clock,
            encoder_hidden_states=condition["tokens"],
            encoder_attention_mask=condition["mask"],
        ).sample
