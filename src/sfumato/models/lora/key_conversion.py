"""LoRA files of others, read and written: diffusers', ComfyUI's and kohya's keys ↔ a network's layers.

W ← W + weight · ΔW        (DoRA: then every row is given its learned length)
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato.errors import Refused, one_of
from sfumato.models.interface import Model
from sfumato.models.lora import adapter, experts
from sfumato.models.lora.layer_names import LayerNames, all_originals, layer_names_of, original
from sfumato.models.lora.lora_file import (
    ENDS,
    WeightDelta,
    end_of,
    files_in,
    read,
    said,
    swapped_halves,
)

DENOISER = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
T5 = "text_encoders.t5xxl.transformer."
TEXT = {
    "text_encoder": ("text_encoder.", "lora_te_", "lora_te1_", "text_encoders.clip_l.transformer."),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_", "text_encoders.clip_g.transformer."),
    "text_encoder_3": ("text_encoder_3.", "lora_te3_", T5),
    "transformer_2": ("transformer_2.",),
}


def weighted(said: str, key: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT.

    Raises:
        Refused: a weight that is no number.
    """
    file, colon, weight = said.rpartition(":")
    if not colon or Path(said).expanduser().exists() or "/" in weight or "\\" in weight:
        return said, 1.0
    try:
        number = float(weight)
        if not math.isfinite(number):
            raise ValueError
        return file, number
    except ValueError:
        raise Refused(f'{key} "{said}": "{weight}" is no weight. Write FILE or FILE:0.8.') from None


def networks(model: Model) -> dict[str, nn.Module]:
    """The networks a LoRA may change: the denoiser's under "", text encoders under their names."""
    found: dict[str, Any] = {"": adapter.peft_target(model.denoiser)}
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

    tuned = {
        name: layer.get_base_layer()
        for name, layer in network.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    plain = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(getattr(layer, "weight", None), nn.Parameter)
        and not any(name.startswith(f"{other}.") for other in tuned)
    }
    return plain | tuned  # type: ignore[return-value]


def spellings(network: nn.Module, names: LayerNames) -> dict[str, list[tuple[str, slice, bool]]]:
    """Every name a file may give → (layer, its rows of `up`, whether halves are swapped) of what it means."""
    layers = layers_of(network)
    found: dict[str, list[tuple[str, slice, bool]]] = {}
    for name in layers:
        whole = [(name, slice(None), False)]
        for spelt in (name, f"text_model.{name}"):
            found[spelt] = found[spelt.replace(".", "_")] = whole
    for there, parts in all_originals(names.read_rules(network), layers):
        if any(part not in layers for part in parts):
            continue
        ends = torch.tensor([0, *(layers[part].weight.shape[0] for part in parts)]).cumsum(0).tolist()  # type: ignore[union-attr, index]
        rows = [(part, slice(a, b), False) for part, a, b in zip(parts, ends[:-1], ends[1:], strict=True)]
        whole = [(parts[0], slice(None), names.swaps(network, parts[0]))]
        found[there] = found[there.replace(".", "_")] = whole if len(parts) == 1 else rows
    return found


def match_layers(
    model: Model, changes: Mapping[str, WeightDelta], source: Any
) -> Iterator[tuple[str, str, WeightDelta]]:
    """(network, layer, its change) of everything in a file.

    Raises:
        Refused: names or shapes that this model does not have.
    """
    names = layer_names_of(model.denoiser.family)
    homes = networks(model)
    known = {
        home: spellings(network, names if not home.startswith("text") else LayerNames())
        for home, network in homes.items()
    }
    layers = {home: layers_of(network) for home, network in homes.items()}
    found: list[tuple[str, str, WeightDelta]] = []
    strange = []
    for name, change in changes.items():
        home, rest = home_of(name, homes)
        meant = known.get(home, {}).get(rest)
        if meant is None:
            strange.append(name)
            continue
        for layer, rows, is_swapped in meant:
            part = change.with_halves_swapped() if is_swapped else replace(change, rows=rows)
            shape: torch.Size = layers[home][layer].weight.shape  # type: ignore[assignment]
            there, here = part.sides(shape), (shape[0], shape[1:].numel())
            if there != here:
                raise Refused(
                    f"{source} is a LoRA of another base: {name} changes {there[0]}×{there[1]} numbers, but "
                    f"here {layer} has {here[0]}×{here[1]}."
                )
            if problem := part.misplaced(shape):
                raise Refused(f"{source} is damaged: of {said([name])} {problem}. Get the file again.")
            found.append((home, layer, part))
    if strange:
        raise Refused(
            f"{source} is a LoRA of another base: {len(strange)} of its {len(changes)} layers are not in "
            f"{model.info.get('pipeline', 'this model')}: {said(strange)}."
        )
    yield from found


def home_of(name: str, homes: Mapping[str, Any]) -> tuple[str, str]:
    """(network, layer as the file calls it)."""
    for home, prefixes in TEXT.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                is_t5 = prefix == T5 or (
                    home == "text_encoder_3" and home not in homes
                )  # kohya's third for FLUX
                readers = [n for n, one in homes.items() if type(one).__name__.startswith(("T5", "UMT5"))]
                return (readers[0] if is_t5 and readers else home), name.removeprefix(prefix)
    for prefix in DENOISER:
        name = name.removeprefix(prefix)
    return "", name


