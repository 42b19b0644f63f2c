"""A second reading of LoRA files, which shares no table with ours: ComfyUI's names and arithmetic, as facts.

client_tables/comfyui/*.json hold what ComfyUI's own networks at tiny widths call their weights, and which
names of a file its loader takes for which of them. client_tables/kohya.json holds the layers that networks
of kohya's trainers make from a file with every name of their model. client_tables/golden.safetensors holds
weights that ComfyUI itself computed. To the makers' layout and back go diffusers' converters, the inverse by
following each number through.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from diffusers.loaders import single_file_utils as converters
from torch import Tensor

TABLES = Path(__file__).parent / "client_tables"
Weights = dict[str, Tensor]


def comfyui(name: str) -> dict[str, Any]:
    """ComfyUI's table of a family of the zoo: shapes of its weights, and names beside the usual two."""
    return json.loads((TABLES / "comfyui" / f"{name}.json").read_text(encoding="utf-8"))


def kohya(name: str) -> set[str]:
    """The layers that kohya's network has for this family."""
    return set(json.loads((TABLES / "kohya.json").read_text(encoding="utf-8"))[name]["holds"])


# ---------------------------------------------------------------- what ComfyUI does with one layer

ENDS = {
    ".lora_up.weight": "up", ".lora_down.weight": "down", ".lora_B.weight": "up", ".lora_A.weight": "down",
    ".lora_mid.weight": "mid", ".alpha": "alpha", ".dora_scale": "dora", ".diff": "diff", ".diff_b": "bias",
    **{f".{name}": name for name in (
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
    )},
}  # fmt: skip


def change_of(parts: Mapping[str, Tensor], shape: torch.Size) -> tuple[Tensor, float]:
    """(the change before its scale, the scale): LoRA, LoHa, LoKr."""
    alpha = float(parts["alpha"]) if "alpha" in parts else None
    if "up" in parts:
        change, rank = parts["up"].flatten(1) @ parts["down"].flatten(1), len(parts["down"])
    elif "hada_w1_a" in parts:
        change = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        rank = len(parts["hada_w1_b"])
    else:
        factors, rank = [], None
        for one in ("lokr_w1", "lokr_w2"):
            if one in parts:
                factors.append(parts[one])
            else:
                factors.append(parts[f"{one}_a"] @ parts[f"{one}_b"])
                rank = len(parts[f"{one}_b"])
        small, large = factors
        change = torch.kron(small.reshape(*small.shape, *[1] * (large.ndim - 2)), large)
    return change.reshape(shape), alpha / rank if alpha is not None and rank else 1.0


def patched(weight: Tensor, parts: Mapping[str, Tensor], offset: Any = None, swaps: bool = False) -> Tensor:
    """A weight as ComfyUI patches it at strength 1."""
    if offset is not None:
        whole = weight.clone()
        whole.narrow(*offset).copy_(patched(weight.narrow(*offset).clone(), parts, None, swaps))
        return whole
    turn: Callable[[Tensor], Tensor] = (lambda x: torch.cat(x.chunk(2)[::-1])) if swaps else (lambda x: x)
    if "diff" in parts:
        return weight + turn(parts["diff"])
    change, scale = change_of(parts, weight.shape)
    after = weight + turn(scale * change)
    if "dora" not in parts:
        return after
    dora = parts["dora"]
    if len(dora) == len(weight):
        length = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
    else:
        length = after.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *[1] * (weight.ndim - 2))
    return after * (dora / (length + torch.finfo(weight.dtype).eps))


