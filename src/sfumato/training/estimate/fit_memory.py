"""What fits: the fastest way to take a step within a given memory, and why.

Each remedy costs time: parts of a batch a little, recomputing blocks a share of a forward pass, narrow
weights their unpacking, lending blocks to the device their journey. All combinations are counted; of those
that fit, the fastest is chosen.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sfumato.errors import Refused
from sfumato.training.distributed.strategy import Strategy
from sfumato.training.estimate.memory import MemoryBreakdown, MemoryCount
from sfumato.training.optim.optimizers import spec_of
from sfumato.training.settings import TrainSettings

RESERVE = 0.06
"""Of the memory, what is left to the allocator's gaps and the driver."""
BASE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.03, "fp8": 1.03, "nf4": 0.53}
BASE_TIME = {"float32": 1.0, "bfloat16": 1.01, "int8": 1.08, "fp8": 1.08, "nf4": 1.15}
PART_TIME, OFFLOAD_TIME, NARROW_STATE_TIME = 0.02, 1.6, 1.02
NARROW_WEIGHTS_TIME = 1.05  # they compute no slower, but learn with noise: rather recompute a little
REASONS = {
    "train.gradient_accumulation": "a batch in {} parts keeps the activations of one part at a time",
    "train.gradient_checkpointing": "every {}. block is computed again instead of kept",
    "train.optimizer": "{} keeps its state in 8 bits",
    "train.weight_dtype": "weights in {}, rounded stochastically, halve weights and gradients",
    "model.base_quantization": "the frozen base is stored in {}",
    "train.offload": "frozen blocks wait in host memory",
}
SHARED = {
    "ddp": "ddp: a whole copy in each process, which sends its gradients once a step",
    "fsdp": "fsdp: weights, gradients, moments and averages are divided among all processes",
    "hsdp": "hsdp: they are divided among a machine's processes, and gradients summed between machines",
}
PARALLEL_TIME = {"ddp": 1.0, "hsdp": 1.06, "fsdp": 1.08}
"""Beside whole copies, which send their gradients once a step; divided ones also gather their weights."""


@dataclass(frozen=True)
class MemoryOption:
    """One way to take a step: what the recipe would say, the bytes it needs, its time beside the plainest."""

    keys: Mapping[str, Any]
    memory: MemoryBreakdown
    time: float

    @property
    def reasons(self) -> list[str]:
        """What each key is good for."""
        return [
            SHARED[value] if name == "train.parallel" else REASONS[name].format(value)
            for name, value in self.keys.items()
        ]


@dataclass(frozen=True)
class SearchSpace:
    """What may be varied: blocks that can be recomputed, a frozen base, 8-bit states, processes."""

    is_adapter: bool
    on_gpu: bool
    has_blocks: bool
    has_8bit: bool
    processes: int
    known: frozenset[str]
    shard_size: int = 0
    """Processes of one machine; 0: all of them."""


