"""What layers are called elsewhere: in the original code of a network, in ComfyUI and in kohya's trainers.

Original code often joins what diffusers keeps apart (q, k and v as one layer); a rule says which.
Conventions: ComfyUI comfy/lora.py, sd-scripts and musubi-tuner networks/, diffusers lora_conversion_utils.py.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

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
"""Where most transformers of diffusers keep their blocks."""


def refined_attention(home: str) -> list[Rule]:
    """Attention of Lumina 2 (attn) and Z-Image (attention), whose refiners are built like their layers."""
    places = ("layers.#", "noise_refiner.#", "context_refiner.#")
    joined = [(qkv(f"{place}.{home}"), f"{place}.attention.qkv") for place in places]
    return joined + [((f"{place}.{home}.to_out.0",), f"{place}.attention.out") for place in places]


@dataclass(frozen=True)
class LayerNames:
    """How a family's layers are called elsewhere.

    Args:
        rules: original names, where they differ. comfyui, kohya: which names those read: "plain" is
            diffusers' own, "original" the rules'; "" where no convention is published.
    """

    rules: tuple[Rule, ...] = ()
    comfyui: str = ""
    kohya: str = ""


def layer_names_of(family: Any) -> LayerNames:
    """What a denoiser's family says its layers are called; no rules where it has no family."""
    return LayerNames() if family is None else family.layer_names


def original(names: LayerNames, layers: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
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
