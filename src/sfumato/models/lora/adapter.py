"""Adapters: a few new weights beside the layers of a frozen network, attached through peft.

    y = W·x + s · ΔW(x),   ΔW = B·A (LoRA), a Kronecker (LoKr) or a Hadamard product (LoHa)

At scale 0 the network is its base, bit for bit. Tensors leave and come back under peft's names, relative to
the network: `transformer_blocks.0.attn.to_q.lora_A.weight`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sfumato.errors import Refused, nearest
from sfumato.models.interface import Denoiser, seeded
from sfumato.models.networks.quantized import QuantizedLinear
from sfumato.models.patterns import BoundedPatterns

KINDS = ("lora", "lokr", "loha")
NAME = "default"
LAYERS = {"lora": (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), "lokr": (nn.Linear, nn.Conv1d, nn.Conv2d)}
LAYERS["loha"] = LAYERS["lokr"]
PATTERN = set(r"\^$*+?()[]{}|")
"""Letters that make a target a regular expression, matched against a layer's whole name."""
Config = Mapping[str, Any]


@dataclass(frozen=True)
class AdapterPlan:
    """What an adapter is: written beside it, so that it can be attached again.

    Args:
        kind: lora, lokr or loha. rank: of ΔW. alpha: ΔW is scaled by alpha/rank (rslora: alpha/√rank); 0
            stands for the rank. targets: ends of layers' names, regular expressions, `auto` (the family's)
            or `all`. dropout: of what ΔW is given (lora), or of whole rows of it. dora: magnitude and
            direction are learned apart (arXiv:2402.09353); rslora: arXiv:2312.03732. divisor: of lokr, what
            the sides of a layer are divided by, −1 about their roots; both: its small factor has a rank too.
    """

    kind: str = "lora"
    rank: int = 16
    alpha: float = 0.0
    targets: tuple[str, ...] = ("auto",)
    dropout: float = 0.0
    dora: bool = False
    rslora: bool = False
    divisor: int = -1
    both: bool = False
    seed: int = field(default=0, compare=False)

    def config(self, layers: Sequence[str]) -> Any:
        """peft's own config for exactly these layers.

        Raises:
            Refused: an option that this kind does not have.
        """
        import peft

        exactly = "|".join(re.escape(name) for name in layers)
        alpha: Any = self.alpha or self.rank
        if self.kind == "lora":
            return peft.LoraConfig(
                r=self.rank,
                lora_alpha=alpha,
                lora_dropout=self.dropout,
                use_dora=self.dora,
                use_rslora=self.rslora,
                target_modules=exactly,
            )
        for word, asked in (("dora", self.dora), ("rslora", self.rslora)):
            if asked:
                raise Refused(f'model.{word} is of LoRA alone; model.train is "{self.kind}". Leave it out.')
        known: dict[str, Any] = {"r": self.rank, "alpha": alpha, "rank_dropout": self.dropout}
        if self.kind == "lokr":
            known |= {"decompose_factor": self.divisor, "decompose_both": self.both}
        kind = {"lokr": peft.LoKrConfig, "loha": peft.LoHaConfig}[self.kind]
        return kind(target_modules=exactly, init_weights=True, **known)


def peft_target(denoiser: Denoiser) -> nn.Module:
    """The network whose layers adapters go to: diffusers' own, where there is one."""
    return denoiser.backbone


def chosen(network: nn.Module, plan: AdapterPlan, usual: Sequence[str] = ()) -> list[str]:
    """The names of the layers that the plan's targets mean.

    Args:
        usual: what `auto` stands for.
    Raises:
        Refused: a target that matches no layer, with the names that are nearest; a rank no layer can have.
    """
    kinds = LAYERS[plan.kind]
    layers = {name: layer for name, layer in network.named_modules() if name and isinstance(layer, kinds)}
    targets = list(usual) if plan.targets == ("auto",) else list(plan.targets)
    if not targets:
        raise Refused(
            f'{type(network).__name__} has no usual targets. Name layers: model.targets = ["to_q"].'
        )
    found: set[str] = set()
    patterns = BoundedPatterns()
    for target in targets:
        matched = {name for name in layers if _means(target, name, patterns)}
        if not matched and plan.targets != ("auto",):
            raise Refused(_unmatched(target, network, layers))
        found |= matched
    if not found:
        raise Refused(_unmatched(", ".join(targets), network, layers))
    widest = max(min(_sides(layers[name])) for name in found)
    if plan.rank > widest:
        raise Refused(
            f"model.rank is {plan.rank}, but no layer that model.targets names has more than {widest}: "
            f"choose at most {widest}."
        )
    return [name for name in layers if name in found]


