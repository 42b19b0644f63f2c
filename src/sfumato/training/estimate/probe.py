"""What this machine makes of a step: a few real ones are taken on a copy, as the loop takes them.

The memory that a process rises by is more than what tensors hold: layers' workspaces, and the gaps that the
C library leaves between arrays of many sizes (up to a quarter of the activations). So what is counted says
what would fit, and what is probed says what will be held.
"""

import copy
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from sfumato.training.device import keep_freed_memory, trim_memory, wait_for
from sfumato.training.distributed.processes import BatchSplit, Gradients, Processes
from sfumato.training.precision import autocast, effective_precision
from sfumato.training.settings import TrainSettings
from sfumato.training.state.train_state import TrainState

MOST, SECONDS = 8, 3.0
"""Two steps are taken; more, up to so many, until so many seconds have passed."""


@dataclass(frozen=True)
class Probe:
    """What real steps took: the median's seconds, the first left out, and the rise of memory in bytes."""

    seconds: float
    peak: int


def probe(network: nn.Module, inputs: tuple[Any, ...], settings: TrainSettings) -> Probe:
    """Take real steps on a copy of the network, in the middle of the run that the settings describe.

    Args:
        inputs: those of one part of a batch.
    Returns:
        seconds of a step, and the bytes it needs: weights, frozen ones too, and all that comes beside them.
    """
    device = next(network.parameters()).device
    shared = {id(weight): weight for weight in network.parameters() if not weight.requires_grad}
    with keep_freed_memory(device):
        before = held_bytes(device)
        with peak_memory(device) as peak:
            own: dict[int, Any] = dict(shared)
            train_state = TrainState(copy.deepcopy(network, own).train(), settings)
            seconds = _seconds(train_state, inputs, settings, device)
            highest = peak()
        del train_state, own
    return Probe(seconds, highest - before + sum(weight.nbytes for weight in shared.values()))


def _seconds(
    train_state: TrainState, inputs: tuple[Any, ...], settings: TrainSettings, device: torch.device
) -> float:
    division = BatchSplit.of(settings, Processes())
    gradients = Gradients(train_state.weights, Processes(), division.exact)
    precision = effective_precision(settings.precision, device, settings.weight_dtype)
    middle, taken = settings.steps // 2, []
    while len(taken) < 2 or (len(taken) < MOST and sum(taken) < SECONDS):
        began = time.perf_counter()
        for part in division.mine:
            gradients.begin(part == division.mine[-1])
            with autocast(precision, device):
                error = squared(train_state.network(*inputs)) / division.parts
            error.backward()
            gradients.add(error.detach())
        gradients.total(False)
        _clip(gradients, settings)
        train_state.optimizer.step(middle + len(taken))
        gradients.clear()
        train_state.update(middle + len(taken) + 1)
        wait_for(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def squared(answer: Any) -> Tensor:
    """The mean square of an answer, or of a list of them: a loss as good as any to measure a step with."""
    parts = answer if isinstance(answer, list) else [answer]
    return torch.stack([part.float().square().mean() for part in parts]).mean()


def _clip(gradients: Gradients, settings: TrainSettings) -> None:
    """Measure the gradient, and scale it down as where it is too large."""
    found = [weight.grad for weight in gradients.weights if weight.grad is not None]
    norm = gradients.norm(found)
    if settings.max_grad_norm and float(norm) > settings.max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(gradients.weights, settings.max_grad_norm, norm, foreach=True)


def measure_call(work: Callable[[], Any], device: torch.device) -> Probe:
    """The seconds of a second call of `work`, and the bytes by which memory rises within both."""
    before = held_bytes(device)
    with peak_memory(device) as peak, torch.no_grad():
        taken = 0.0
        for _ in range(2):
            began = time.perf_counter()
            work()
            wait_for(device)
            taken = time.perf_counter() - began
        highest = peak()
    return Probe(taken, max(0, highest - before))


def flops_per_second(
    seconds: float = 0.2, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> float:
    """What this machine makes of matrix products: on a CPU of float32, on a GPU of what autocast makes them.

    A GPU is asked for products that keep it busy (4096³), several at a time, and waited for.
    """
    place = torch.device(device)
    on_gpu = place.type != "cpu"
    size, at_once = (4096, 8) if on_gpu else (512, 1)
    a, b = torch.randn(2, size, size, device=place, dtype=dtype if on_gpu else None)
    c = a @ b
    wait_for(place)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(at_once):
            torch.matmul(a, b, out=c)
        count += at_once
        wait_for(place)
    return count * 2 * size**3 / (time.perf_counter() - began)


def held_bytes(device: torch.device) -> int:
    """Bytes in use now: on a GPU by torch, else by the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    trim_memory()  # give back what is free, or the rise would hide in it
    return psutil.Process().memory_info().rss


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that says the most bytes in use since the block began.

    A GPU and Linux keep the highest number themselves; elsewhere a thread looks every few milliseconds.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    refs, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        refs.write_text("5", encoding="utf-8")  # the kernel's word for: forget the peak
    except OSError:
        with _looking() as peak:
            yield peak
        return
    yield lambda: next(
        int(line.split()[1]) * 1024
        for line in status.read_text(encoding="utf-8").splitlines()
        if line.startswith("VmHWM")
    )


@contextmanager
def _looking(seconds: float = 0.005) -> Iterator[Callable[[], int]]:
    """Yield a function that says the most bytes this process was seen with since the block began."""
    process, ended = psutil.Process(), threading.Event()
    highest = [process.memory_info().rss]

    def peak() -> int:
        highest[0] = max(highest[0], process.memory_info().rss)
        return highest[0]

    def look() -> None:
        while not ended.wait(seconds):
            peak()

    thread = threading.Thread(target=look, name="memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()