def read_changes(model: Model, file: Path | str, expert: str = "") -> dict[str, WeightDelta]:
    """What a file, or a folder with both files of a pair, changes: by the file's own names of layers.

    Those of the second of two experts begin with `transformer_2.`, whichever way the file says so.

    Args:
        expert: high, low or both: the network that the file is for, where it does not say so itself.
    Raises:
        Refused: a file that is no LoRA; an expert of a model that has none; a pair for one expert.
    """
    path, word = experts.split_expert(file)
    word = one_of("The expert of a LoRA", expert or word, experts.EXPERTS) if expert or word else ""
    has_two = hasattr(adapter.peft_target(model.denoiser), "noisy")
    if word and not has_two:
        raise Refused(
            f"{file}: {model.info.get('pipeline', 'this model')} has one network. Leave @{word} out."
        )
    found: dict[str, WeightDelta] = {}
    files = files_in(path, pair=has_two and not word)
    for one in files:
        changes, metadata = read(one)
        split = any(name.startswith(experts.SECOND) for name in changes)
        if has_two and not (split and not word):
            chosen = word or experts.expert_of(one, changes, metadata)
            changes = for_expert(changes, chosen)
        if twice := found.keys() & changes.keys():
            raise Refused(
                f"{path} holds two files for one network ({said(sorted(twice))}). Give them one by one."
            )
        found |= changes
    return found


def for_expert(changes: Mapping[str, WeightDelta], expert: str) -> dict[str, WeightDelta]:
    """The changes under names of the expert they are for; text encoders, which both hear, keep theirs."""
    found: dict[str, WeightDelta] = {}
    for name, change in changes.items():
        home, rest = home_of(name, {})
        if home.startswith("text"):
            found[name] = change
            continue
        if expert in ("high", "both"):
            found[rest if home else name] = change
        if expert in ("low", "both"):
            found[f"{experts.SECOND}{rest}"] = change
    return found


@torch.no_grad()
def merge(model: Model, file: Path | str, weight: float = 1.0, expert: str = "") -> list[str]:
    """Add a LoRA, `weight` times, to the model's weights; returns the layers for which it holds a change.

    Several files stack: each is added to what is there.

    Args:
        file: of a LoRA; of a pair for two experts FILE@high, FILE@low, or the folder that holds both.
        expert: high, low or both, as after @.
    Raises:
        Refused: a file that is no LoRA, one of another base, or weights that are quantised.
    """
    if not math.isfinite(weight):
        raise Refused(f"{file}: {weight} is no weight of a LoRA. Give a number, as 0.8.")
    changes = read_changes(model, file, expert)
    homes, changed = networks(model), list[str]()
    layers: dict[str, dict[str, Any]] = {home: layers_of(network) for home, network in homes.items()}
    for home, layer, change in match_layers(model, changes, file):
        if not layers[home][layer].weight.is_floating_point():
            raise Refused(f"{layer} is quantised, so no LoRA can be added to it. Load the model unquantised.")
        add(layers[home][layer], change, weight)
        if change.acts:
            changed.append(f"{home}.{layer}".removeprefix("."))
    return changed


def add(layer: Any, change: WeightDelta, weight: float) -> None:
    """Add a change, `weight` times, to a layer's weight and bias."""
    if change.kind != "diff" or change.diff is not None:
        before = layer.weight.float()
        after = before + change.delta(before.shape).to(before.device)
        if change.length is not None:
            after = change.lengthened(after, before)
        layer.weight.copy_((before + weight * (after - before)).to(layer.weight.dtype))
    if change.bias is not None:
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0].flatten()), requires_grad=False)
        layer.bias += weight * change.bias[change.rows].to(layer.bias)


