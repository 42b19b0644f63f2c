"""LoHa and LoKr of LyCORIS as beginnings of peft's: the same product, at the new adapter's scale.

LoKr divides the sides of a layer, 320 = 16 · 20; what it divides them by is read off the file.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.errors import Refused
from sfumato.models.lora import adapter
from sfumato.models.lora.adapter import AdapterPlan
from sfumato.models.lora.lora_file import WeightDelta

NO_WAY = "Name it as model.merge_loras, which makes it part of the base."


def lokr_shapes(file: Path, changes: Mapping[str, WeightDelta], plan: AdapterPlan) -> AdapterPlan:
    """The plan of a LoKr whose layers are divided as the file's.

    Raises:
        Refused: peft divides no layer so, or not all of them by the same number.
    """
    from peft.tuners.lokr.layer import factorization

    sides = []
    for change in changes.values():
        one, two = change.factor("w1"), change.factor("w2")
        rows, kernel = two.shape[0], two.shape[2:].numel() if two.ndim > 2 else 1
        columns = two[0].numel() // kernel
        sides += [(one.shape[0], rows), (one.shape[1], columns)]
    numbers = sorted({small for small, _ in sides})
    for divisor in (-1, *numbers):
        if all(factorization(small * large, divisor) == (small, large) for small, large in sides):
            both = any("lokr_w1_a" in change.factors for change in changes.values())
            return replace(plan, divisor=divisor, both=both)
    raise Refused(
        f"model.init_adapter: {file} divides its layers by {', '.join(map(str, numbers[:4]))}, which peft's "
        f"LoKr cannot all at once. {NO_WAY}"
    )


def rank_of(changes: Mapping[str, WeightDelta]) -> int:
    """The least rank with which peft's LoKr says all that the file says: whole factors stay whole."""
    least = 1
    for change in changes.values():
        if "lokr_w2" in change.factors:
            two = change.factors["lokr_w2"]
            least = max(least, math.ceil(max(two.shape[0], two.shape[1]) / 2))
        least = max(least, change.rank)
    return least


def put(layer: Any, change: WeightDelta) -> None:
    """Fill one layer's LoHa or LoKr; ranks beyond the file's begin without effect.

    Raises:
        Refused: the adapter has no place for what the file says.
    """
    name = adapter.NAME
    scale = change.scale / float(layer.scaling[name])
    own: dict[str, Tensor] = {
        part: getattr(layer, part)[name] for part in layer.adapter_layer_names if name in getattr(layer, part)
    }
    for which in ("w1", "w2"):
        begun = scale if which == "w1" else 1.0
        if change.kind == "loha":
            pair(own[f"hada_{which}_a"], own[f"hada_{which}_b"], change, f"hada_{which}", begun)
        elif f"lokr_{which}" in own:
            whole = change.factor(which)
            own[f"lokr_{which}"].copy_(begun * whole.reshape(own[f"lokr_{which}"].shape))
        else:
            pair(own[f"lokr_{which}_a"], own[f"lokr_{which}_b"], change, f"lokr_{which}", begun)


def pair(a: Tensor, b: Tensor, change: WeightDelta, which: str, scale: float) -> None:
    """a [out, r] and b [r, in] become the file's, times scale; what is left of a is 0."""
    factors, kernel = change.factors, which.replace("_w", "_t")
    if f"{which}_a" not in factors or kernel in factors:
        shape = "in Tucker form" if kernel in factors else "whole where this adapter has a rank"
        raise Refused(
            f"model.init_adapter: a factor of the file is {shape}, which peft does not take. {NO_WAY}"
        )
    rank = factors[f"{which}_b"].shape[0]
    a.zero_()
    a[:, :rank] = scale * factors[f"{which}_a"].to(a)
    b[:rank] = factors[f"{which}_b"].reshape(rank, -1).to(b)
