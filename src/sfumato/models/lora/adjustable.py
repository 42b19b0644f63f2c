"""How strongly LoRAs act, changed in place: a run's own adapter, and files whose base is kept.

A file is added to the weights, W + s·w·ΔW. To change s the weights are put back from a copy and the file is
added anew, so that they are, bit for bit, those of a model to which it was added with s·w at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.models.interface import Model
from sfumato.models.lora import adapter, key_conversion


@dataclass
class AdjustableFiles:
    """The LoRA files of a model that may act more or less, and the weights without them, on the host."""

    files: list[tuple[Path | str, float, str]] = field(default_factory=list)
    base: dict[nn.Module, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def add(self, model: Model, file: Path | str, weight: float, expert: str, scale: float) -> list[str]:
        """Add one more file, `scale` times its weight; returns the layers it changed."""
        self._keep(model, file, expert)
        changed = key_conversion.merge(model, file, weight * scale, expert)
        self.files.append((file, weight, expert))
        return changed

    def _keep(self, model: Model, file: Path | str, expert: str) -> None:
        """Copy the layers that a file changes, as they are, unless there is a copy."""
        changes = key_conversion.read_changes(model, file, expert)
        layers = {home: key_conversion.layers_of(one) for home, one in key_conversion.networks(model).items()}
        for home, name, _ in key_conversion.match_layers(model, changes, file):
            layer: Any = layers[home][name]
            if layer not in self.base:
                bias = getattr(layer, "bias", None)
                self.base[layer] = _copy(layer.weight), None if bias is None else _copy(bias)

    @torch.no_grad()
    def remove(self) -> None:
        """The weights without any of the files."""
        for module, (weight, bias) in self.base.items():
            layer: Any = module
            layer.weight.copy_(weight)
            if bias is None:
                layer.bias = None
            else:
                layer.bias.copy_(bias)

    def apply(self, model: Model, scale: float) -> None:
        """The weights with all of the files, `scale` times the weight of each."""
        self.remove()
        for file, weight, expert in self.files:
            key_conversion.merge(model, file, weight * scale, expert)

    @contextmanager
    def lifted(self, model: Model, scale: float) -> Iterator[None]:
        """Inside the block the files are not in the weights, which may be replaced; then they are again."""
        self.remove()
        yield
        self.base = {}
        for file, _, expert in self.files:
            self._keep(model, file, expert)
        self.apply(model, scale)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def own_adapters(model: Model) -> list[tuple[nn.Module, str]]:
    """(network, name) of the adapters a run was trained with: of its denoiser and its text encoders."""
    networks = list(key_conversion.networks(model).values())
    layers = [(one, layer) for one in networks for _, layer in adapter.adapted(one)]
    found = [(one, name) for one, layer in layers for name in getattr(layer, "whole_scale", {})]
    return list(dict.fromkeys(found))


def set_scale(model: Model, files: AdjustableFiles, scale: float) -> None:
    """Let the run's own adapter and the files act `scale` times as strongly as they were trained and given.

    Raises:
        Refused: there is no LoRA whose strength can be changed.
    """
    own = own_adapters(model)
    if not own and not files.files:
        raise Refused(
            "This model has no LoRA of its own, so there is nothing to scale. Give a run that trained one, "
            "or add a file: --lora FILE, in Python add_lora(FILE, keep_base=True)."
        )
    for network, name in own:
        adapter.scale(network, scale, name)
    if files.files:
        files.apply(model, scale)