def _means(target: str, name: str, patterns: BoundedPatterns) -> bool:
    """Whether a target means this layer."""
    if target == "all":
        return True
    if PATTERN & set(target):
        try:
            return patterns.fullmatch(target, name)
        except ValueError as problem:
            said = f'model.targets: "{target[:60]}" {problem}. Name ends of layers, as "to_q".'
            raise Refused(said) from problem
    return name == target or name.endswith(f".{target}")


def _unmatched(target: str, network: nn.Module, layers: Mapping[str, nn.Module]) -> str:
    """The sentence about a target that matches nothing."""
    ends = {name.rpartition(".")[2] if not name[-1].isdigit() else name for name in layers}
    ends |= {".".join(name.split(".")[-2:]) for name in layers if name[-1].isdigit()}
    short = {end for end in ends if end.count(".") < 2}
    return f'model.targets: "{target}" matches no layer of {type(network).__name__}.{nearest(target, short)}'


def _sides(layer: nn.Module) -> tuple[int, int]:
    """Numbers in and out of a layer: what bounds the rank of a change to it."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return layer.in_channels * layer.kernel_size[0] ** len(layer.kernel_size), layer.out_channels


def attach(network: nn.Module, plan: AdapterPlan, usual: Sequence[str] = (), name: str = NAME) -> list[str]:
    """Freeze the network and put an adapter beside its layers; returns the names of those layers.

    The adapter starts without effect, its random part drawn from `plan.seed`, in float32.

    Raises:
        Refused: a target or rank that fits nothing.
    """
    from peft import inject_adapter_in_model

    layers = chosen(network, plan, usual)
    network.requires_grad_(False)
    seeded(plan.seed, lambda: inject_adapter_in_model(plan.config(layers), network, name))
    if hasattr(network, "_hf_peft_config_loaded"):
        network._hf_peft_config_loaded = True  # type: ignore[assignment]  # diffusers' own functions ask for it
    for _, layer in adapted(network):
        for part, weight in layer.named_parameters():
            if f".{name}" in f".{part}" and weight.is_floating_point() and not part.startswith("base_layer"):
                weight.data = weight.data.float()
                weight.requires_grad_(True)
        layer.whole_scale = {**getattr(layer, "whole_scale", {}), name: layer.scaling.get(name, 1.0)}
    return layers


def adapted(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that carry adapters, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, layer) for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer))


def names(network: nn.Module) -> list[str]:
    """The names of the adapters that are attached."""
    return list(getattr(network, "peft_config", {}))


def state(network: nn.Module, name: str = NAME) -> dict[str, Tensor]:
    """The adapter's tensors under peft's names."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(network, adapter_name=name, save_embedding_layers=False))


def scale(network: nn.Module, factor: float, name: str = NAME) -> None:
    """Give the adapter `factor` times its trained strength; 0 is the base itself, bit for bit."""
    for _, layer in adapted(network):
        if name not in layer.whole_scale:
            continue
        layer.scaling[name] = factor * layer.whole_scale[name]
        active = [one for one in layer.active_adapters if one != name] + [name] * (factor != 0)
        layer._active_adapter = active  # set_adapter would also change what is trained


@contextmanager
def disabled(network: nn.Module, name: str = NAME) -> Iterator[None]:
    """Inside the block the network is its base."""
    scale(network, 0.0, name)
    try:
        yield
    finally:
        scale(network, 1.0, name)


def merge(network: nn.Module) -> None:
    """Add every adapter, at its present scale, to the base weights, and take the adapters away.

    Raises:
        Refused: the base's weights are quantised and cannot be added to.
    """
    for name, layer in list(adapted(network)):
        base = layer.get_base_layer()
        if isinstance(base, QuantizedLinear):
            raise Refused(
                f"{name} is stored narrow, so nothing can be added to it. Load the run to merge it."
            )
        layer.merge(safe_merge=False)
        home, _, last = name.rpartition(".")
        setattr(network.get_submodule(home), last, base)
    for leftover in ("peft_config", "active_adapter"):
        if leftover in vars(network):
            delattr(network, leftover)
    if hasattr(network, "_hf_peft_config_loaded"):
        network._hf_peft_config_loaded = False  # type: ignore[assignment]