def read_as_comfyui(name: str, tensors: Mapping[str, Tensor], weights: Weights) -> tuple[Weights, list[str]]:
    """(ComfyUI's weights once it has loaded a file, the keys that it did not take)."""
    table = comfyui(name)
    meant: dict[str, Any] = {}
    for key in table["shapes"]:
        if key.endswith(".weight"):
            meant["lora_unet_" + key.removesuffix(".weight").replace(".", "_")] = [key, None, False]
            meant["diffusion_model." + key.removesuffix(".weight")] = [key, None, False]
    meant |= table["names"]
    layers: dict[str, dict[str, Tensor]] = {}
    left: list[str] = []
    for key, tensor in tensors.items():
        end = next((end for end in sorted(ENDS, key=len, reverse=True) if key.endswith(end)), "")
        if end and key.removesuffix(end) in meant:
            layers.setdefault(key.removesuffix(end), {})[ENDS[end]] = tensor
        else:
            left.append(key)
    out = dict(weights)
    for layer, parts in layers.items():
        key, offset, swaps = meant[layer]
        out[key] = patched(out[key].clone(), parts, offset, swaps)
    return out, left


# ---------------------------------------------------------------- the makers' layout and diffusers'


def narrowed(convert: Any, widths: Mapping[int, int]) -> Any:
    """One of diffusers' converters with other numbers for the real widths that are written into it."""

    def within(code: CodeType) -> CodeType:
        known = [within(one) if isinstance(one, CodeType) else one for one in code.co_consts]
        known = [widths.get(one, one) if type(one) is int else one for one in known]
        return code.replace(co_consts=tuple(known))

    return FunctionType(within(convert.__code__), convert.__globals__)


CONVERTERS: dict[str, Any] = {
    "flux-dev": narrowed(converters.convert_flux_transformer_checkpoint_to_diffusers, {3072: 32}),
    "chroma": narrowed(converters.convert_chroma_transformer_checkpoint_to_diffusers, {3072: 32}),
    "flux-2-klein": converters.convert_flux2_transformer_checkpoint_to_diffusers,
    "z-image": converters.convert_z_image_transformer_checkpoint_to_diffusers,
    "lumina-2": narrowed(converters.convert_lumina2_to_diffusers, {2304: 48, 768: 24}),
    "wan-2.1": converters.convert_wan_transformer_to_diffusers,
    "wan-2.1-i2v": converters.convert_wan_transformer_to_diffusers,
    "wan-2.2-5b": converters.convert_wan_transformer_to_diffusers,
    "ltx-video": converters.convert_ltx_transformer_checkpoint_to_diffusers,
    "hunyuan-video": narrowed(converters.convert_hunyuan_video_transformer_to_diffusers, {3072: 32}),
    "mochi": narrowed(converters.convert_mochi_transformer_checkpoint_to_diffusers, {48: 2}),
    "stable-diffusion-3.5": converters.convert_sd3_transformer_checkpoint_to_diffusers,
    "auraflow": converters.convert_auraflow_transformer_checkpoint_to_diffusers,
}
BY_NAMES = ("stable-diffusion-1.5", "stable-diffusion-xl", "pixart-sigma")
"""Families whose converter wants more than the denoiser: ComfyUI's own table says which weight is which."""

HUNYUAN = [
    (r"\.(img|txt)_attn\.norm\.query_norm\.weight$", r".\1_attn_q_norm.weight"),
    (r"\.(img|txt)_attn\.norm\.key_norm\.weight$", r".\1_attn_k_norm.weight"),
    (r"\.norm\.query_norm\.weight$", ".q_norm.weight"), (r"\.norm\.key_norm\.weight$", ".k_norm.weight"),
    (r"_attn\.(qkv|proj)\.", r"_attn_\1."), (r"_mod\.lin\.", "_mod.linear."),
    (r"modulation\.lin\.", "modulation.linear."), (r"mlp\.0\.", "mlp.fc1."), (r"mlp\.2\.", "mlp.fc2."),
    (r"^(time|guidance)_in\.in_layer", r"\1_in.mlp.0"), (r"^(time|guidance)_in\.out_layer", r"\1_in.mlp.2"),
    (r"t_embedder\.in_layer", "t_embedder.mlp.0"), (r"t_embedder\.out_layer", "t_embedder.mlp.2"),
    (r"c_embedder\.in_layer", "c_embedder.linear_1"), (r"c_embedder\.out_layer", "c_embedder.linear_2"),
]  # fmt: skip
"""ComfyUI's names inside its HunyuanVideo → those of the makers' file."""


