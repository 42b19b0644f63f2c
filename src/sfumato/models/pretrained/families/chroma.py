"""Chroma: FLUX.1 schnell undistilled, with T5 alone; words and one pad are favoured in attention.

Source: Rock 2025, Chroma1 model card.
"""

from typing import Any

import torch
from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.models.lora.layer_names import LayerNames, Rule, renamed, same
from sfumato.models.networks.tokens import patchify, position_ids, unpatchify
from sfumato.models.pretrained.families.flux import FLUX
from sfumato.models.pretrained.family import Family

GUIDANCE: list[Rule] = [
    *same("distilled_guidance_layer.in_proj", "distilled_guidance_layer.out_proj"),
    *renamed({"linear_1": "in_layer", "linear_2": "out_layer"}, *2 * ("distilled_guidance_layer.layers.#.",)),
]


class Chroma(Family):
    """Tokens of a fixed length, and `favoured` [B, L], which attention adds (0 or 1) where both ends are.

    It is no mask: diffusers hands the 0s and 1s to attention as numbers, so padding is seen.
    """

    pipelines = ("ChromaPipeline", "ChromaImg2ImgPipeline")
    layer_names = LayerNames(
        (*FLUX, *GUIDANCE),
        "original",
        "original",
        kohya_holds=r"(?!proj_out|distilled).*",
        separable=True,
    )
    timestep_input = "share of noise"
    even_sigmas = True
    normalizes = ("factor", "shift")
    weighted_tokens = (("tokenizer",),)
    prompt_outputs = ("tokens", "", "favoured")

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_T − x_0 [B, 16, H, W]."""
        height, width = x.shape[-2:]
        tokens, favoured = condition["tokens"], condition["favoured"]
        pixels = favoured.new_ones(len(x), height * width // 4)
        out = network(
            hidden_states=patchify(x),
            timestep=clock,
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(tokens.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=position_ids(height // 2, width // 2, x.device).to(x.dtype),
            attention_mask=torch.cat([favoured, pixels], 1),
        ).sample
        return unpatchify(out, height, width)
