"""What a file changes of each layer: LoRA, LoHa and LoKr of whoever wrote them, and whole differences.

    LoRA   ΔW = alpha/rank · up · down
    LoHa   ΔW = alpha/rank · (w1_a · w1_b) ∘ (w2_a · w2_b)
    LoKr   ΔW = alpha/rank · w1 ⊗ w2,  each whole or a product of rank r; both whole: without alpha/rank

Conventions: diffusers, peft, kohya's sd-scripts, and LyCORIS (Yeh et al. 2023, arXiv:2309.14859).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sfumato.errors import Refused
from sfumato.models import hub_files
from sfumato.models.files import HEADER, digest, must_be_safetensors
from sfumato.models.lora.old_spellings import usual
from sfumato.models.patterns import BoundedPatterns

ENDS = {
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_down.weight": "down", ".lora_up.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up", ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up", ".lora_mid.weight": "mid", ".alpha": "alpha", ".dora_scale": "length",
    ".lora_magnitude_vector.weight": "length", ".lora_magnitude_vector": "length",
    ".diff": "diff", ".diff_b": "bias", ".lora_B.bias": "up_bias",
}  # fmt: skip
"""Ends of keys, the longer first where one ends another."""
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
ENDS |= {f".{name}": name for name in (*LOKR, *LOHA)}
OTHERS = {
    ".oft_blocks": "OFT", ".oft_diag": "OFT", ".oft_R.weight": "OFT", ".boft_R": "BOFT", ".on_input": "IA³",
    ".a1.weight": "GLoRA", ".b1.weight": "GLoRA", ".w_norm": "LyCORIS norm", ".b_norm": "LyCORIS norm",
    ".vera_lambda_b": "VeRA", ".lora_E": "AdaLoRA", ".diff_m": "differences of modulation tables",
}  # fmt: skip
"""Ends of keys of adapters that are known and not read."""
NOT_READ = (
    "which is not read here. Merge it into its base with the program that wrote it, and give that base; "
    "LoRA, LoHa, LoKr and their DoRA are read."
)
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps ranks and alphas, as JSON."""
DORA_SCALE, OF_BASE = "dora_scale", "lengths over those of the base's rows, as ComfyUI reckons"
"""What the metadata of a DoRA for ComfyUI says of its lengths."""
MOST_NUMBERS = 1 << 29
"""Numbers that a layer's change may have before it is known which layer that is."""
HEADER_ALPHAS = ("alpha", "lora_alpha", "network_alpha")
"""Where a header says one alpha for all layers of a file that has none beside its tensors."""
HOMES = ("transformer_2", "transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass
class WeightDelta:
    """The change of one layer: down [r, in, …], up [out, r, …], and for DoRA the rows' lengths.

    mid: the kernel between the two, of convolutions in Tucker form; factors: of LoHa and LoKr, by their
    names; diff, bias: whole differences.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None
    length: Tensor | None = None
    rows: slice = field(default_factory=lambda: slice(None))
    """Which rows of it are this layer's, where the file joins several layers."""
    mid: Tensor | None = None
    diff: Tensor | None = None
    bias: Tensor | None = None
    factors: dict[str, Tensor] = field(default_factory=dict)
    given: float | None = None
    """The scale, where it does not follow from alpha and rank."""
    up_bias: Tensor | None = None
    """What is added behind `up`, before the scale (peft's lora_bias)."""
    of_base: bool = False
    """Whether W + ΔW is multiplied by `length` over the lengths of W, as ComfyUI does, not over its own."""

    @property
    def kind(self) -> str:
        """lora, loha, lokr or diff; empty where something is missing."""
        has = self.factors.keys()
        if has:
            kron = all(f"lokr_{w}" in has or {f"lokr_{w}_a", f"lokr_{w}_b"} <= has for w in ("w1", "w2"))
            return "lokr" if kron else "loha" if set(LOHA[:4]) <= has else ""
        if self.down is not None and self.up is not None:
            return "lora"
        is_whole = self.down is None and self.up is None and self.mid is None
        return "diff" if is_whole and (self.diff is not None or self.bias is not None) else ""

    @property
    def rank(self) -> int:
        """The rank of its factors; 0 where they are whole."""
        if self.down is not None:
            return self.down.shape[0]
        names = ("hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        return next((len(self.factors[name]) for name in names if name in self.factors), 0)

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        if self.given is not None:
            return self.given
        return self.alpha / self.rank if self.alpha is not None and self.rank else 1.0

    def factor(self, which: str) -> Tensor:
        """w1 or w2, whole, of LoKr [rows, columns, …] or LoHa [out, in, …]."""
        f, kind = {name: one.float() for name, one in self.factors.items()}, self.kind
        if kind == "lokr":
            if f"lokr_{which}" in f:
                return f[f"lokr_{which}"]
            a, b = f[f"lokr_{which}_a"], f[f"lokr_{which}_b"]
            if which == "w2" and "lokr_t2" in f:
                return torch.einsum("ij...,ip,jr->pr...", f["lokr_t2"], a, b)
            return a @ b
        a, b, t = f[f"hada_{which}_a"], f[f"hada_{which}_b"], f"hada_t{which[1]}"
        return torch.einsum("ij...,jr,ip->pr...", f[t], b, a) if t in f else a @ b

    def whole(self) -> Tensor:
        """All rows [out, in · kernel] of the file's layer, scaled."""
        kind = self.kind
        if kind == "diff":
            assert self.diff is not None
            return self.diff.float().flatten(1) if self.diff.ndim > 1 else self.diff.float()[:, None]
        if kind == "lora":
            assert self.down is not None and self.up is not None
            return self.scale * (self.up.flatten(1).float() @ self.down.flatten(1).float())
        one, two = self.factor("w1"), self.factor("w2")
        if kind == "loha":
            return self.scale * (one * two).flatten(1)
        kernel = two.flatten(2) if two.ndim > 2 else two[..., None]
        return self.scale * torch.kron(one[..., None], kernel.contiguous()).flatten(1)

    @property
    def acts(self) -> bool:
        """Whether it changes anything."""
        bias = self.bias is not None and bool(self.bias[self.rows].any())
        if self.kind == "lora":
            assert self.up is not None
            return bool(self.up[self.rows].any()) or bias
        return bias if self.kind == "diff" and self.diff is None else bool(self.whole()[self.rows].any())

    def delta(self, shape: torch.Size) -> Tensor:
        """ΔW, shaped as the layer's weight."""
        return self.whole()[self.rows].reshape(shape)

    def sides(self, shape: torch.Size) -> tuple[int, int]:
        """(rows of this layer, numbers in each) that the file has; `shape`: of the layer's weight.

        Told from the factors' shapes: nothing is multiplied out.
        """
        kind, rows, columns = self.kind, shape[0], shape[1:].numel()
        if kind == "lora":
            assert self.down is not None and self.up is not None
            rows, columns = self.up.shape[0], self.down[0].numel()
        elif kind == "diff" and self.diff is None:
            return rows, columns
        elif kind == "diff":
            assert self.diff is not None
            rows, columns = self.diff.shape[0], self.diff[0].numel()
        elif kind == "loha":
            rows, columns = self.factor_shape("hada", "w1")
        else:
            (a, b), (c, d) = self.factor_shape("lokr", "w1"), self.factor_shape("lokr", "w2")
            rows, columns = a * c, b * d
        return len(range(rows)[self.rows]), columns

    def factor_shape(self, kind: str, which: str) -> tuple[int, int]:
        """(rows, numbers in each) of w1 or w2 of a LoKr ("lokr") or LoHa ("hada")."""
        f = self.factors
        if (whole := f.get(f"{kind}_{which}")) is not None:
            return whole.shape[0], whole[0].numel()
        a, b, t = f[f"{kind}_{which}_a"], f[f"{kind}_{which}_b"], f.get(f"{kind}_t{which[1]}")
        if t is not None and (kind == "hada" or which == "w2"):
            return a.shape[1], b.shape[1] * t.shape[2:].numel()
        return a.shape[0], b.shape[1]

    def misfit(self) -> str:
        """Why the tensors of this change do not belong together; empty where they do."""
        tensors = {"down": self.down, "up": self.up, "mid": self.mid, "diff": self.diff, **self.factors}
        known = {name: one for name, one in tensors.items() if one is not None}
        for name, one in known.items():
            if one.ndim < (1 if name == "diff" else 2) or not one.numel():
                return f"{name} is of shape {list(one.shape)}"
        pairs: list[tuple[str, int, str, int]] = []
        if self.mid is not None:
            pairs += [("mid", 1, "down", 0), ("up", 1, "mid", 0)]
        else:
            pairs += [("up", 1, "down", 0)]
        for kind, which in (("hada", "w1"), ("hada", "w2"), ("lokr", "w1"), ("lokr", "w2")):
            t = f"{kind}_t{which[1]}"
            a, b = f"{kind}_{which}_a", f"{kind}_{which}_b"
            if t in known:
                pairs += [(t, 0, a, 0), (t, 1, b, 0)]
            else:
                pairs += [(a, 1, b, 0)]
        for one, i, other, j in pairs:
            if one in known and other in known and known[one].shape[i] != known[other].shape[j]:
                return f"{one} is of shape {list(known[one].shape)}, {other} of {list(known[other].shape)}"
        if self.kind == "loha" and self.factor_shape("hada", "w1") != self.factor_shape("hada", "w2"):
            return "w1 and w2 are of different shapes"
        if self.mid is not None and self.down is not None:
            numbers = self.mid.shape[0] * self.down[0].numel() * self.mid.shape[2:].numel()
            if numbers > MOST_NUMBERS:
                return f"its kernel would have {numbers:,} numbers"
        return ""

    def misplaced(self, shape: torch.Size) -> str:
        """Why bias or lengths do not fit a layer's weight of this shape; empty where they do."""
        if self.bias is not None and (self.bias.ndim != 1 or len(self.bias[self.rows]) != shape[0]):
            return f"the bias is of shape {list(self.bias.shape)}, but the layer has {shape[0]} rows"
        if self.length is None:
            return ""
        wanted = shape[1] if self.is_by_column else shape[0]
        count = self.length.numel() if self.is_by_column else len(self.length.flatten()[self.rows])
        return "" if count == wanted else f"DoRA has {count} lengths, but the layer needs {wanted}"

    @property
    def is_by_column(self) -> bool:
        """Whether the lengths are of columns, as LyCORIS has them unless asked otherwise."""
        return (
            self.length is not None and self.length.ndim > 1 and len(self.length) == 1 < self.length.numel()
        )

    def lengthened(self, weight: Tensor, base: Tensor | None = None) -> Tensor:
        """The changed weight with the lengths that DoRA learned, of its rows or of its columns."""
        assert self.length is not None
        length = self.length.to(weight)
        if self.is_by_column:
            axes = tuple(axis for axis in range(weight.ndim) if axis != 1)
            length = length.reshape(1, -1, *[1] * (weight.ndim - 2))
        else:
            axes = tuple(range(1, weight.ndim))
            length = length.flatten()[self.rows].view(-1, *[1] * (weight.ndim - 1))
        of = base if self.of_base and base is not None else weight
        return weight * length / of.square().sum(dim=axes, keepdim=True).sqrt()

    def with_halves_swapped(self) -> "WeightDelta":
        """The same change of a layer whose rows' halves stand in the other order."""
        swapped = {
            name: swapped_halves(getattr(self, name))
            for name in ("up", "bias", "diff", *(() if self.is_by_column else ("length",)))
            if getattr(self, name) is not None
        }
        if self.kind in ("loha", "lokr"):
            whole = WeightDelta(diff=swapped_halves(self.whole()), bias=self.bias, length=self.length)
            return replace(whole, **swapped)
        return replace(self, **swapped)

    def of_own_rows(self) -> "WeightDelta":
        """The same, of layers that a file joins with its own rows and those ranks alone that they use."""
        if self.kind != "lora" or self.rows == slice(None) or self.length is not None:
            return self
        assert self.up is not None and self.down is not None
        up = self.up[self.rows]
        used = up.flatten(1).any(0)
        used[0] |= not bool(used.any())
        bias = None if self.bias is None else self.bias[self.rows]
        whole = replace(self, up=up[:, used], down=self.down[used], given=self.scale, bias=bias)
        return replace(whole, rows=slice(None))

    def straightened(self) -> "WeightDelta":
        """The same with the kernel between the two matrices in the first: ΔW is as it was."""
        if self.mid is not None and self.down is not None:
            down = torch.einsum("ab...,bj->aj...", self.mid.float(), self.down.flatten(1).float())
            self.down, self.mid = down, None
        return self


def files_in(file: Path | str, pair: bool = False) -> list[Path]:
    """The file itself, of the Hub's where an id is meant; of a folder the one in it, or both of a pair.

    Raises:
        Refused: a folder of none, or of more.
    """
    path = hub_files.place(file)
    if not path.is_dir():
        return [path]
    inside = sorted(path.glob("*.safetensors"))
    if len(inside) != 1 and not (pair and len(inside) == 2):
        raise Refused(f"{path} holds {len(inside)} safetensors files. Give the LoRA's file itself.")
    return inside


def swapped_halves(rows: Tensor) -> Tensor:
    """The second half of the rows before the first."""
    return torch.cat(rows.chunk(2)[::-1])


def read(file: Path | str) -> tuple[dict[str, WeightDelta], dict[str, str]]:
    """(changes by the file's own names of layers, metadata).

    Raises:
        Refused: no such file, a pickle, a key that belongs to no LoRA.
    """
    (path,) = files_in(file)
    if not path.is_file():
        raise Refused(f"{path} does not exist. Give the file of a LoRA (.safetensors).")
    must_be_safetensors(path)
    try:
        with safe_open(path, "pt") as opened:
            metadata = dict(opened.metadata() or {})
            whole = {key: opened.get_tensor(key) for key in sorted(opened.keys())}
    except (OSError, SafetensorError) as problem:
        raise Refused(f"{path} is damaged ({problem}). Copy it again.") from problem
    if metadata.get(HEADER, "") not in ("", digest(whole)):
        raise Refused(f"{path} is damaged: it does not have the checksum it was written with. Copy it again.")
    check_numbers(path, whole)
    changes, strange = sorted_by_layer({usual(key): tensor for key, tensor in whole.items()})
    for key in strange:
        if key.startswith("bundle_emb."):
            raise Refused(
                f'{path} holds a new word beside its LoRA ("{key}"), which is not read here. Save both apart '
                "with the program that wrote it, and name the word in model.new_tokens."
            )
        if key.endswith(".oft_blocks") and whole[key].ndim == 4:
            raise Refused(f'{path} holds BOFT ("{key}"), {NOT_READ}')
        if other := next((kind for end, kind in OTHERS.items() if key.endswith(end)), ""):
            raise Refused(f'{path} holds {other} ("{key}"), {NOT_READ}')
    strange += [name for name, one in changes.items() if not one.kind]
    if strange or not changes:
        raise Refused(f"{path} is no LoRA that is known: {said(strange) or 'it is empty'}.")
    for name, change in changes.items():
        if why := change.misfit():
            raise Refused(f"{path} is damaged or no LoRA: of {said([name])} {why}. Get the file again.")
    fill_alphas(path, changes, metadata)
    fill_from_peft(changes, path.with_name("adapter_config.json"))
    fill_from_header(path, changes, metadata)
    for change in changes.values():
        change.of_base = metadata.get(DORA_SCALE) == OF_BASE
        if change.up_bias is not None:
            change.bias = change.scale * change.up_bias
    return {name: change.straightened() for name, change in changes.items()}, metadata


def check_numbers(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises Refused where a tensor is not finite, an alpha is not one number, or numbers are complex."""
    for key, tensor in tensors.items():
        if tensor.is_complex():
            raise Refused(
                f"{path}: {said([key])} holds complex numbers, which no LoRA has. Get the file again."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise Refused(
                f"{path}: {said([key])} holds numbers that are not finite (NaN or infinite): the file is "
                "damaged, or its training diverged. Get the file again, or another step of it."
            )
        if key.endswith(".alpha") and tensor.numel() != 1:
            raise Refused(
                f"{path}: {said([key])} is of shape {list(tensor.shape)}, but an alpha is one number. Get "
                "the file again."
            )


def sorted_by_layer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, WeightDelta], list[str]]:
    """(changes by layer, keys that belong to none)."""
    changes: dict[str, WeightDelta] = {}
    strange = []
    for key, tensor in tensors.items():
        end = end_of(key)
        if not end:
            strange.append(key)
            continue
        change, role = changes.setdefault(key.removesuffix(end), WeightDelta()), ENDS[end]
        if role in (*LOKR, *LOHA):
            change.factors[role] = tensor
        elif end.startswith(".lora_magnitude"):
            change.length = tensor.flatten()  # peft's are always of rows
        else:
            setattr(change, role, float(tensor) if role == "alpha" else tensor)
    return changes, strange


def end_of(key: str) -> str:
    """The end of a key that says what the tensor is; empty where none is known."""
    return next((end for end in sorted(ENDS, key=len, reverse=True) if key.endswith(end)), "")


def fill_from_peft(changes: Mapping[str, WeightDelta], config: Path) -> None:
    """Alphas that peft wrote into a file beside the tensors.

    Raises:
        Refused: the file is damaged.
    """
    if not config.is_file() or not all(name.startswith("base_model.model.") for name in changes):
        return
    try:
        text = config.read_text(encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise Refused(f"{config} is damaged ({problem}). Copy it again.") from problem
    known, patterns = json_object(text, config), Patterns(config)
    for name, change in changes.items():
        scale_as_peft(change, name.removeprefix("base_model.model."), known, patterns)


def json_object(text: str, source: object) -> dict[str, Any]:
    """The JSON object in a text of a file.

    Raises:
        Refused: it is none.
    """
    try:
        known = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise Refused(f"{source} is damaged ({str(problem)[:100]}). Copy it again.") from problem
    if not isinstance(known, dict):
        raise Refused(
            f"{source} is damaged: it holds a {type(known).__name__}, no JSON object. Copy it again."
        )
    return known


def number(value: object, name: str, source: object) -> float:
    """A finite number that a file says.

    Raises:
        Refused: it is none.
    """
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise Refused(f"{source}: {name} is {said([str(value)[:60]])}, which is no number. Correct it there.")
    return found


def fill_from_header(path: Path, changes: Mapping[str, WeightDelta], metadata: Mapping[str, str]) -> None:
    """One alpha that the header says for all layers, where neither tensors nor peft's settings have any."""
    name = next((name for name in HEADER_ALPHAS if metadata.get(name)), "")
    if not name or any(change.alpha is not None or change.given is not None for change in changes.values()):
        return
    alpha = number(metadata[name], f"{name} in its header", path)
    for change in changes.values():
        if change.kind != "diff":
            change.alpha = alpha


def fill_alphas(path: Path, changes: Mapping[str, WeightDelta], metadata: Mapping[str, str]) -> None:
    """Alphas that diffusers wrote into the metadata instead of the tensors."""
    source = f"{path}, {METADATA} in its header,"
    known, patterns = json_object(metadata.get(METADATA, "{}"), source), Patterns(source)
    for name, change in changes.items():
        home = next((prefix for prefix in HOMES if name.startswith(f"{prefix}.")), "")
        config = {
            key.removeprefix(f"{home}."): value for key, value in known.items() if key.startswith(f"{home}.")
        }
        scale_as_peft(change, name.removeprefix(f"{home}."), config, patterns)


def scale_as_peft(change: WeightDelta, layer: str, config: Mapping[str, Any], patterns: "Patterns") -> None:
    """Scale a change as peft's config says, where the file itself has no alpha."""
    usual = config.get("lora_alpha") or config.get("alpha")
    if change.alpha is not None or not usual or change.kind == "diff":
        return
    alpha = number(patterns.value(config, "alpha_pattern", layer, usual), "lora_alpha", patterns.source)
    rank: float = change.rank
    if not rank:
        rank = number(patterns.value(config, "rank_pattern", layer, config.get("r", 1)), "r", patterns.source)
    if rank < 1:
        raise Refused(
            f"{patterns.source}: the rank of {said([layer])} is {rank:g}, but at least 1. Correct it there."
        )
    change.given = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


class Patterns:
    """Patterns of peft's: ends of layers' names, or regular expressions of whoever wrote the file.

    All together they take a bounded time.
    """

    def __init__(self, source: object) -> None:
        self.source, self.bounded = source, BoundedPatterns()

    def value(self, config: Mapping[str, Any], name: str, layer: str, usual: Any) -> Any:
        """What the config's patterns of this name say of a layer, else `usual`.

        Raises:
            Refused: no patterns, no regular expression, or one that takes too long.
        """
        patterns = config.get(name) or {}
        if not isinstance(patterns, Mapping):
            raise Refused(f"{self.source}: {name} is no JSON object. Correct it there.")
        return next((value for key, value in patterns.items() if self.matches(str(key), layer)), usual)

    def matches(self, key: str, layer: str) -> bool:
        """Whether a key means this layer."""
        if PLAIN_NAME.fullmatch(key):  # what nearly all are; a dot stands for itself or for any letter
            return re.fullmatch(rf"(.*\.)?({key})", layer) is not None
        try:
            return self.bounded.fullmatch(rf"(.*\.)?({key})", layer)
        except ValueError as problem:
            raise Refused(
                f"{self.source}: the pattern {said([key[:60]])} {problem}. Correct it there."
            ) from problem


PLAIN_NAME = re.compile(r"[\w.-]+")


def said(names: list[str], most: int = 3) -> str:
    """The first names of many, letters that would steer a terminal by their numbers."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    shown = ("".join(one if one.isprintable() else ascii(one)[1:-1] for one in name) for name in names[:most])
    return ", ".join(f'"{name}"' for name in shown) + rest
