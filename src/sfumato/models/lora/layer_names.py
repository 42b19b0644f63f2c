"""What layers are called elsewhere: in the original code of a network, in ComfyUI and in kohya's trainers.

Original code often joins what diffusers keeps apart (q, k and v as one layer); a rule says which.
Conventions: ComfyUI comfy/lora.py, sd-scripts and musubi-tuner networks/, diffusers lora_conversion_utils.py.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from sfumato.errors import Refused

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


DOUBLE_BLOCKS: list[Rule] = [
    (qkv(f"{BLOCK}.attn"), "double_blocks.#.img_attn.qkv"),
    (qkv(f"{BLOCK}.attn", *ADDED), "double_blocks.#.txt_attn.qkv"),
    ((f"{BLOCK}.attn.to_out.0",), "double_blocks.#.img_attn.proj"),
    ((f"{BLOCK}.attn.to_add_out",), "double_blocks.#.txt_attn.proj"),
    *mlp(f"{BLOCK}.ff", "double_blocks.#.img_mlp"),
    *mlp(f"{BLOCK}.ff_context", "double_blocks.#.txt_mlp"),
    ((f"{BLOCK}.norm1.linear",), "double_blocks.#.img_mod.lin"),
    ((f"{BLOCK}.norm1_context.linear",), "double_blocks.#.txt_mod.lin"),
]
"""Blocks of two streams, as FLUX calls them, and ComfyUI in HunyuanVideo too."""


def same(*layers: str) -> list[Rule]:
    """Layers whose original name is diffusers' own."""
    return [((layer,), layer) for layer in layers]


def renamed(pairs: Mapping[str, str], home: str = "", there: str = "") -> list[Rule]:
    """One layer each, the names below a home."""
    return [((home + ours,), there + theirs) for ours, theirs in pairs.items()]


def refined_attention(home: str) -> list[Rule]:
    """Attention of Lumina 2 (attn) and Z-Image (attention), whose refiners are built like their layers."""
    places = ("layers.#", "noise_refiner.#", "context_refiner.#")
    joined = [(qkv(f"{place}.{home}"), f"{place}.attention.qkv") for place in places]
    return joined + [((f"{place}.{home}.to_out.0",), f"{place}.attention.out") for place in places]


HALVES = ("AdaLayerNormContinuous", "AuraFlowPreFinalBlock")
"""Norms that read scale and shift from the halves of a layer; in original code the shift comes first."""


@dataclass(frozen=True)
class LayerNames:
    """How a family's layers are called elsewhere.

    Args:
        rules: original names, also where they are diffusers' own. comfyui, kohya: which names those read:
            "plain" is diffusers' own, "shared" too, in a network that has them itself, "original" the
            rules'; "" where no convention is published.
        kohya_holds: a regular expression of the layers that kohya's networks have room for.
        separable: ComfyUI also reads the parts of joined layers under diffusers' names.
        swapped: layers whose halves stand in the other order in the original code, besides those of HALVES.
        read_only: further names that files have. of_network: such names as follow from a network's config.
    """

    rules: tuple[Rule, ...] = ()
    comfyui: str = ""
    kohya: str = ""
    kohya_holds: str = ".*"
    separable: bool = False
    swapped: tuple[str, ...] = ()
    read_only: tuple[Rule, ...] = ()
    of_network: Callable[[Any], tuple[Rule, ...]] | None = None

    def read_rules(self, network: Any) -> tuple[Rule, ...]:
        """All names under which this network's layers may stand in a file."""
        derived = self.of_network(network) if self.of_network is not None else ()
        return (*self.rules, *self.read_only, *derived)

    def swaps(self, network: Any, layer: str) -> bool:
        """Whether the halves of this layer's rows stand in the other order in the original code."""
        home = type(network.get_submodule(layer.rpartition(".")[0])).__name__
        return home in HALVES or any(numbered(name).fullmatch(layer) for name in self.swapped)


def layer_names_of(family: Any) -> LayerNames:
    """What a denoiser's family says its layers are called; no rules where it has no family."""
    return LayerNames() if family is None else family.layer_names


def original(rules: Iterable[Rule], layers: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(original name, diffusers' layers that it holds, in order).

    All parts of a joined layer are named, whether or not they are among `layers`.

    Raises:
        Refused: a layer that no rule knows.
    """
    done: set[str] = set()
    unknown: list[str] = []
    for layer in layers:
        for parts, there in rules:
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
            unknown.append(layer)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise Refused(
            f"No name is known there for {', '.join(unknown[:3])}{more}, so nobody would read what was "
            "learned in them. Export --to diffusers, or train without them: leave them out of model.targets."
        )


def all_originals(rules: Iterable[Rule], layers: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """As `original`, under every rule that a layer has; those without a rule are left out."""
    for rule in rules:
        known = [layer for layer in layers if any(numbered(part).fullmatch(layer) for part in rule[0])]
        yield from original((rule,), known)


@cache
def numbered(part: str) -> re.Pattern[str]:
    """A name whose # stands for a number."""
    return re.compile(re.escape(part).replace(r"\#", r"(\d+)"))
