"""LoRA files of others, read and written: diffusers', ComfyUI's and kohya's keys ↔ a network's layers.

W ← W + weight · alpha/rank · up · down        (DoRA: then every row is given its learned length)
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sfumato.errors import Refused

from . import adapters
from .interface import Model
from .lora_names import Names, names_of, original
from .pickles import must_be_safetensors
from .seal import HEADER, digest

ENDS = {
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_down.weight": "down", ".lora_up.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up", ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up", ".alpha": "alpha", ".dora_scale": "length",
    ".lora_magnitude_vector.weight": "length", ".lora_magnitude_vector": "length",
}  # fmt: skip
"""Ends of keys, the longer first where one ends another."""
DENOISER = (
    "base_model.model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
)
TEXT = {
    "text_encoder": ("text_encoder.", "lora_te_", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
    "text_encoder_3": ("text_encoder_3.", "lora_te3_"),
    "transformer_2": ("transformer_2.",),
}
PACKED = ("transformer_2", "transformer", "unet", *TEXT)
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps ranks and alphas, as JSON."""


@dataclass
class Change:
    """The change of one layer: down [r, in, …], up [out, r, …], and for DoRA the rows' lengths."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None
    length: Tensor | None = None
    rows: slice = field(default_factory=lambda: slice(None))
    """Which rows of `up` are this layer's, where the file joins several layers."""

    def delta(self, shape: torch.Size) -> Tensor:
        """alpha/rank · up · down, shaped as the layer's weight."""
        assert self.down is not None and self.up is not None
        rank = self.down.shape[0]
        scale = 1.0 if self.alpha is None else self.alpha / rank
        up = self.up.flatten(1)[self.rows].float()
        return scale * (up @ self.down.flatten(1).float()).view(shape)


def read(file: Path | str) -> tuple[dict[str, Change], dict[str, str]]:
    """(changes by the file's own names of layers, metadata).

    Raises:
        Refused: no such file, a pickle, a key that belongs to no LoRA.
    """
    path = Path(file).expanduser()
    if path.is_dir():
        inside = sorted(path.glob("*.safetensors"))
        if len(inside) != 1:
            raise Refused(f"{path} holds {len(inside)} safetensors files. Give the LoRA's file itself.")
        path = inside[0]
    if not path.is_file():
        raise Refused(f"{path} does not exist. Give the file of a LoRA (.safetensors).")
    must_be_safetensors(path)
    changes: dict[str, Change] = {}
    strange = []
    try:
        with safe_open(path, "pt") as opened:
            metadata = dict(opened.metadata() or {})
            whole = {key: opened.get_tensor(key) for key in sorted(opened.keys())}
            for key, tensor in whole.items():
                end = next((end for end in sorted(ENDS, key=len, reverse=True) if key.endswith(end)), None)
                if end is None:
                    strange.append(key)
                    continue
                change = changes.setdefault(key.removesuffix(end), Change())
                setattr(change, ENDS[end], float(tensor) if ENDS[end] == "alpha" else tensor)
    except (OSError, SafetensorError) as problem:
        raise Refused(f"{path} is damaged ({problem}). Copy it again.") from problem
    if metadata.get(HEADER, "") not in ("", digest(whole)):
        raise Refused(f"{path} is damaged: it does not have the checksum it was written with. Copy it again.")
    strange += [name for name, one in changes.items() if one.down is None or one.up is None]
    if strange or not changes:
        raise Refused(f"{path} is no LoRA that is known: {said(strange) or 'it is empty'}.")
    fill_alphas(changes, metadata)
    fill_from_peft(changes, path.with_name("adapter_config.json"))
    return changes, metadata


def fill_from_peft(changes: Mapping[str, Change], config: Path) -> None:
    """Alphas that peft wrote into a file beside the tensors.

    Raises:
        Refused: the file is damaged.
    """
    if not config.is_file() or not all(name.startswith("base_model.model.") for name in changes):
        return
    try:
        known = dict(json.loads(config.read_text(encoding="utf-8")))
    except ValueError as problem:
        raise Refused(f"{config} is damaged ({problem}). Copy it again.") from problem
    patterns = known.get("alpha_pattern") or {}
    for name, change in changes.items():
        if change.alpha is None and change.down is not None and known.get("lora_alpha"):
            alpha = patterns.get(name.removeprefix("base_model.model."), known["lora_alpha"])
            change.alpha = alpha * len(change.down) ** 0.5 if known.get("use_rslora") else float(alpha)


