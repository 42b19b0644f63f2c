"""An adapter that goes on from a file, whoever wrote it: the same ΔW, with room for more ranks.

    ΔW = c · up · down                       becomes    A = [down; random], B = [up · c/s, 0]
    ΔW = c · (a₁ · b₁) ∘ (a₂ · b₂)           becomes    the same with [a₁ · c/s, 0], [b₁; random]
    ΔW = c · w₁ ⊗ w₂                         becomes    (w₁ · c/s) ⊗ w₂

with c the file's scale and s the new adapter's own, so that training begins exactly where the file ends.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.models.interface import Model
from sfumato.models.lora import adapter, key_conversion, lora_file, lycoris
from sfumato.models.lora.adapter import KINDS, AdapterPlan
from sfumato.models.lora.lora_file import WeightDelta


@dataclass(frozen=True)
class AdapterInit:
    """What a file changes: by network ("" is the denoiser) and layer."""

    file: Path
    changes: Mapping[str, Mapping[str, WeightDelta]]

    @property
    def rank(self) -> int:
        """The largest of its layers' ranks."""
        return max(one.rank for part in self.changes.values() for one in part.values())

    @property
    def kinds(self) -> list[str]:
        """Which kinds of change it holds."""
        return sorted({one.kind for part in self.changes.values() for one in part.values()})

    @property
    def is_dora(self) -> bool:
        """Whether it learned magnitudes apart."""
        return any(one.length is not None for part in self.changes.values() for one in part.values())

    @property
    def encoders(self) -> list[str]:
        """The text encoders it changes."""
        return [home for home in self.changes if home]


def read(model: Model, file: Path | str) -> AdapterInit:
    """What the file changes in this model.

    Raises:
        Refused: no LoRA, or one of another base.
    """
    path = Path(file)
    changes = key_conversion.read_changes(model, path)
    found: dict[str, dict[str, WeightDelta]] = {}
    two = hasattr(adapter.peft_target(model.denoiser), "noisy")
    for home, layer, change in key_conversion.match_layers(model, changes, path):
        if home in ("", "transformer_2"):
            expert = ("clean." if home else "noisy.") if two else ""
            found.setdefault("", {})[expert + layer] = change.of_own_rows()
        else:
            found.setdefault(home, {})[layer] = change
    return AdapterInit(path, found)


def config_from_file(start: AdapterInit, plan: AdapterPlan, given: set[str]) -> AdapterPlan:
    """The plan of an adapter that goes on from the file; what is `given` stands, the rest is the file's.

    Raises:
        Refused: a rank too small for the file, another kind of adapter.
    """
    check_kind(start, plan)
    if plan.kind == "lokr":
        plan = lycoris.lokr_shapes(start.file, start.changes.get("", {}), plan)
    least = lycoris.rank_of(start.changes.get("", {})) if plan.kind == "lokr" else start.rank
    rank = plan.rank if "rank" in given else least
    if rank < least:
        raise Refused(f"model.rank is {rank}, but {start.file} has rank {least}: choose at least that.")
    if start.is_dora and "dora" in given and not plan.dora:
        raise Refused(f"{start.file} is a DoRA, which model.dora = false cannot go on from. Leave that out.")
    targets = plan.targets
    if "targets" not in given and "" in start.changes:
        targets = tuple(f"{re.escape(layer)}()" for layer in sorted(start.changes[""]))
    return replace(plan, rank=rank, targets=targets, dora=plan.dora or start.is_dora)


def check_kind(start: AdapterInit, plan: AdapterPlan) -> None:
    """Raises Refused where an adapter of this kind cannot go on from the file."""
    kinds, all_of_it = start.kinds, [one for part in start.changes.values() for one in part.values()]
    biases = any(one.bias is not None for one in all_of_it)
    columns = any(one.is_by_column for one in all_of_it)
    joined = plan.kind != "lora" and any(one.rows != slice(None) for one in all_of_it)
    if kinds == [plan.kind] and not (biases or joined or columns or (plan.kind != "lora" and start.encoders)):
        return
    names = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "diff": "whole differences"}
    held = " and ".join(names[kind] for kind in kinds)
    if kinds == [plan.kind]:
        held += " of text encoders" if start.encoders and plan.kind != "lora" else ""
        held += " of layers that are several here" if joined else " and biases" if biases else ""
        held += " of columns (DoRA)" if columns else ""
    other = kinds != [plan.kind] and len(kinds) == 1 and kinds[0] in KINDS
    way = f'say model.train = "{kinds[0]}", or ' if other else ""
    raise Refused(
        f'model.init_adapter: {start.file} holds {held}, which model.train = "{plan.kind}" cannot go on '
        f"from: {way}name it as model.merge_loras, which makes it part of the base."
    )


def check(start: AdapterInit, layers: Sequence[str]) -> None:
    """Raises Refused where the file changes a layer of the denoiser that will carry no adapter."""
    if missing := sorted(set(start.changes.get("", {})) - set(layers)):
        raise Refused(
            f"{start.file} changes {lora_file.said(missing)}, which model.targets does not name. Leave "
            "model.targets out to train what the file changes."
        )


@torch.no_grad()
def fill(network: nn.Module, changes: Mapping[str, WeightDelta]) -> None:
    """Let the network's adapter say what a file says; every layer it changes carries one."""
    own: dict[str, Any] = dict(adapter.adapted(network))
    for layer, change in changes.items():
        set_lora_weights(own[layer], change)


def set_lora_weights(layer: Any, change: WeightDelta) -> None:
    """Fill one layer's adapter; ranks beyond the file's begin without effect."""
    if change.kind != "lora":
        lycoris.put(layer, change)
        return
    assert change.down is not None and change.up is not None
    name, rank = adapter.NAME, len(change.down)
    a: Tensor = layer.lora_A[name].weight
    b: Tensor = layer.lora_B[name].weight
    scale = change.scale / float(layer.scaling[name])
    a[:rank] = change.down.reshape(rank, *a.shape[1:]).to(a)
    b.zero_()
    b[:, :rank] = (scale * change.up.flatten(1)[change.rows]).reshape(-1, rank, *b.shape[2:]).to(b)
    if change.length is not None:
        magnitude: Tensor = layer.lora_magnitude_vector[name].weight
        length = change.length.flatten()[change.rows].to(magnitude)
        if change.of_base:
            base = layer.get_base_layer().weight.float()
            after = base + change.delta(base.shape).to(base.device)
            length = length * (after.flatten(1).norm(dim=1) / base.flatten(1).norm(dim=1)).to(length)
        magnitude.copy_(length.view_as(magnitude))
