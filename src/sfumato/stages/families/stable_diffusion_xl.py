"""Stable Diffusion XL: a UNet that reads two CLIPs and is told the picture's size and crop.

Source: Podell et al. 2023, arXiv:2307.01952.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.stages.hearing import UNetThatMayHear
from sfumato.stages.inpainting import beside
from sfumato.stages.interface import Condition


class StableDiffusionXL(UNetThatMayHear):
    """Tokens are both CLIPs' last but one layers side by side, `pooled` is the larger one's summary.

    Sizes are those of the latents, uncropped, unless the condition holds `time_ids` [B, 6]: original height
    and width, crop top and left, target height and width, in pixels.
    """

    pipelines = (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    )
    hears_framing = True
    added = "text_time"
    normalises = ("factor", "channels")
    stride = 8
    answers = ("tokens", "", "pooled")
    prompt_only = ("prompt_2", "clip_skip")
    framing = "time_ids"

    def read_negative(
        self, pipe: Any, prompts: Sequence[str | None], options: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """No negative is all zeros where the pipeline's config says so; an empty one is not."""
        answer = super().read_negative(pipe, prompts, options)
        if pipe.config.force_zeros_for_empty_prompt:
            silent = [prompt is None for prompt in prompts]
            for tensor in answer.values():
                tensor[silent] = 0
        return answer

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """ε [B, 4, H, W]."""
        height, width = (self.stride * side for side in x.shape[-2:])
        plain = torch.tensor([[height, width, 0, 0, height, width]], dtype=x.dtype, device=x.device)
        sizes = condition["time_ids"].to(x.dtype) if "time_ids" in condition else plain.expand(len(x), 6)
        added = {"text_embeds": condition["pooled"], "time_ids": sizes}
        tokens = condition["tokens"]
        heard = self.beside_time(network, x, condition)
        return network(
            beside(network, x, condition),
            clock,
            encoder_hidden_states=tokens,
            added_cond_kwargs=added,
            timestep_cond=heard,
        ).sample
