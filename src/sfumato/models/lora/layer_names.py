"""What layers are called elsewhere: in the original code of a network, in ComfyUI and in kohya's trainers.

Original code often joins what diffusers keeps apart (q, k and v as one layer); a rule says which.
Conventions: ComfyUI comfy/lora.py, sd-scripts and musubi-tuner networks/, diffusers lora_conversion_utils.py.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

Rule = tuple[tuple[str, ...], str]
"""(diffusers' names, one behind the other in the original layer; the original name); # is a number."""


def qkv(home: str, *names: str) -> tuple[str, ...]:
    """The names of layers beside each other."""
    return tuple(f"{home}.{name}" for name in names or ("to_q", "to_k", "to_v"))


ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def mlp(home: str, there: str, first: str = "0", second: str = "2") -> list[Rule]:
    """The two layers of a feed-forward."""
    return [((f"{home}.net.0.proj",), f"{there}.{first}"), ((f"{home}.net.2",), f"{there}.{second}")]


BLOCK, SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"
FLUX: list[Rule] = [
    (qkv(f"{BLOCK}.attn"), "double_blocks.#.img_attn.qkv"),
    (qkv(f"{BLOCK}.attn", *ADDED), "double_blocks.#.txt_attn.qkv"),
    ((f"{BLOCK}.attn.to_out.0",), "double_blocks.#.img_attn.proj"),
    ((f"{BLOCK}.attn.to_add_out",), "double_blocks.#.txt_attn.proj"),
    *mlp(f"{BLOCK}.ff", "double_blocks.#.img_mlp"),
    *mlp(f"{BLOCK}.ff_context", "double_blocks.#.txt_mlp"),
    ((f"{BLOCK}.norm1.linear",), "double_blocks.#.img_mod.lin"),
    ((f"{BLOCK}.norm1_context.linear",), "double_blocks.#.txt_mod.lin"),
    ((*qkv(f"{SINGLE}.attn"), f"{SINGLE}.proj_mlp"), "single_blocks.#.linear1"),
    ((f"{SINGLE}.proj_out",), "single_blocks.#.linear2"),
    ((f"{SINGLE}.norm.linear",), "single_blocks.#.modulation.lin"),
]
HUNYUAN: list[Rule] = [
    (qkv(f"{BLOCK}.attn"), "double_blocks.#.img_attn_qkv"),
    (qkv(f"{BLOCK}.attn", *ADDED), "double_blocks.#.txt_attn_qkv"),
    ((f"{BLOCK}.attn.to_out.0",), "double_blocks.#.img_attn_proj"),
    ((f"{BLOCK}.attn.to_add_out",), "double_blocks.#.txt_attn_proj"),
    *mlp(f"{BLOCK}.ff", "double_blocks.#.img_mlp", "fc1", "fc2"),
    *mlp(f"{BLOCK}.ff_context", "double_blocks.#.txt_mlp", "fc1", "fc2"),
    ((*qkv(f"{SINGLE}.attn"), f"{SINGLE}.proj_mlp"), "single_blocks.#.linear1"),
    ((f"{SINGLE}.proj_out",), "single_blocks.#.linear2"),
]
SD3: list[Rule] = [
    (qkv(f"{BLOCK}.attn"), "joint_blocks.#.x_block.attn.qkv"),
    (qkv(f"{BLOCK}.attn2"), "joint_blocks.#.x_block.attn2.qkv"),
    (qkv(f"{BLOCK}.attn", *ADDED), "joint_blocks.#.context_block.attn.qkv"),
    ((f"{BLOCK}.attn.to_out.0",), "joint_blocks.#.x_block.attn.proj"),
    ((f"{BLOCK}.attn2.to_out.0",), "joint_blocks.#.x_block.attn2.proj"),
    ((f"{BLOCK}.attn.to_add_out",), "joint_blocks.#.context_block.attn.proj"),
    *mlp(f"{BLOCK}.ff", "joint_blocks.#.x_block.mlp", "fc1", "fc2"),
    *mlp(f"{BLOCK}.ff_context", "joint_blocks.#.context_block.mlp", "fc1", "fc2"),
]
WAN: list[Rule] = [
    *[
        ((f"blocks.#.{ours}.{mine}",), f"blocks.#.{theirs}.{name}")
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for mine, name in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
    ],
    (("blocks.#.attn2.add_k_proj",), "blocks.#.cross_attn.k_img"),
    (("blocks.#.attn2.add_v_proj",), "blocks.#.cross_attn.v_img"),
    *mlp("blocks.#.ffn", "blocks.#.ffn"),
    *[
        ((f"blocks.#.{ours}.{norm}",), f"blocks.#.{theirs}.{norm}")
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for norm in ("norm_q", "norm_k")
    ],
    (("blocks.#.attn2.norm_added_k",), "blocks.#.cross_attn.norm_k_img"),
    (("blocks.#.norm2",), "blocks.#.norm3"),
    (("condition_embedder.time_embedder.linear_1",), "time_embedding.0"),
    (("condition_embedder.time_embedder.linear_2",), "time_embedding.2"),
    (("condition_embedder.time_proj",), "time_projection.1"),
    (("condition_embedder.text_embedder.linear_1",), "text_embedding.0"),
    (("condition_embedder.text_embedder.linear_2",), "text_embedding.2"),
    (("proj_out",), "head.head"),
]
MOCHI: list[Rule] = [
    (qkv(f"{BLOCK}.attn1"), "blocks.#.attn.qkv_x"),
    (qkv(f"{BLOCK}.attn1", *ADDED), "blocks.#.attn.qkv_y"),
    ((f"{BLOCK}.attn1.to_out.0",), "blocks.#.attn.proj_x"),
    ((f"{BLOCK}.attn1.to_add_out",), "blocks.#.attn.proj_y"),
]


def gathered(home: str) -> list[Rule]:
    """Attention of Lumina 2 (attn) and Z-Image (attention), whose refiners are built like their layers."""
    places = ("layers.#", "noise_refiner.#", "context_refiner.#")
    joined = [(qkv(f"{place}.{home}"), f"{place}.attention.qkv") for place in places]
    return joined + [((f"{place}.{home}.to_out.0",), f"{place}.attention.out") for place in places]


@dataclass(frozen=True)
class Names:
    """How a family's layers are called elsewhere.

    Args:
        rules: original names, where they differ. comfyui, kohya: which names those read: "plain" is
            diffusers' own, "original" the rules'; "" where no convention is published.
    """

    rules: tuple[Rule, ...] = ()
    comfyui: str = ""
    kohya: str = ""


UNET = Names((), "kohya", "plain")
NAMES: dict[str, Names] = {
    "StableDiffusion": UNET,
    "StableDiffusionXL": UNET,
    "StableDiffusion3": Names(tuple(SD3), "plain", "original"),
    "Flux": Names(tuple(FLUX), "plain", "original"),
    "FluxKontext": Names(tuple(FLUX), "plain", "original"),
    "Chroma": Names(tuple(FLUX), "original", "original"),
    "AuraFlow": Names((), "plain", ""),
    "PixArtSigma": Names((), "plain", ""),
    "QwenImage": Names((), "plain", "plain"),
    "QwenImageEdit": Names((), "plain", "plain"),
    "LTXVideo": Names((), "original", ""),
    "Wan": Names(tuple(WAN), "original", "original"),
    "WanFromPicture": Names(tuple(WAN), "original", "original"),
    "HunyuanVideo": Names(tuple(HUNYUAN), "original", "original"),
    "Mochi": Names(tuple(MOCHI), "original", ""),
    "Lumina2": Names(tuple(gathered("attn")), "original", "original"),
    "ZImage": Names(tuple(gathered("attention")), "original", "original"),
}


def names_of(family: str) -> Names:
    """A family's names elsewhere; without rules where nothing is known."""
    return NAMES.get(family, Names())


def original(names: Names, layers: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(original name, diffusers' layers that it holds, in order); layers without a rule keep their name.

    All parts of a joined layer are named, whether or not they are among `layers`.
    """
    done: set[str] = set()
    for layer in layers:
        for parts, there in names.rules:
            found = next((one for part in parts if (one := numbered(part).fullmatch(layer))), None)
            if found is None:
                continue
            block = found[1] if found.re.groups else ""
            name = there.replace("#", block)
            if name not in done:
                done.add(name)
                yield name, tuple(part.replace("#", block) for part in parts)
            break
        else:
            yield layer, (layer,)


@cache
def numbered(part: str) -> re.Pattern[str]:
    """A name whose # stands for a number."""
    return re.compile(re.escape(part).replace(r"\#", r"(\d+)"))
