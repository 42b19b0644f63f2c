"""Stable Diffusion XL: a UNet that reads two CLIPs and is told the picture's size and crop.

Source: Podell et al. 2023, arXiv:2307.01952.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import Refused
from sfumato.models.condition import Condition
from sfumato.models.lora.layer_names import LayerNames
from sfumato.models.lora.unet_names import UNET_BLOCKS, unet_names
from sfumato.models.pretrained.guidance_embedding import UNetFamily
from sfumato.models.pretrained.inpainting import beside
from sfumato.theory.definition import upload


class StableDiffusionXL(UNetFamily):
    """Tokens are both CLIPs' last but one layers side by side, `pooled` is the larger one's summary.

    Sizes are those of the latents, uncropped, unless the condition holds `time_ids` [B, 6]: original height
    and width, crop top and left, target height and width, in pixels; not a number where nobody said.
    """

    pipelines = (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    )
    layer_names = LayerNames((), "kohya", "plain", kohya_holds=UNET_BLOCKS, of_network=unet_names)
    comfyui_loads_whole = True
    trains_micro_conditioning = True
    addition_embed = "text_time"
    normalizes = ("factor", "channels")
    stride = 8
    weighted_tokens = (("tokenizer", "tokenizer_2"),)
    prompt_outputs = ("tokens", "", "pooled")
    prompt_only = ("prompt_2", "clip_skip")
    micro_conditioning = "time_ids"

    micro_conditioning_arguments = (
        "original_size", "crops_coords_top_left", "target_size", "negative_original_size",
        "negative_crops_coords_top_left", "negative_target_size",
    )  # fmt: skip

    def read(self, pipe: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Tensor]:
        """Both CLIPs' words, and what is said of the picture's size and cut."""
        sizes = {name: options[name] for name in self.micro_conditioning_arguments if name in options}
        others = {name: value for name, value in options.items() if name not in sizes}
        answer, ids = super().read(pipe, prompts, others), time_ids(sizes)
        if ids is None:
            return answer
        return answer | {"time_ids": ids.to(pipe.device).repeat(len(prompts), 1)}

    def read_negative(
        self, pipe: Any, prompts: Sequence[str | None], options: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """No negative is all zeros where the pipeline's config says so; an empty one is not."""
        answer = super().read_negative(pipe, prompts, {**options, **of_negative(options)})
        ids = answer.pop("time_ids", None)
        if pipe.config.force_zeros_for_empty_prompt:
            silent = [prompt is None for prompt in prompts]
            for tensor in answer.values():
                tensor[silent] = 0
        return answer if ids is None else answer | {"time_ids": ids}

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """ε [B, 4, H, W]."""
        height, width = (self.stride * side for side in x.shape[-2:])
        plain = torch.tensor([[height, width, 0, 0, height, width]], dtype=x.dtype)
        sizes = upload(plain, x.device).expand(len(x), 6)
        if "time_ids" in condition:
            sizes = torch.where(condition["time_ids"].isnan(), sizes, condition["time_ids"]).to(x.dtype)
        added = {"text_embeds": condition["pooled"], "time_ids": sizes}
        tokens = condition["tokens"]
        guidance = self.timestep_cond(network, x, condition)
        return network(
            beside(network, x, condition),
            clock,
            encoder_hidden_states=tokens,
            added_cond_kwargs=added,
            timestep_cond=guidance,
        ).sample


def time_ids(sizes: Mapping[str, Any]) -> Tensor | None:
    """[1, 6] of the call's arguments, not a number for the drawing's own size; None if nothing is said.

    Raises:
        Refused: something that is no pair of numbers.
    """
    ids = torch.full((1, 6), torch.nan)
    for place, name in enumerate(("original_size", "crops_coords_top_left", "target_size")):
        pair = sizes.get(name)
        if pair is None:
            continue
        numbers = list(pair) if isinstance(pair, Sequence) and not isinstance(pair, str) else []
        if len(numbers) != 2 or not all(isinstance(number, int | float) for number in numbers):
            raise Refused(f"{name} = {pair} is no pair of numbers. Say, for example, {name}=[1024, 1024].")
        ids[0, 2 * place : 2 * place + 2] = torch.tensor([float(number) for number in numbers])
    ids[0, 2:4] = ids[0, 2:4].nan_to_num(0.0)
    return ids if any(pair is not None and any(pair) for pair in sizes.values()) else None


def of_negative(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the weaker answer is told: the same, unless both of its sizes are given, as the pipeline does."""
    given = {
        name: options.get(f"negative_{name}") for name in StableDiffusionXL.micro_conditioning_arguments[:3]
    }
    return given if given["original_size"] and given["target_size"] else {}
