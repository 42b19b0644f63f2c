"""What a step costs, said before it is taken: memory counted on the meta device, time from its FLOPs.

    peak = weights + gradients + optimizer + average + saved activations + one layer's scratch

A forward pass on the meta device computes shapes only, so the count takes milliseconds for any size. A
probe of a few real steps then says what the machine makes of it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from sfumato.training.distributed.processes import BatchSplit, Processes
from sfumato.training.distributed.sharding import trained_parameters
from sfumato.training.distributed.strategy import Strategy
from sfumato.training.optim.optimizers import spec_of
from sfumato.training.settings import TrainSettings
from sfumato.training.state.posthoc_ema import is_kept_on

FORWARD_AND_BACKWARD = 3
NON_MATMUL_FACTOR = 1.35
"""A step's time over that of its matrix products, as measured on CPUs."""
NEEDS_VALUES = (RuntimeError, NotImplementedError, TypeError)
"""What a network raises on the meta device when it asks for numbers: then only a probe can tell."""
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class MemoryBreakdown:
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

    def probed(self, peak: int) -> "MemoryBreakdown":
        """What real steps of one whole copy took: they say what is held beside that which is counted."""
        least = self.weights + self.gradients + self.optimizer + self.average
        kept = min(self.activations, max(0, peak - least))
        return replace(self, activations=kept, scratch=max(0, peak - least - kept))


@dataclass(frozen=True)
class StepCost:
    """What one step needs: bytes, and floating point operations forwards and backwards."""

    memory: MemoryBreakdown
    flops: int

    def seconds(self, flops_per_second: float) -> float:
        """The least time of a step on a machine of that speed; what is no matrix product comes on top."""
        return self.flops / flops_per_second


@dataclass(frozen=True)
class MemoryCount:
    """What one pass of a network was counted to need, in bytes.

    kept: activations saved for the backward pass; scratch: the largest of them; blocks: what each repeated
    block saves, and the bytes of its input; numbers: how many weights are trained, matrices: of them in
    matrices; frozen, frozen_in_blocks: of the weights; block, root: all weights of the largest block, and
    of what is in none; host: whether power averages take the same memory.
    """

    kept: int
    scratch: int
    blocks: tuple[tuple[int, int], ...]
    numbers: int
    matrices: int
    frozen: int
    frozen_in_blocks: int
    block: int
    root: int
    host: bool
    flops: int

    def memory(self, settings: TrainSettings, recomputed_every: int = 0) -> MemoryBreakdown:
        """The bytes of a step with these settings, every n-th block computed again.

        Of processes that share each sample (`context`) each keeps the activations of its tokens.
        """
        optimizer = spec_of(settings.optimizer)
        wide = 4 * self.numbers - (2 * self.matrices if settings.weight_dtype != "fp32" else 0)
        masters = 4 * self.matrices if settings.weight_dtype == "bf16-masters" else 0
        again = self.blocks[::recomputed_every] if recomputed_every else ()
        kept = self.kept - sum(max(0, saved - given) for saved, given in again)
        kept += max((saved for saved, _ in again), default=0)
        kept = max(kept // settings.context_parallel, int(4 * optimizer.temporary * self.numbers))
        averages = bool(settings.ema) + 2 * (bool(settings.ema_snapshot_every) and self.host)
        return MemoryBreakdown(
            weights=wide + self.frozen,
            gradients=wide,
            optimizer=int(optimizer.states_on_device * 4 * self.numbers) + masters,
            average=4 * self.numbers * averages,
            activations=kept,
            scratch=4 * self.scratch // settings.context_parallel,
        )

    def shared(
        self, memory: MemoryBreakdown, strategy: Strategy, settings: TrainSettings, count: int
    ) -> MemoryBreakdown:
        """Of the bytes that one process alone would need, what each of `count_memory` holds.

        Whole copies pack their gradients to send them, when the activations are gone. Divided ones gather
        two blocks at a time; a batch in parts keeps its gradients whole until the last.
        """
        if not strategy.is_divided:
            packed = 4 * self.numbers if count > 1 else 0
            return replace(memory, activations=max(memory.activations, packed))
        share = strategy.share(count)
        gathered = min(self.root + 2 * self.block, memory.weights)
        in_parts = settings.gradient_accumulation > 1
        return replace(
            memory,
            weights=memory.weights // share + gathered,
            gradients=memory.gradients // (1 if in_parts else share) + (0 if in_parts else self.block),
            optimizer=memory.optimizer // share,
            average=memory.average // share,
        )

    def recomputed_share(self, every: int) -> float:
        """The share of the saved activations, and about of the forward pass, that is computed again."""
        return sum(saved for saved, _ in self.blocks[::every]) / max(1, self.kept)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks in the network's lists, outermost lists only."""
    found: list[nn.Module] = []
    for child in network.children():
        found += list(child) if isinstance(child, nn.ModuleList) else repeated_blocks(child)
    return found


class _SavedTensors:
    """Hears what a forward pass saves for its backward pass, and what of it each block."""

    def __init__(self, network: nn.Module) -> None:
        own = [*network.parameters(), *network.buffers()]
        self._own = {tensor.untyped_storage()._cdata for tensor in own}
        self._found: dict[int, Any] = {}
        self.total = self.largest = 0
        self.blocks: list[tuple[int, int]] = []

    def note(self, tensor: Tensor) -> Tensor:
        """Count a saved tensor, each memory once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own and storage._cdata not in self._found:
            self._found[storage._cdata] = storage
            self.total += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
        return tensor

    @contextmanager
    def heard(self, blocks: Iterable[nn.Module]) -> Iterator[None]:
        """Within it, everything that is saved is counted."""
        open_blocks: list[int] = []

        def enter(module: nn.Module, given: Any) -> None:
            open_blocks.append(self.total)

        def leave(module: nn.Module, given: Any, answer: Any) -> None:
            size = sum(one.nbytes for one in given if isinstance(one, Tensor))
            self.blocks.append((self.total - open_blocks.pop(), size))

        handles = [
            handle
            for block in blocks
            for handle in (block.register_forward_pre_hook(enter), block.register_forward_hook(leave))
        ]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.note, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()


def saved_bytes(forward: Callable[[], Any], network: nn.Module) -> int:
    """Bytes of all tensors that a real forward pass saves for its backward pass."""
    saved = _SavedTensors(network)
    with saved.heard(()):
        kept = forward()
    del kept
    return saved.total


def count_memory(network: nn.Module, inputs: Inputs) -> MemoryCount:
    """Count one forward pass of `network(*inputs)` on the meta device.

    Raises:
        RuntimeError: the network asks for the numbers in its inputs, so only a probe can tell.
    """
    known = _counted.setdefault(network, {})
    asked = (_layout(network), _shapes(inputs))
    if asked not in known:
        known[asked] = _count_afresh(network, inputs)
    return known[asked]


_counted: WeakKeyDictionary[nn.Module, dict[Any, MemoryCount]] = WeakKeyDictionary()
"""What was counted before: a run's plan and its first sanity check ask for the same."""


def _layout(network: nn.Module) -> Any:
    """What of a network a count depends on, its numbers left out."""
    weights = [
        (tuple(one.shape), one.dtype, one.requires_grad, one.device.type) for one in network.parameters()
    ]
    recomputed = [getattr(module, "gradient_checkpointing", None) for module in network.modules()]
    return (
        tuple(weights),
        tuple(recomputed),
        torch.is_autocast_enabled(next(network.parameters()).device.type),
    )


def _shapes(value: Any) -> Any:
    """Shapes and kinds of tensors in inputs, conditions, mappings and sequences."""
    if isinstance(value, list | tuple):
        return tuple(map(_shapes, cast(Sequence[Any], value)))
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Mapping):
        return tuple((name, _shapes(one)) for name, one in cast(Mapping[str, Any], value).items())
    return value


