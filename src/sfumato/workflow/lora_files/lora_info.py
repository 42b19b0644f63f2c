"""What a LoRA file is: of which kind, for which base, how large its changes are."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sfumato.generation import Pipeline, load
from sfumato.models.lora import key_conversion, lora_file
from sfumato.models.lora.lora_file import WeightDelta
from sfumato.workflow.lora_files.low_rank import LowRank, deltas_of

MOST_TAGS = 1 << 20
"""Characters of a header's table of captions that are looked at."""


@dataclass(frozen=True)
class LoraInfo:
    """What a file holds.

    kinds: how many layers of each kind ("lora", "dora", "loha", "lokr", "diff"). ranks, scales: how many
    layers of each. blocks: the norm of the change of each block; networks: layers of each network.
    With a base, blocks are the base's, lengths included; relative: the same as a share of its weights.
    """

    file: Path
    kinds: dict[str, int]
    ranks: dict[int, int]
    scales: dict[float, int]
    networks: dict[str, int]
    blocks: dict[str, float]
    parameters: int
    dtype: str
    told: dict[str, str]
    words: list[str]
    relative: dict[str, float] = field(default_factory=dict)


TOLD = (
    "modelspec.title", "modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "base",
    "ss_network_module", "steps", "ss_steps", "software", "modelspec.date",
)  # fmt: skip
"""What of a header is worth reading."""


def lora_info(file: Path, base: Path | None = None) -> LoraInfo:
    """Look into a file; with a base also say how large its changes are beside the weights.

    Raises:
        Refused: it is no LoRA, or not of this base.
    """
    changes, metadata = lora_file.read(file)
    kinds: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    scales: Counter[float] = Counter()
    homes: Counter[str] = Counter()
    squares: dict[str, float] = {}
    parameters, dtypes = 0, Counter[str]()
    for name, change in changes.items():
        kinds["dora" if change.length is not None and change.kind == "lora" else change.kind] += 1
        ranks[change.rank] += 1
        scales[round(change.scale, 6)] += 1
        home, rest = key_conversion.home_of(name, {})
        homes[home or "denoiser"] += 1
        block = block_of(f"{home}.{rest}" if home else rest)
        squares[block] = squares.get(block, 0.0) + norm_of(change) ** 2
        for tensor in _tensors_of(change):
            parameters += tensor.numel()
            dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    norms, relative = {block: square**0.5 for block, square in squares.items()}, dict[str, float]()
    if base is not None:
        norms, relative = _beside(load(base), file)
    return LoraInfo(
        lora_file.files_in(file)[0],
        dict(kinds),
        dict(sorted(ranks.items())),
        dict(sorted(scales.items())),
        dict(homes),
        norms,
        parameters,
        dtypes.most_common(1)[0][0],
        {name: metadata[name] for name in TOLD if metadata.get(name)},
        words_of(metadata),
        relative,
    )


def _tensors_of(change: WeightDelta) -> Iterator[Tensor]:
    for one in (change.down, change.up, change.mid, change.diff, change.bias, change.length):
        if one is not None:
            yield one
    yield from change.factors.values()


def norm_of(change: WeightDelta) -> float:
    """The Frobenius norm of ΔW, before the lengths of DoRA."""
    if change.kind == "lora":
        assert change.up is not None and change.down is not None
        up, down = change.up.flatten(1).float(), change.down.flatten(1).float()
        return abs(change.scale) * LowRank(up, down, torch.Size()).norm()
    return 0.0 if change.kind == "diff" and change.diff is None else float(change.whole().norm())


def block_of(layer: str) -> str:
    """The block that a layer stands in: its name up to the first number, in whichever spelling."""
    found = re.match(r"(.*?[._]?\d+)(?:[._]|$)", layer)
    return found[1] if found else layer


def words_of(metadata: Mapping[str, str]) -> list[str]:
    """The words that call what was learned, as the header says them; of kohya's table the commonest."""
    said = metadata.get("modelspec.trigger_phrase") or metadata.get("trigger_words", "")
    if said:
        return [word.strip() for word in said.split(",") if word.strip()]
    table = metadata.get("ss_tag_frequency", "")
    if not table or len(table) > MOST_TAGS:
        return []
    try:
        tags: Counter[str] = Counter()
        for folder in json.loads(table).values():
            tags.update({str(tag).strip(): int(count) for tag, count in folder.items()})
    except (ValueError, AttributeError, TypeError, RecursionError):
        return []
    return [tag for tag, _ in tags.most_common(5)]


def _beside(model: Pipeline, file: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The norm of each block's change, lengths included; and as a share of its weights'."""
    before: dict[str, float] = {}
    change: dict[str, float] = {}
    for (home, layer), weight, delta in deltas_of(model, file, 1.0):
        block = block_of(f"{home}.{layer}" if home else layer)
        before[block] = before.get(block, 0.0) + float(weight.square().sum())
        change[block] = change.get(block, 0.0) + float(delta.square().sum())
    shares = {block: (square / max(before[block], 1e-30)) ** 0.5 for block, square in change.items()}
    return {block: square**0.5 for block, square in change.items()}, shares
