"""Wan that goes on from a picture: 2.1 and 2.2 are shown it as known frames, 2.2 5B holds its first frame.

Source: Wan Team 2025, arXiv:2503.20314, section 5.1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import Refused
from sfumato.models.condition import Condition
from sfumato.models.pretrained.families.wan import Wan as WanFromText
from sfumato.models.pretrained.image_inputs import Encode, ImageCondition, Pictures, encoded, picture


class WanFromPicture(WanFromText):
    """`known` [B, 4 + 16, F, H, W] (mask and latents of the known frames) beside the noise, and `vision`
    [B, N, L, D] where a CLIP looks too (2.1); or `first` [B, 48, 1, H, W] in place of the first frame (5B).

    Made for clips of the height, width and num_frames that the condition is told.
    """

    pipelines = ("WanImageToVideoPipeline",)
    image_arguments = ("image", "last_image")
    image_size_arguments = ("height", "width", "num_frames")
    requires_image = True
    more_channels = (20,)
    unused_components = ()

    def required_images(self, pipe: Any) -> tuple[str, ...]:
        """A last picture too, where the network was trained between two."""
        network = pipe.transformer
        between = network is not None and network.config.pos_embed_seq_len is not None
        return ("image", "last_image") if between else ("image",)

    def read(self, pipe: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Tensor]:
        """As the pipeline does; without ftfy its module cannot, where the one that draws from text can."""
        from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v

        if not hasattr(pipeline_wan_i2v, "ftfy"):
            pipeline_wan_i2v.basic_clean = pipeline_wan.basic_clean
        return super().read(pipe, prompts, options)

    def encode_images(
        self, pipe: Any, shown: Mapping[str, Sequence[Pictures]], options: Mapping[str, Any], encode: Encode
    ) -> dict[str, Tensor]:
        """Known frames, black between them."""
        pictures = {name: [only(one, name) for one in some] for name, some in shown.items()}
        first = self.still(pipe, pictures["image"], options)
        if pipe.config.expand_timesteps:
            if "last_image" in pictures:
                raise Refused("Wan 2.2 5B holds a first frame only: leave last_image out.")
            return {"first": encoded(encode, first)}
        frames, stride = int(options["num_frames"]), pipe.vae_scale_factor_temporal
        frames = max((frames - 1) // stride * stride + 1, 1)
        last = self.still(pipe, pictures["last_image"], options) if "last_image" in pictures else []
        empty = first[0].new_zeros(1, 3, frames - 1 - bool(last), *first[0].shape[-2:])
        latents = encoded(
            encode, [torch.cat([one, empty, *last[i : i + 1]], 2) for i, one in enumerate(first)]
        )
        tensors = {"known": marked(latents, frames, stride, bool(last))}
        network = pipe.transformer
        if network is not None and network.config.image_dim is not None:
            several = [list(some) for some in zip(*pictures.values(), strict=True)]
            tensors["vision"] = torch.stack([pipe.encode_image(some, pipe.device) for some in several])
        return tensors

    def training_images(self, pipe: Any, encode: Encode) -> dict[str, ImageCondition]:
        """A clip's own first frame, and where the network was trained between two, its last one."""
        if pipe.config.expand_timesteps:
            return {"first": ImageCondition(True, lambda clip: encode(clip[:, :, :1]), "1")}
        between, stride = "last_image" in self.required_images(pipe), pipe.vae_scale_factor_temporal

        def known(clip: Tensor) -> Tensor:
            held = torch.zeros_like(clip)
            held[:, :, 0] = clip[:, :, 0]
            if between:
                held[:, :, -1] = clip[:, :, -1]
            return marked(encode(held), clip.shape[2], stride, between)

        def seen(clip: Tensor) -> Tensor:
            ends = [0, -1] if between else [0]
            several = [[picture(one[:, place]) for place in ends] for one in clip]
            return torch.stack([pipe.encode_image(some, pipe.device) for some in several])

        training_images = {"known": ImageCondition(True, known, f"1, {between}")}
        if pipe.transformer is not None and pipe.transformer.config.image_dim is not None:
            training_images["vision"] = ImageCondition(True, seen, f"1, {between}")
        return training_images

    def mask_error(self, error: Tensor, condition: Condition) -> Tensor:
        """5B is given its first frame."""
        return error[:, :, 1:] if "first" in condition else error

    def still(self, pipe: Any, pictures: Pictures, options: Mapping[str, Any]) -> list[Tensor]:
        """Pixels [1, 3, 1, H, W] of each picture."""
        size = {"height": int(options["height"]), "width": int(options["width"])}
        return [pipe.video_processor.preprocess(one, **size).unsqueeze(2) for one in pictures]


def marked(latents: Tensor, frames: int, stride: int, between: bool) -> Tensor:
    """Latents of known frames behind the mask that says which they are: [B, stride + C, F, H, W]."""
    counts = latents.new_zeros(len(latents), frames, *latents.shape[-2:])
    counts[:, 0] = 1
    if between:
        counts[:, -1] = 1
    counts = torch.cat([counts[:, :1].expand(-1, stride, -1, -1), counts[:, 1:]], 1)
    return torch.cat([counts.unflatten(1, (-1, stride)).transpose(1, 2), latents], 1)


def only(pictures: Pictures, name: str) -> Any:
    """The one picture there may be."""
    if len(pictures) != 1:
        raise Refused(f"Wan takes one {name} for each prompt, not {len(pictures)}.")
    return pictures[0]
