"""No network is larger than its file of weights: what a config asks for is counted before memory is taken.

A config of a stranger may say a width of 2^19, a million layers or a vocabulary of a billion words. The
network is built first without memory (on torch's meta device), its weights are counted as they are made, and
what could not have come from the file beside the config is refused at once.
"""

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.modules import module as registration

from sfumato.errors import Refused

SPARE_NUMBERS, SPARE_TENSORS = 1 << 24, 512
"""What a network may have beyond its file: computed buffers, tied weights, parts that nobody reads."""
SHARED, PACKED = 3, 16
"""How often one number of a file may be counted: weights that are tied, or several packed into one number."""
MOST_BUFFERED = 1 << 28
"""Numbers of all buffers, such as tables of positions: of these a file need not have any."""
LONGEST = 1 << 16
"""Entries of a list in a config."""
MOST_TIMES = 1 << 20
"""Steps of a scheduler's table."""
HOW_MANY = re.compile(r"(^|_)(depth|layers?|blocks?|heads?|levels?)(_|$)")
"""Names in a config of how often something is built, …"""
HOW_WIDE = re.compile(r"embed|channel|dim|size|width|position|token|vocab")
"""… unless one of these words says how wide it is."""
HEADS = re.compile(r"(^|_)heads$")


@dataclass(frozen=True)
class WeightCounts:
    """Of a file of weights: how many numbers in how many tensors."""

    numbers: int
    tensors: int

    @classmethod
    def of_files(cls, files: Iterable[Path]) -> "WeightCounts":
        """Read from the headers alone; what is wrong with a file is said when it is read."""
        shapes: list[list[int]] = []
        for file in files:
            try:
                with safe_open(file, "pt") as opened:
                    shapes += [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
            except (OSError, SafetensorError):
                continue
        return cls(sum(map(prod, shapes)), len(shapes))

    def __add__(self, other: "WeightCounts") -> "WeightCounts":
        return WeightCounts(self.numbers + other.numbers, self.tensors + other.tensors)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "WeightCounts":
        """Of tensors that were read already."""
        return cls(sum(one.numel() for one in tensors.values()), len(tensors))


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json in a folder, {} where its own reader will find it missing or damaged."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_scheduler_size(file: Path) -> None:
    """Raises Refused for a scheduler's config whose tables would fill the memory."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # its own reader says so
    for name, value in said.items() if isinstance(said, dict) else ():
        count = len(value) if isinstance(value, list) else value
        is_table = name.endswith("steps") or isinstance(value, list)
        if is_table and isinstance(count, int) and count > MOST_TIMES:
            raise Refused(
                f"{file} says {name} of {_short(count)} steps; no scheduler has more than {MOST_TIMES:,}. "
                "Copy the folder again."
            )


def _short(number: int) -> str:
    """A number as far as it can be read."""
    said = f"{number:,}"
    return said if len(said) <= 30 else f"{said[:30]}…"


def check_network_size(
    build: Callable[[], object], counts: WeightCounts, config: Mapping[str, Any], source: Any
) -> None:
    """Build a network without memory and compare it with its weights.

    Args:
        build: makes it; called on the meta device.
        counts: of its weights. config: what it is made of. source: the file that says so.
    Raises:
        Refused: it is larger than its weights.
    """
    packed = PACKED if "quantization_config" in config else SHARED
    most = WeightCounts(packed * counts.numbers + SPARE_NUMBERS, 4 * counts.tensors + SPARE_TENSORS)
    _check_words(config, most.tensors, source)
    found, buffered, thread = [0, 0], 0, threading.get_ident()

    def refuse(what: str) -> None:
        raise Refused(
            f"{source} asks for a network of more than {what}, but its weights have "
            f"{counts.numbers:,} in {counts.tensors:,} tensors: it was not built. Copy the folder again."
        )

    def count_weight(module: object, name: str, weight: Tensor | None) -> None:
        if weight is None or threading.get_ident() != thread:
            return
        found[0] += weight.numel()
        found[1] += 1
        if found[0] > most.numbers:
            refuse(f"{most.numbers:,} numbers")
        if found[1] > most.tensors:
            refuse(f"{most.tensors:,} tensors")

    def count_buffer(module: object, name: str, buffer: Tensor | None) -> None:
        nonlocal buffered
        if buffer is None or threading.get_ident() != thread:
            return
        buffered += buffer.numel()
        if buffered > most.numbers + MOST_BUFFERED:
            refuse(f"{most.numbers + MOST_BUFFERED:,} numbers in tables")

    hooks = (
        registration.register_module_parameter_registration_hook(count_weight),
        registration.register_module_buffer_registration_hook(count_buffer),
    )
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            build()
    except Refused:
        raise
    except Exception:
        return  # it is built once more, with memory, and that says what is wrong
    finally:
        for one in hooks:
            one.remove()


def _check_words(config: Any, most: int, source: Any, name: str = "") -> None:
    """Raises Refused for lists of any length, and for repetitions of more than there are weights."""
    if isinstance(config, Mapping):
        for word, value in config.items():
            _check_words(value, most, source, str(word))
    elif isinstance(config, list | tuple):
        if len(config) > LONGEST:
            raise Refused(f"{source} holds {name} of {len(config):,} entries; no network has so many parts.")
        for value in config:
            _check_words(value, most, source, name)
    elif isinstance(config, int) and config < 0 and HEADS.search(name):
        raise Refused(
            f"{source} says {name} = {_short(config)}; heads are counted from 1. Copy the folder again."
        )
    elif isinstance(config, int) and config > most and HOW_MANY.search(name) and not HOW_WIDE.search(name):
        raise Refused(
            f"{source} says {name} = {_short(config)}, more than there can be with so few weights beside it. "
            "Copy the folder again, whole."
        )
