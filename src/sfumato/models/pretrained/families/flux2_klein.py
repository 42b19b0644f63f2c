"""FLUX.2 klein: a rectified flow on patchified latents that reads Qwen3 and is shown pictures.

Source: Black Forest Labs 2025, FLUX.2 model card.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.models.lora.layer_names import ADDED, BLOCK, SINGLE, LayerNames, Rule, qkv, renamed
from sfumato.models.pretrained.family import Family
from sfumato.models.pretrained.image_inputs import (
    Encode,
    ImageCondition,
    Pictures,
    encode_references,
    references,
)

FLUX2: list[Rule] = [
    (qkv(f"{BLOCK}.attn"), "double_blocks.#.img_attn.qkv"),
    (qkv(f"{BLOCK}.attn", *ADDED), "double_blocks.#.txt_attn.qkv"),
    *renamed({
        "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2", "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
    }, f"{BLOCK}.", "double_blocks.#."),
    *renamed({"to_qkv_mlp_proj": "linear1", "to_out": "linear2"}, f"{SINGLE}.attn.", "single_blocks.#."),
    *renamed({
        "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
    }),
]  # fmt: skip


class Flux2Klein(Family):
    """Latents are the autoencoder's, 2×2 in channels, normalised by its batch norm: [B, 128, H, W]."""

    pipelines = ("Flux2KleinPipeline",)
    layer_names = LayerNames(
        tuple(FLUX2),
        "original",
        "original",
        kohya_holds=r"(single_)?transformer_blocks\..*",
        separable=True,
    )
    timestep_input = "share of noise"
    even_sigmas = True
    patch = 1
    gather = 2
    image_arguments = ("image",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")

    def statistics(self, vae: Any) -> tuple[Tensor, Tensor]:
        """The running statistics of the autoencoder's last batch norm."""
        deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        return vae.bn.running_mean.clone().view(-1, 1, 1), deviation.view(-1, 1, 1)

    def shift(self, config: Mapping[str, Any], tokens: int, steps: int) -> float:
        """Fitted by its makers to tokens and steps."""
        from diffusers.pipelines.flux2 import pipeline_flux2_klein

        return pipeline_flux2_klein.compute_empirical_mu(image_seq_len=tokens, num_steps=steps)

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_T − x_0 [B, 128, H, W]."""
        height, width = x.shape[-2:]
        tokens, beside = condition["tokens"], [one.to(x.dtype) for one in references(condition)]
        words = places(x.device, length=tokens.shape[1])
        pictures = [places(x.device, 10 * time, *one.shape[-2:]) for time, one in enumerate((x, *beside))]
        out = network(
            hidden_states=torch.cat([one.flatten(2).transpose(1, 2) for one in (x, *beside)], 1),
            timestep=clock,
            guidance=None,
            encoder_hidden_states=tokens,
            txt_ids=words.expand(len(x), -1, -1),
            img_ids=torch.cat(pictures).expand(len(x), -1, -1),
            return_dict=False,
        )[0]
        return out[:, : height * width].transpose(1, 2).unflatten(2, (height, width))

    def training_images(self, pipe: Any, encode: Encode) -> dict[str, ImageCondition]:
        """One picture to begin with, as large as what is learned."""
        return {"reference": ImageCondition(False, encode, "1")}

    def encode_images(
        self, pipe: Any, shown: Mapping[str, Sequence[Pictures]], options: Mapping[str, Any], encode: Encode
    ) -> dict[str, Tensor]:
        """References of at most a megapixel, cut to whole patches."""

        def prepare(one: Any) -> Tensor:
            one = self.bounded(pipe, one)
            height, width = self.cut(pipe, one)
            return pipe.image_processor.preprocess(one, height, width, resize_mode="crop")

        return encode_references(shown["image"], prepare, encode)

    def bounded(self, pipe: Any, picture: Any) -> Any:
        """The picture, made smaller where it has more than a megapixel."""
        if picture.width * picture.height <= 1024 * 1024:
            return picture
        return pipe.image_processor._resize_to_target_area(picture, 1024 * 1024)

    def cut(self, pipe: Any, picture: Any) -> tuple[int, int]:
        """(height, width) in whole patches."""
        step = pipe.vae_scale_factor * 2
        return picture.height // step * step, picture.width // step * step

    def output_size(self, pipe: Any, pictures: Pictures) -> tuple[int, int] | None:
        """The first picture's."""
        return self.cut(pipe, self.bounded(pipe, pictures[0]))

    def info(self, pipe: Any) -> dict[str, Any]:
        """The pipeline's; distilled ones take four steps and no guidance."""
        known = super().info(pipe)
        return known | ({"steps": 4, "guidance": 1.0} if pipe.config.is_distilled else {})


def places(device: torch.device, time: int = 0, height: int = 1, width: int = 1, length: int = 1) -> Tensor:
    """(time, row, column, word) of every token [time·height·width·length, 4]."""
    moment = torch.tensor([time], device=device)
    axes = [torch.arange(side, device=device) for side in (height, width, length)]
    return torch.cartesian_prod(moment, *axes)