def _count_afresh(network: nn.Module, inputs: Inputs) -> MemoryCount:
    shadow = meta_copy(network).train()
    shapes = tuple(to_meta(value) for value in inputs)
    blocks, saved = repeated_blocks(shadow), _SavedTensors(shadow)
    counter = FlopCounterMode(display=False)
    narrow: torch.dtype | None = getattr(network, "compute_dtype", None)
    with counter, saved.heard(blocks), MetaAutocast(narrow) if narrow else nullcontext():
        kept = shadow(*shapes)
    del kept
    weights = list(trained_parameters(shadow).values())
    numbers = sum(weight.numel() for weight in weights)
    everything = sum(tensor.nbytes for tensor in [*shadow.parameters(), *shadow.buffers()])
    frozen = [sum(w.nbytes for w in block.parameters() if not w.requires_grad) for block in blocks]
    held = [sum(weight.nbytes for weight in block.parameters()) for block in blocks]
    return MemoryCount(
        kept=saved.total,
        scratch=saved.largest,
        blocks=tuple(saved.blocks),
        numbers=numbers,
        matrices=sum(weight.numel() for weight in weights if weight.ndim >= 2),
        frozen=everything - sum(weight.nbytes for weight in weights),
        frozen_in_blocks=sum(frozen),
        block=max(held, default=0),
        root=everything - sum(held),
        host=is_kept_on(next(network.parameters()).device, numbers),
        flops=counter.get_total_flops(),
    )


PRODUCTS = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.conv_transpose3d, torch.matmul, torch.bmm,
    torch.addmm, torch.baddbmm, torch.Tensor.matmul, torch.Tensor.__matmul__, F.scaled_dot_product_attention,
}  # fmt: skip
NORMS = {F.group_norm, F.layer_norm, F.rms_norm}


class MetaAutocast(TorchFunctionMode):
    """What torch.autocast does, on the meta device, which it does not know: products narrow, norms wide."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The same call, its tensors of one dtype."""
        dtype = self.dtype if func in PRODUCTS else torch.float32 if func in NORMS else None
        if dtype is None:
            return func(*args, **(kwargs or {}))
        known = {name: _cast(one, dtype) for name, one in (kwargs or {}).items()}
        return func(*[_cast(one, dtype) for one in args], **known)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def meta_copy(network: nn.Module) -> nn.Module:
    """The network without its numbers; the original is not copied on the way."""
    memo: dict[int, Any] = {
        id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
        for weight in network.parameters()
    }
    memo |= {id(one): torch.empty_like(one, device="meta") for one in network.buffers()}
    return copy.deepcopy(network, memo)


def to_meta(value: Any) -> Any:
    """Tensors (in conditions, mappings, sequences) without their numbers."""
    if isinstance(value, list):
        return [to_meta(one) for one in value]
    if isinstance(value, Tensor) or hasattr(value, "tensors"):
        return value.to("meta")
    return value


def predict_step(network: nn.Module, inputs: Inputs, settings: TrainSettings) -> StepCost:
    """Count one step of `network(*inputs)`, inputs being those of one part of a batch.

    Raises:
        RuntimeError: the network asks for the numbers in its inputs, so only a probe can tell.
    """
    counted = count_memory(network, inputs)
    parts = BatchSplit.of(settings, Processes()).parts
    return StepCost(counted.memory(settings), FORWARD_AND_BACKWARD * parts * counted.flops)
