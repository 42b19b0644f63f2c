"""What a step costs, said before it is taken: memory counted on the meta device, time from its FLOPs.

    peak = weights + gradients + optimizer + average + saved activations + one layer's scratch

A forward pass on the meta device computes shapes only, so the count takes milliseconds for any size. A
probe of two real steps then says what the machine makes of it.
"""

import copy
import ctypes
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .average import trained
from .held import Held
from .parallel import Division, Processes
from .rounding import to_bfloat16
from .settings import TrainSettings

STATES = {
    "adamw": 2,
    "lion": 1,
    "muon": 1,
    "adafactor": 0.01,
    "prodigy": 4,
    "schedule-free": 2,
    "came": 1.01,
    "ademamix": 3,
    "adamw-8bit": 0.52,
    "lion-8bit": 0.26,
    "adamw-paged": 0,
    "adamw-8bit-paged": 0,
}
"""float32 numbers an optimizer keeps for each weight on the device."""
FORWARD_AND_BACKWARD = 3
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs for a step, beside what Python and torch hold anyway."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    scratch: int

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Forecast:
    """What one step needs: bytes, and floating point operations forwards and backwards."""

    memory: Memory
    flops: int

    def seconds(self, flops_per_second: float) -> float:
        """The least time of a step on a machine of that speed; what is no matrix product comes on top."""
        return self.flops / flops_per_second


@dataclass(frozen=True)
class Probe:
    """What two real steps took: seconds of the second, and the rise of the process's memory in bytes."""

    seconds: float
    peak: int


def saved_bytes(forward: Callable[[], Any], weights: Iterable[Tensor]) -> tuple[int, int]:
    """(bytes of all tensors a forward pass saves for its backward pass, bytes of the largest of them)."""
    own = {weight.untyped_storage()._cdata for weight in weights}
    found: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = forward()
    sizes = [storage.nbytes() for storage in found.values()]
    del kept
    return sum(sizes), max(sizes, default=0)


def on_meta(value: Any) -> Any:
    """Tensors (in conditions, mappings, sequences) without their numbers."""
    if isinstance(value, Tensor) or hasattr(value, "tensors"):
        return value.to("meta")
    return value


def predict(network: nn.Module, inputs: Inputs, settings: TrainSettings) -> Forecast:
    """Count one step of `network(*inputs)`, inputs being those of one part of a batch.

    Raises:
        RuntimeError: the network asks for the numbers in its inputs, so only a probe can tell.
    """
    shadow = copy.deepcopy(network).to("meta").train()
    if settings.weights != "fp32":
        to_bfloat16(shadow)
    shapes = tuple(on_meta(value) for value in inputs)
    weights = list(trained(shadow).values())
    counter = FlopCounterMode(display=False)
    with counter:
        activations, largest = saved_bytes(lambda: shadow(*shapes), shadow.parameters())
    on_host = next(network.parameters()).device.type == "cpu"  # where power averages are kept
    numbers = sum(weight.numel() for weight in weights)
    trained_bytes = sum(weight.nbytes for weight in weights)
    masters = 4 * numbers if settings.weights == "bf16-masters" else 0
    memory = Memory(
        weights=sum(tensor.nbytes for tensor in [*shadow.parameters(), *shadow.buffers()]),
        gradients=trained_bytes,
        optimizer=int(STATES.get(settings.optimizer, 2) * 4 * numbers) + masters,
        average=4 * numbers * (bool(settings.ema) + 2 * (bool(settings.ema_snapshots) and on_host)),
        activations=activations,
        scratch=4 * largest,
    )
    parts = Division.of(settings, Processes()).parts
    return Forecast(memory, FORWARD_AND_BACKWARD * parts * counter.get_total_flops())


def probe(network: nn.Module, inputs: Inputs, settings: TrainSettings) -> Probe:
    """Take two real steps on a copy of the network and measure the second."""
    device = next(network.parameters()).device
    before = held_bytes(device)
    with watched(device) as peak:
        held = Held(copy.deepcopy(network).train(), settings)
        taken = 0.0
        for number in range(2):
            began = time.perf_counter()
            for _ in range(Division.of(settings, Processes()).parts):
                held.network(*inputs).float().square().mean().backward()
            held.optimiser.step(number)
            held.update(number + 1)
            for weight in held.weights:
                weight.grad = None
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken = time.perf_counter() - began
        highest = peak()
    return Probe(taken, highest - before)


def flops_per_second(seconds: float = 0.2, size: int = 512, device: str | torch.device = "cpu") -> float:
    """What this machine makes of float32 matrix products."""
    a, b = torch.randn(2, size, size, device=device)
    c = a @ b
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        torch.matmul(a, b, out=c)
        count += 1
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return count * 2 * size**3 / (time.perf_counter() - began)


def held_bytes(device: torch.device) -> int:
    """Bytes in use now: on a GPU by torch, else by the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # give back what is free, or the rise would hide in it
    return _status("VmRSS")


@contextmanager
def watched(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that says the most bytes in use since the block began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's word for: forget the peak
        yield lambda: _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0