def makers_name(name: str, key: str) -> str:
    """What the makers' file calls a weight of ComfyUI's network."""
    if name == "hunyuan-video":
        for pattern, there in HUNYUAN:
            key = re.sub(pattern, there, key)
    if name in ("flux-dev", "chroma", "flux-2-klein"):
        key = re.sub(r"(query_norm|key_norm|norms\.\d+)\.weight$", r"\1.scale", key)
    return key


def to_diffusers(name: str, weights: Weights, config: Any) -> Weights:
    """Weights of ComfyUI's network under diffusers' names."""
    if name == "qwen-image":
        return dict(weights)
    if name in BY_NAMES:
        out = {}
        for there, (key, offset, _) in comfyui(name)["names"].items():
            plain = there.removeprefix("lora_unet_").removeprefix("transformer.")
            out[f"{plain.replace('.', '_')}.weight"] = (
                weights[key] if offset is None else weights[key].narrow(*offset)
            )
        return out
    return CONVERTERS[name]({makers_name(name, key): one for key, one in weights.items()}, config=config)


def flat_where_needed(name: str, weights: Weights) -> Weights:
    """A diffusers network's weights, flat where the table's names are."""
    if name not in BY_NAMES:
        return weights
    return {
        f"{key.removesuffix('.weight').replace('.', '_')}.weight": one
        for key, one in weights.items()
        if key.endswith(".weight")
    }


def in_makers_layout(name: str, network: Any) -> tuple[Weights, set[str]]:
    """(a network's weights as ComfyUI's network has them, those that diffusers' network has at all).

    The converter's inverse, each number followed through. Widths that ComfyUI fixes are the network's.
    """
    ours = flat_where_needed(name, {key: one.detach() for key, one in network.state_dict().items()})
    shapes = {key: list(shape) for key, shape in comfyui(name)["shapes"].items()}
    if name in BY_NAMES[:2]:
        shapes = {key: [1] for key in shapes if key.endswith(".weight")}
    first = to_diffusers(name, marks_of(shapes), network.config)
    ends = torch.tensor([torch.Size(shape).numel() for shape in shapes.values()]).cumsum(0)
    for key, places in first.items():
        if key in ours and places.shape != ours[key].shape:
            whose = torch.searchsorted(ends, places.flatten().long(), right=True).unique()
            assert len(whose) == 1, (key, places.shape, ours[key].shape)
            shapes[list(shapes)[int(whose)]] = list(ours[key].shape)
    marks = marks_of(shapes)
    flat = torch.full((sum(mark.numel() for mark in marks.values()),), torch.nan)
    for key, places in to_diffusers(name, marks, network.config).items():
        if key in ours:
            flat[places.flatten().long()] = ours[key].flatten().float()
    weights = {key: flat[mark.flatten().long()].reshape(mark.shape) for key, mark in marks.items()}
    used = {key for key, one in weights.items() if not one.isnan().any()}
    return {key: one.nan_to_num() for key, one in weights.items()}, used


def marks_of(shapes: Mapping[str, Any]) -> Weights:
    """A number of its own for each place of each weight."""
    count, marks = 0, {}
    for key, shape in shapes.items():
        size = torch.Size(shape).numel()
        marks[key] = torch.arange(count, count + size, dtype=torch.float64).reshape(shape)
        count += size
    return marks


def difference(name: str, theirs: Weights, network: Any) -> tuple[float, str]:
    """(the largest difference of any weight, whose) of ComfyUI's weights and a diffusers network's."""
    got = to_diffusers(name, theirs, network.config)
    ours = flat_where_needed(name, network.state_dict())
    both = [key for key in got if key in ours]
    assert len(both) > 10
    return max((float((got[key] - ours[key]).abs().max()), key) for key in both)