def weighted(said: str, key: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT.

    Raises:
        Refused: a weight that is no number.
    """
    file, colon, weight = said.rpartition(":")
    if not colon or Path(said).expanduser().exists() or "/" in weight or "\\" in weight:
        return said, 1.0
    try:
        return file, float(weight)
    except ValueError:
        raise Refused(f'{key} "{said}": "{weight}" is no weight. Write FILE or FILE:0.8.') from None


def fill_alphas(changes: Mapping[str, Change], metadata: Mapping[str, str]) -> None:
    """Alphas that diffusers wrote into the metadata instead of the tensors."""
    known = json.loads(metadata.get(METADATA, "{}"))
    for name, change in changes.items():
        home = next((prefix for prefix in PACKED if name.startswith(f"{prefix}.")), "")
        config = {
            key.removeprefix(f"{home}."): value for key, value in known.items() if key.startswith(f"{home}.")
        }
        if change.alpha is None and change.down is not None and config.get("lora_alpha"):
            layer, rank = name.removeprefix(f"{home}."), change.down.shape[0]
            alpha = (config.get("alpha_pattern") or {}).get(layer, config["lora_alpha"])
            change.alpha = alpha * rank**0.5 if config.get("use_rslora") else float(alpha)


def said(names: list[str], most: int = 3) -> str:
    """The first names of many."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f'"{name}"' for name in names[:most]) + rest


def networks(model: Model) -> dict[str, nn.Module]:
    """The networks a LoRA may change: the denoiser's under "", text encoders under their names."""
    found: dict[str, Any] = {"": adapters.body(model.denoiser)}
    if model.origin is not None:
        parts = model.origin.components.items()
        found |= {
            name: part
            for name, part in parts
            if name.startswith("text_encoder") and isinstance(part, nn.Module)
        }
    if hasattr(found[""], "noisy"):  # two experts: the second has a prefix of its own
        found |= {"": found[""].noisy, "transformer_2": found[""].clean}
    return found


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    """The layers with a weight that can be changed, by name without adapters' own."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    tuned = {
        name: layer.get_base_layer()
        for name, layer in network.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    plain = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, kinds) and not any(name.startswith(f"{other}.") for other in tuned)
    }
    return plain | tuned  # type: ignore[return-value]


def spellings(network: nn.Module, names: Names) -> dict[str, list[tuple[str, slice]]]:
    """Every name a file may give → the layers it means, with their rows of `up`."""
    layers = layers_of(network)
    found: dict[str, list[tuple[str, slice]]] = {}
    for name in layers:
        whole = [(name, slice(None))]
        for spelt in (name, f"text_model.{name}"):
            found[spelt] = found[spelt.replace(".", "_")] = whole
    for there, parts in original(names, layers):
        if any(part not in layers for part in parts):
            continue
        ends = torch.tensor([0, *(layers[part].weight.shape[0] for part in parts)]).cumsum(0).tolist()  # type: ignore[union-attr, index]
        rows = [(part, slice(a, b)) for part, a, b in zip(parts, ends[:-1], ends[1:], strict=True)]
        found[there] = found[there.replace(".", "_")] = rows
    return found


def placed(model: Model, changes: Mapping[str, Change], source: Any) -> Iterator[tuple[str, str, Change]]:
    """(network, layer, its change) of everything in a file.

    Raises:
        Refused: names or shapes that this model does not have.
    """
    family = str(model.info.get("family", ""))
    homes = networks(model)
    known = {
        home: spellings(network, names_of(family) if not home.startswith("text") else Names())
        for home, network in homes.items()
    }
    layers = {home: layers_of(network) for home, network in homes.items()}
    found: list[tuple[str, str, Change]] = []
    strange = []
    for name, change in in_our_blocks(model, changes).items():
        home, rest = home_of(name, homes)
        meant = known.get(home, {}).get(rest)
        if meant is None:
            strange.append(name)
            continue
        for layer, rows in meant:
            part = Change(change.down, change.up, change.alpha, change.length, rows)
            shape: torch.Size = layers[home][layer].weight.shape  # type: ignore[assignment]
            assert change.up is not None and change.down is not None
            if change.up[rows].shape[0] != shape[0] or change.down[0].numel() != shape[1:].numel():
                raise Refused(
                    f"{source} is a LoRA of another base: {name} changes {change.up[rows].shape[0]}×"
                    f"{change.down[0].numel()} numbers, but here {layer} has {shape[0]}×{shape[1:].numel()}."
                )
            found.append((home, layer, part))
    if strange:
        raise Refused(
            f"{source} is a LoRA of another base: {len(strange)} of its {len(changes)} layers are not in "
            f"{model.info.get('pipeline', 'this model')}: {said(strange)}."
        )
    yield from found


def in_our_blocks(model: Model, changes: Mapping[str, Change]) -> Mapping[str, Change]:
    """UNets of the original code count input and output blocks; diffusers says which are which."""
    if not any("lora_unet_input_blocks" in name or "lora_unet_output_blocks" in name for name in changes):
        return changes
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers as by_blocks

    renamed = by_blocks({f"{name}.alpha": name for name in changes}, model.origin.unet.config)
    return {key.removesuffix(".alpha"): changes[name] for key, name in renamed.items()}


def home_of(name: str, homes: Mapping[str, Any]) -> tuple[str, str]:
    """(network, layer as the file calls it)."""
    for home, prefixes in TEXT.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                return home, name.removeprefix(prefix)
    for prefix in DENOISER:
        name = name.removeprefix(prefix)
    return "", name


@torch.no_grad()
def merge(model: Model, file: Path | str, weight: float = 1.0, second: bool = False) -> list[str]:
    """Add a LoRA, `weight` times, to the model's weights; returns the layers for which it holds a change.

    Several files stack: each is added to what is there. `second`: the file is for the second of two experts.

    Raises:
        Refused: a file that is no LoRA, one of another base, or weights that are quantised.
    """
    changes, _ = read(file)
    if second:
        changes = {f"transformer_2.{home_of(name, {})[1]}": change for name, change in changes.items()}
    homes, changed = networks(model), []
    for home, layer, change in placed(model, changes, file):
        target: Any = layers_of(homes[home])[layer].weight
        if not target.is_floating_point():
            raise Refused(f"{layer} is quantised, so no LoRA can be added to it. Load the model unquantised.")
        before = target.float()
        after = before + change.delta(target.shape).to(before.device)
        if change.length is not None:
            axes = tuple(range(1, after.ndim))
            length = change.length.to(before).flatten()[change.rows].view(-1, *[1] * (after.ndim - 1))
            after = after * length / after.norm(dim=axes, keepdim=True)
        target.copy_((before + weight * (after - before)).to(target.dtype))
        assert change.up is not None
        if change.up[change.rows].any():
            changed.append(f"{home}.{layer}".removeprefix("."))
    return changed


def trained(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """An adapter's tensors under peft's names → layer → {down, up, length}."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        end = next(end for end in sorted(ENDS, key=len, reverse=True) if key.endswith(end))
        found.setdefault(key.removesuffix(end), {})[ENDS[end]] = tensor
    return found


def written(
    tensors: Mapping[str, Tensor], scale: float, names: Names, to: str, network: nn.Module
) -> dict[str, Tensor]:
    """An adapter's tensors (peft's names) under ComfyUI's or kohya's keys, with their alphas.

    Layers that the original code joins are joined exactly: ranks add up, each part keeps its own rows.

    Raises:
        Refused: no convention is known, or DoRA of layers that are joined.
    """
    style = getattr(names, to)
    if not style:
        raise Refused(f"{to} has no published names for this family's LoRA: export --to diffusers.")
    flat = to == "kohya" or style == "kohya"
    prefix = "lora_unet_" if flat else "transformer." if style == "plain" else "diffusion_model."
    layers = trained(tensors)
    rules = names if style == "original" else Names()
    out: dict[str, Tensor] = {}
    for there, parts in original(rules, layers):
        key = prefix + (there.replace(".", "_") if flat else there)
        one = joined([layers.get(part) for part in parts], parts, network)
        up, down = (".lora_up.weight", ".lora_down.weight") if flat else (".lora_B.weight", ".lora_A.weight")
        out[key + down], out[key + up] = one["down"].contiguous(), one["up"].contiguous()
        out[key + ".alpha"] = torch.tensor(scale * one["down"].shape[0])
        if "length" in one:
            out[key + ".dora_scale"] = one["length"].reshape(-1, *[1] * (one["down"].ndim - 1)).contiguous()
    return out


def joined(
    parts: list[dict[str, Tensor] | None], named: tuple[str, ...], network: nn.Module
) -> dict[str, Tensor]:
    """The change of several layers as that of one: downs stacked, ups on the diagonal; None is no change."""
    if len(parts) == 1:
        assert parts[0] is not None
        return parts[0]
    there = [part for part in parts if part is not None]
    if any("length" in part for part in there):
        raise Refused(
            f"{', '.join(named)} are one layer there, which DoRA cannot keep apart. Export --to diffusers."
        )
    heights = [int(cast(Tensor, network.get_submodule(name).weight).shape[0]) for name in named]
    down = torch.cat([part["down"] for part in there])
    up = down.new_zeros(sum(heights), down.shape[0])
    row = column = 0
    for part, height in zip(parts, heights, strict=True):
        if part is not None:
            width = part["up"].shape[1]
            up[row : row + height, column : column + width] = part["up"]
            column += width
        row += height
    return {"down": down, "up": up}
