"""Tiny checkpoints of the families that are shown pictures; importing this puts them into the zoo."""

from contextlib import contextmanager
from typing import Any

import diffusers as D
import numpy as np
import pytest
import transformers as T
from PIL import Image

from .clips import CLIP, SHORT, wan_22_coder, wan_coder, wan_network
from .components import seeded, t5
from .zoo import BY_TOKENS, SIZE, case, flow, flux, flux_2_klein, qwen_image_parts


def picture(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """A picture with a colour at every place."""
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    colours = np.stack([across, down, np.sin(7 * (seed + 1) * across * down) / 2 + 0.5], -1)
    return Image.fromarray((colours * 255).astype(np.uint8))


def processor(name: str) -> Any:
    """A processor of transformers that needs no torchvision: older versions have it under the plain name."""
    return getattr(T, f"{name}Pil", None) or getattr(T, name)


@contextmanager
def small():
    """Qwen-Image-Edit looks at fewer pixels than a million; Wan from pictures needs no ftfy."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as one
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as more
    from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_wan_i2v, "basic_clean", pipeline_wan.basic_clean)
        for home in (one, more):
            usual = home.calculate_dimensions
            patch.setattr(home, "calculate_dimensions", lambda area, ratio, usual=usual: usual(8192, ratio))
        yield


FREE = {"_auto_resize": False}


@case(
    "flux-kontext",
    call={**SIZE, "guidance_scale": 2.5, "max_area": 64 * 96, "image": picture(66, 80)},
    options={"max_sequence_length": 32, **FREE},
    negative=False,
)
def flux_kontext(key: str):
    return flux(key, True, flow(**BY_TOKENS), D.FluxKontextPipeline)


class ByHand:
    """Qwen2-VL's processor without torchvision: every picture's mark is repeated for its tokens."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.looks = tokenizer, processor("Qwen2VLImageProcessor")()

    def __call__(self, text: Any, images: Any = None, padding: Any = None, return_tensors: Any = None) -> Any:
        seen = self.looks(images=images, return_tensors="pt")
        counts = iter((seen["image_grid_thw"].prod(1) // 4).tolist())
        lines = []
        for line in text:
            while "<|image_pad|>" in line:
                line = line.replace("<|image_pad|>", "<|here|>" * next(counts), 1)
            lines.append(line.replace("<|here|>", "<|image_pad|>"))
        return T.BatchFeature({**self.tokenizer(lines, padding=True, return_tensors="pt"), **seen})


def qwen_edit(key: str, pipeline: Any):
    """Qwen-Image-Edit."""
    parts = qwen_image_parts(key)
    return pipeline(**parts, processor=ByHand(parts["tokenizer"]))


@case(
    "qwen-image-edit",
    call={**SIZE, "true_cfg_scale": 4.0, "image": picture(100, 60)},
    guidance="true_cfg_scale",
    options={"max_sequence_length": 64},
)
def qwen_image_edit(key: str):
    return qwen_edit(key, D.QwenImageEditPipeline)


@case(
    "qwen-image-edit-plus",
    call={**SIZE, "true_cfg_scale": 4.0, "image": [picture(100, 60), picture(60, 100, 1)]},
    guidance="true_cfg_scale",
    options={"max_sequence_length": 64},
)
def qwen_image_edit_plus(key: str):
    return qwen_edit(key, D.QwenImageEditPlusPipeline)


@case(
    "flux-2-klein-edit",
    call={
        **SIZE, "guidance_scale": 4.0, "text_encoder_out_layers": (1, 2, 3),
        "image": [picture(96, 80), picture(64, 64, 1)],
    },
    options={"max_sequence_length": 32, "text_encoder_out_layers": (1, 2, 3)},
    negative=False,
)  # fmt: skip
def flux_2_klein_edit(key: str):
    return flux_2_klein(key)


def wan_i2v(key: str, network: Any, coder: Any, **known: Any):
    """Wan's pipeline that starts from a picture."""
    encoder, tokenizer = t5(key + "/text", many=True)
    scheduler = D.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return D.WanImageToVideoPipeline(
        transformer=seeded(network, key), vae=seeded(coder, key + "/vae"), text_encoder=encoder,
        tokenizer=tokenizer, scheduler=scheduler, **known,
    )  # fmt: skip


@case("wan-2.1-i2v", call={**CLIP, "guidance_scale": 5.0, "image": picture(50, 40)}, options=SHORT)
def wan_21_i2v(key: str):
    sees = T.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32,
        patch_size=8, projection_dim=24,
    )  # fmt: skip
    network = wan_network(in_channels=36, image_dim=32)
    looks = processor("CLIPImageProcessor")(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    eye = seeded(T.CLIPVisionModel(sees), key + "/eye")
    return wan_i2v(key, network, wan_coder(), image_encoder=eye, image_processor=looks)


@case(
    "wan-2.1-flf",
    call={**CLIP, "guidance_scale": 5.0, "image": picture(50, 40), "last_image": picture(48, 32, 2)},
    options=SHORT,
)
def wan_21_flf(key: str):
    sees = T.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32,
        patch_size=8, projection_dim=24,
    )  # fmt: skip
    network = wan_network(in_channels=36, image_dim=32, pos_embed_seq_len=2 * 17)
    looks = processor("CLIPImageProcessor")(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    eye = seeded(T.CLIPVisionModel(sees), key + "/eye")
    return wan_i2v(key, network, wan_coder(), image_encoder=eye, image_processor=looks)


@case(
    "wan-2.2-i2v",
    call={**CLIP, "guidance_scale": 4.0, "guidance_scale_2": 3.0, "image": picture(50, 40)},
    options=SHORT,
)
def wan_22_i2v(key: str):
    second = seeded(wan_network(in_channels=36), key + "/second")
    return wan_i2v(key, wan_network(in_channels=36), wan_coder(), transformer_2=second, boundary_ratio=0.875)


@case(
    "wan-2.2-ti2v",
    call={"height": 64, "width": 96, "num_frames": 9, "guidance_scale": 5.0, "image": picture(100, 60)},
    options=SHORT,
)
def wan_22_ti2v(key: str):
    network = wan_network(in_channels=48, out_channels=48)
    return wan_i2v(key, network, wan_22_coder(key), expand_timesteps=True)