def trained(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """An adapter's tensors under peft's names → layer → {down, up, length}."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        end = end_of(key)
        found.setdefault(key.removesuffix(end), {})[ENDS[end]] = tensor
    return found


def to_target_keys(
    tensors: Mapping[str, Tensor], scale: float, names: LayerNames, to: str, network: nn.Module
) -> dict[str, Tensor]:
    """An adapter's tensors (peft's names) under ComfyUI's or kohya's keys, with their alphas.

    Layers that the original code joins are joined exactly: ranks add up, each part keeps its own rows.

    Raises:
        Refused: no convention is known, or no name of a layer; DoRA, LoHa or LoKr of layers that are joined.
    """
    style = getattr(names, to)
    if not style:
        raise Refused(f"{to} has no published names for this family's LoRA: export --to diffusers.")
    flat = to == "kohya" or style == "kohya"
    prefix = "lora_unet_" if flat else "transformer." if style == "plain" else "diffusion_model."
    layers = trained(tensors)
    must_have_room(names, to, layers)
    is_lora = "up" in next(iter(layers.values()))
    may_join = is_lora and not any("length" in one for one in layers.values())
    out: dict[str, Tensor] = {}
    plain: list[tuple[str, tuple[str, ...]]] = [(layer, (layer,)) for layer in layers]
    for there, parts in original(names.rules, layers) if style == "original" else plain:
        if len(parts) > 1 and not may_join and names.separable and to == "comfyui":
            for part in (part for part in parts if part in layers):
                out |= keyed(f"transformer.{part}", layers, (part,), scale, to, network, False)
            continue
        key = prefix + (there.replace(".", "_") if flat else there)
        swaps = len(parts) == 1 and style != "kohya" and names.swaps(network, next(iter(parts)))
        if swaps and style == "plain" and to == "comfyui" and not may_join and is_lora:
            key = "diffusion_model." + next(original(names.rules, parts))[0]  # lengths are of ComfyUI's rows
        elif style != "original":
            swaps = False
        out |= keyed(key, layers, parts, scale, to, network, swaps)
    return out


def must_have_room(names: LayerNames, to: str, layers: Iterable[str]) -> None:
    """Raises Refused where kohya's networks have no room for a layer."""
    outside = [name for name in layers if not re.fullmatch(names.kohya_holds, name)] if to == "kohya" else []
    if outside:
        raise Refused(
            f"kohya's trainers have no LoRA for {said(outside)}, and would leave out what was learned there. "
            "Export --to comfyui or diffusers, or train without them: leave them out of model.targets."
        )


def keyed(
    key: str,
    layers: Mapping[str, dict[str, Tensor]],
    parts: tuple[str, ...],
    scale: float,
    to: str,
    network: nn.Module,
    swaps: bool,
) -> dict[str, Tensor]:
    """The tensors of one layer of a target; `swaps`: the halves of its rows are in the other order there."""
    if "up" not in next(iter(layers.values())):
        return as_lycoris(key, layers, parts, scale, swaps)
    flat = key.startswith("lora_unet_")
    one = fuse_split_layers([layers.get(part) for part in parts], parts, network)
    if "length" in one and to == "comfyui":
        one["length"] = length_for_comfyui(one, scale, cast(Tensor, network.get_submodule(parts[0]).weight))
    if swaps:
        one |= {name: swapped_halves(one[name]) for name in ("up", "length") if name in one}
    up, down = (".lora_up.weight", ".lora_down.weight") if flat else (".lora_B.weight", ".lora_A.weight")
    out = {key + down: one["down"].contiguous(), key + up: one["up"].contiguous()}
    out[key + ".alpha"] = torch.tensor(scale * one["down"].shape[0])
    if "length" in one:
        out[key + ".dora_scale"] = one["length"].reshape(-1, *[1] * (one["down"].ndim - 1)).contiguous()
    return out


def length_for_comfyui(one: Mapping[str, Tensor], scale: float, weight: Tensor) -> Tensor:
    """The lengths [out] with which ComfyUI makes rows of length m: m·|W|/|W + ΔW|.

    Where `dora_scale` has the length of rows, ComfyUI multiplies W + ΔW by it over |W|, not over |W + ΔW|
    (comfy/weight_adapter/base.py, weight_decompose).
    """
    before = weight.detach().float().flatten(1)
    change = scale * (one["up"].float().flatten(1) @ one["down"].float().flatten(1))
    ratio = (before.norm(dim=1) + torch.finfo(torch.float32).eps) / (before + change).norm(dim=1)
    return (one["length"].flatten().float() * ratio).to(one["length"].dtype)


def as_lycoris(
    key: str,
    layers: Mapping[str, dict[str, Tensor]],
    parts: tuple[str, ...],
    scale: float,
    swaps: bool = False,
) -> dict[str, Tensor]:
    """One layer's LoHa or LoKr under LyCORIS' names; where both factors are whole it knows no alpha.

    Raises:
        Refused: the layers are one there, or the halves of one cannot be exchanged.
    """
    if len(parts) > 1:
        raise Refused(
            f"{', '.join(parts)} are one layer there, which LoHa and LoKr cannot be joined to. Train "
            'model.train = "lora", or export the whole model: sfumato.load(RUN).save(FOLDER).'
        )
    own = {name: one.contiguous() for name, one in layers[next(iter(parts))].items()}
    if swaps:
        tall = [name for name in ("hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w1_a") if name in own]
        if any(len(own[name]) % 2 for name in tall):
            raise Refused(
                f"The halves of {next(iter(parts))} are in the other order there, which this LoKr, whose "
                f"small factor has {len(own[tall[0]])} rows, cannot say. Leave it out of model.targets."
            )
        own |= {name: swapped_halves(own[name]).contiguous() for name in tall}
    rank = WeightDelta(factors=own).rank
    if not rank:
        own["lokr_w1"] = scale * own["lokr_w1"]
    alpha = {f"{key}.alpha": torch.tensor(scale * rank)} if rank else {}
    return {f"{key}.{name}": one for name, one in own.items()} | alpha


def fuse_split_layers(
    parts: list[dict[str, Tensor] | None], named: tuple[str, ...], network: nn.Module
) -> dict[str, Tensor]:
    """The change of several layers as that of one: downs stacked, ups on the diagonal; None is no change."""
    if len(parts) == 1:
        assert parts[0] is not None
        return dict(parts[0])
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
