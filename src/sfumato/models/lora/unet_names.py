"""What a UNet's layers are called in the original code of Stable Diffusion, which counts blocks through.

    input_blocks.0.0 = conv_in    input_blocks.n.0 a residual block, .1 its attention, .0.op a halving
    middle_block.0, .1, .2        output_blocks.n.0 a residual block, .1 its attention, last .conv a doubling

A LoRA of kohya's trainer for SDXL has these names, flat; ComfyUI saves any UNet's under them, with dots.
Source: Stability AI's generative-models, sgm/modules/diffusionmodules/openaimodel.py.
"""

from collections.abc import Iterator
from typing import Any

from sfumato.models.lora.layer_names import Rule

RESIDUAL = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
"""Layers of a residual block."""
UNET_BLOCKS = r"(down_blocks|mid_block|up_blocks)\..*"
"""The layers of a UNet that kohya's networks have room for."""
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
"""Layers outside the blocks."""


def unet_names(network: Any) -> tuple[Rule, ...]:
    """The rule of each layer of a diffusers UNet (UNet2DConditionModel); of others there are none."""
    if not hasattr(network, "mid_block") or not hasattr(network, "down_blocks"):
        return ()
    places = dict(_places(network))
    return tuple(
        ((name,), there) for name, layer in network.named_modules() if (there := _name(name, layer, places))
    )


def _places(network: Any) -> Iterator[tuple[str, str]]:
    """(part of a block, its original place)."""
    count = 1
    for i, block in enumerate(network.down_blocks):
        for j in range(len(block.resnets)):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{count}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{count}.1"
            count += 1
        if block.downsamplers is not None:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{count}.0.op"
            count += 1
    middle = network.mid_block
    for j in range(len(middle.resnets) if middle is not None else 0):
        yield f"mid_block.resnets.{j}", f"middle_block.{2 * j}"
        yield f"mid_block.attentions.{j}", f"middle_block.{2 * j + 1}"
    count = 0
    for i, block in enumerate(network.up_blocks):
        for j in range(len(block.resnets)):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{count}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{count}.1"
            count += 1
        if block.upsamplers is not None:
            behind = 2 if getattr(block, "attentions", None) else 1
            yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{count - 1}.{behind}.conv"


def _name(name: str, layer: Any, places: dict[str, str]) -> str:
    """A layer's original name; empty where the original code has none."""
    if getattr(layer, "weight", None) is None:
        return ""
    if name in OUTSIDE or name in places:
        return OUTSIDE.get(name) or places[name]
    block, inner = _split(name)
    if block not in places:
        return ""
    inner = RESIDUAL.get(inner, "") if ".resnets." in name else inner
    return f"{places[block]}.{inner}" if inner else ""


def _split(name: str) -> tuple[str, str]:
    """(block and part, what is within): down_blocks.0.attentions.1.proj_in at its second number."""
    words = name.split(".")
    cut = 3 if words[0] == "mid_block" else 4
    return ".".join(words[:cut]), ".".join(words[cut:])
