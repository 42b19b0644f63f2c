"""Where a run computes: its device, and the memory it keeps there."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from sfumato.errors import Refused

MMAP_MAX, MMAP_THRESHOLD, TOP_PAD, TRIM_THRESHOLD = -4, -3, -2, -1
"""The numbers by which glibc's mallopt knows them."""


KINDS = ("cpu", "cuda", "xpu", "mps")
"""Kinds of device: "cuda" are the GPUs of NVIDIA and, with torch for ROCm, of AMD; Intel's; Apple's."""
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def resolve(device: str) -> torch.device:
    """The device a setting means; "auto" is the first CUDA or ROCm GPU if there is one, else the CPU.

    Raises:
        Refused: no such device on this machine.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as problem:
        raise Refused(f'device "{device}" is not known. Say auto, cpu, cuda or cuda:1.') from problem
    if found.type not in KINDS:
        raise Refused(f'device "{device}": networks are not computed there. Say auto, {", ".join(KINDS)}.')
    if found.type == "cpu":
        return found
    count = _count(found.type)
    if (found.index or 0) >= count:
        raise Refused(
            f'device "{device}" is not there: torch {torch.__version__} sees {count} devices of the kind '
            f'"{found.type}". Say auto or cpu, or install torch as it is built for that device.'
        )
    _let_segments_grow(found)
    return found


def _count(kind: str) -> int:
    """How many devices of a kind other than the CPU torch sees."""
    if kind == "cuda":
        return torch.cuda.device_count()
    present = torch.accelerator.current_accelerator(check_available=True)
    return torch.accelerator.device_count() if present is not None and present.type == kind else 0


def _let_segments_grow(device: torch.device) -> None:
    """Let torch's allocator grow what it has: samples of many shapes would else leave holes nobody can use.

    The environment decides where it says how (PYTORCH_ALLOC_CONF); AMD's driver cannot.
    """
    if device.type == "cuda" and sys.platform == "linux" and torch.version.hip is None:
        if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
            os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def wait_for(device: torch.device) -> None:
    """Return when the device has done all it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


@contextmanager
def deterministic(device: torch.device, asked: bool) -> Iterator[None]:
    """Within it a GPU adds in one order, where torch has a way to; what has none is warned of.

    A CPU does so anyway.
    """
    if device.type != "cuda" or not asked:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    backend: Any = torch.backends.cudnn
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        backend.deterministic,
        backend.benchmark,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    backend.deterministic, backend.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        backend.deterministic, backend.benchmark = before[2:]


@contextmanager
def keep_freed_memory(device: torch.device) -> Iterator[None]:
    """Within it a CPU run keeps the memory of what it let go, to take it again in its next step.

    The C library gives large arrays back to the system, which clears the pages it lends anew: a tenth of a
    step of a transformer of 60 M weights. Where there is no glibc nothing is changed.
    """
    library = _c_library()
    if device.type != "cpu" or not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(MMAP_MAX, 0)
    library.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    library.mallopt(TOP_PAD, 64 << 20)
    try:
        yield
    finally:
        # The thresholds that glibc itself arrives at in a process with large arrays.
        library.mallopt(MMAP_MAX, 65536)
        library.mallopt(MMAP_THRESHOLD, 32 << 20)
        library.mallopt(TRIM_THRESHOLD, 64 << 20)
        library.mallopt(TOP_PAD, 128 << 10)
        trim_memory()


def release_cached_memory() -> None:
    """Give the memory that torch keeps of a GPU's back to it, in one piece for what comes next."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.get_device_module().empty_cache()


def trim_memory() -> None:
    """Give memory that nothing uses back to the system, where the C library has been keeping it."""
    library = _c_library()
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _c_library() -> Any:
    """The functions of the C library this process runs on; None but on Linux, where they are ours to set."""
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that are free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "xpu":
        return torch.xpu.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return psutil.virtual_memory().available