def memory_options(
    count: Callable[[int], MemoryCount], settings: TrainSettings, options: SearchSpace
) -> list[MemoryOption]:
    """All ways, the fastest first.

    Args:
        count: from the samples computed at once to the bytes that needs.
        settings: the recipe's own, from which the ways differ.
    """
    parts = [settings.gradient_accumulation]
    while parts[-1] * 2 * options.processes <= settings.batch:
        parts.append(parts[-1] * 2)
    axes: dict[str, list[Any]] = {"train.gradient_accumulation": parts}
    if options.has_blocks:
        axes["train.gradient_checkpointing"] = [0, 4, 2, 1]
    if options.is_adapter:
        axes["model.base_quantization"] = ["", "bfloat16", "int8", "nf4"]
        if options.on_gpu:
            axes["train.offload"] = [False, True]
    else:
        if settings.optimizer == "adamw" and options.has_8bit:
            axes["train.optimizer"] = ["adamw", "adamw-8bit"]
        if settings.weight_dtype == "fp32":
            axes["train.weight_dtype"] = ["fp32", "bf16"]
    if options.processes > 1 and not settings.exact_elastic:
        axes["train.parallel"] = _parallel(settings, options)
    axes = {name: values for name, values in axes.items() if name in options.known}
    counted = {n: count(-(-settings.batch // (n * options.processes))) for n in parts}
    found = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        if not _clash(chosen):
            found.append(
                _memory_option(chosen, counted[chosen["train.gradient_accumulation"]], settings, options)
            )
    return sorted(found, key=lambda way: (way.time, way.memory.peak))


def _clash(chosen: Mapping[str, Any]) -> bool:
    """Whether a combination would be refused: divided weights are float32 and move by elementwise rules, and
    blocks whose weights come and go are computed again.
    """
    if chosen.get("train.offload") and chosen.get("train.gradient_checkpointing", 0) != 1:
        return True
    is_divided = chosen.get("train.parallel") in ("fsdp", "hsdp")
    narrow = chosen.get("train.weight_dtype", "fp32") != "fp32"
    whole = not spec_of(chosen.get("train.optimizer", "adamw")).is_elementwise
    return is_divided and (narrow or whole or chosen.get("train.offload", False))


def _parallel(settings: TrainSettings, options: SearchSpace) -> list[str]:
    """The ways to share that may be chosen: what the recipe says, or all that these settings allow."""
    if settings.parallel != "auto":
        return [settings.parallel]
    divided = ["hsdp", "fsdp"] if 1 < options.shard_size < options.processes else ["fsdp"]
    return ["ddp", *(divided if spec_of(settings.optimizer).is_elementwise else [])]


def _memory_option(
    chosen: dict[str, Any], counted: MemoryCount, settings: TrainSettings, options: SearchSpace
) -> MemoryOption:
    time = (
        1
        + PART_TIME * (chosen["train.gradient_accumulation"] // settings.gradient_accumulation).bit_length()
        - PART_TIME
    )
    every = chosen.get("train.gradient_checkpointing", 0)
    wanted = replace(
        settings,
        optimizer=chosen.get("train.optimizer", settings.optimizer),
        weight_dtype=chosen.get("train.weight_dtype", settings.weight_dtype),
    )
    memory = counted.memory(wanted, every)
    if every:
        time *= 1 + counted.recomputed_share(every) / 3
    if wanted.optimizer != settings.optimizer:
        time *= NARROW_STATE_TIME
    if wanted.weight_dtype != settings.weight_dtype:
        time *= NARROW_WEIGHTS_TIME
    if dtype := chosen.get("model.base_quantization"):
        time *= BASE_TIME[dtype]
        memory = replace(memory, weights=memory.weights - int(counted.frozen * (1 - BASE_BYTES[dtype] / 4)))
    if chosen.get("train.offload"):
        time *= OFFLOAD_TIME
        dtype = chosen.get("model.base_quantization") or "float32"
        lent = int(counted.frozen_in_blocks * BASE_BYTES[dtype] / 4)
        memory = replace(memory, weights=memory.weights - lent)
    if shared := chosen.get("train.parallel"):
        time *= PARALLEL_TIME[shared]
        strategy = Strategy(shared, "", options.shard_size if shared == "hsdp" else 0)
        memory = counted.shared(memory, strategy, wanted, options.processes)
    plain = {
        "train.gradient_accumulation": settings.gradient_accumulation,
        "train.optimizer": settings.optimizer,
    }
    plain |= {"train.weight_dtype": settings.weight_dtype}
    plain |= {"train.parallel": settings.parallel}
    keys = {name: value for name, value in chosen.items() if value and value != plain.get(name)}
    return MemoryOption(keys, memory, time)


def fastest_fitting(found: list[MemoryOption], room: float) -> tuple[MemoryOption, list[MemoryOption]]:
    """(the fastest way within `room` bytes, the faster ones that do not fit).

    Raises:
        Refused: none fits; says what the smallest needs.
    """
    least = room * (1 - RESERVE)
    for number, way in enumerate(found):
        if way.memory.peak <= least:
            return way, found[:number]
    smallest = min(found, key=lambda way: way.memory.peak)
    words = " ".join(f"{name}={value}" for name, value in smallest.keys.items())
    raise Refused(
        f"Nothing fits into {room / 1e9:.3g} GB: even with {words or 'the recipe as it is'} a step needs "
        f"{smallest.memory.peak / (1 - RESERVE) / 1e9:.3g} GB. Lower data.resolution or train.batch, "
        "train an adapter (model.train=lora), or use a larger device."
    )
