"""A network's repeated blocks, and what can be done block by block: recompute, compile, lend to the GPU."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfumato.errors import Refused, one_of


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks in the order in which they are listed; for a UNet its middle too."""
    return list(_walk(network))


def _walk(network: nn.Module) -> Iterator[nn.Module]:
    lists = [part for part in network.children() if isinstance(part, nn.ModuleList)]
    if not lists:
        for part in network.children():
            yield from _walk(part)
    for name, part in network.named_children():
        if isinstance(part, nn.ModuleList):
            yield from part
        elif lists and name == "mid_block":
            yield part


ASKED_ALONE = {"DiTTransformer2DModel": ("transformer_blocks.0.norm1.emb",)}
"""Parts of blocks that a network of diffusers also asks outside of their block, by its class."""


def asked_alone(network: nn.Module) -> list[nn.Module]:
    """The parts of blocks that are also asked while their block is not: they must have their own weights."""
    return [
        part.get_submodule(name)
        for part in network.modules()
        for name in ASKED_ALONE.get(type(part).__name__, ())
    ]


Within = Callable[[], AbstractContextManager[None]]
_AGAIN: ContextVar[Within | None] = ContextVar("again", default=None)


@contextmanager
def again_within(make: Within) -> Iterator[None]:
    """Blocks asked while this lasts are also computed again within what `make` gives: hooks that act now
    must act then.
    """
    token = _AGAIN.set(make)
    try:
        yield
    finally:
        _AGAIN.reset(token)


class _Recomputed:
    """Mixed into a block's class: what it computes is not kept but computed again when it is needed."""

    def forward(self, *given: Any, **named: Any) -> Any:
        """As the block itself."""
        asked = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return asked(*given, **named)
        again = _AGAIN.get()
        beside = {"context_fn": lambda: (nullcontext(), again())} if again is not None else {}
        return checkpoint(asked, *given, use_reentrant=False, **beside, **named)


def _named_as(kind: type[nn.Module]) -> Callable[..., Any]:
    """`_Recomputed.forward` with the arguments' names of the block's own, which hooks look for."""

    @wraps(kind.forward)
    def forward(self: Any, *given: Any, **named: Any) -> Any:
        return _Recomputed.forward(self, *given, **named)

    return forward


def recompute(network: nn.Module, every: int) -> int:
    """Let every `every`-th block be computed again in the backward pass; returns how many are.

    Raises:
        Refused: the network has no blocks.
    """
    found = blocks_of(network)[::every] if every else []
    if every and not found:
        raise Refused(
            f"train.gradient_checkpointing: {type(network).__name__} has no repeated blocks. Leave it at 0."
        )
    for block in found:
        kind = type(block)
        if not issubclass(kind, _Recomputed):
            own = {"__module__": kind.__module__, "forward": _named_as(kind)}
            block.__class__ = type(kind.__name__, (_Recomputed, kind), own)
    return len(found)


def compile_blocks(network: nn.Module, device: torch.device) -> int:
    """Compile each repeated block when it is first asked; returns how many.

    Raises:
        Refused: the network has no blocks, or the machine no compiler.
    """
    found = blocks_of(network)
    if not found:
        raise Refused(f"train.compile: {type(network).__name__} has no repeated blocks. Leave it out.")
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise Refused(
            "train.compile needs a C++ compiler on a CPU, and none is here. Install g++, or leave it out."
        )
    for block in found:
        block.compile()
    return len(found)


def set_attention_backend(network: nn.Module, backend: str) -> int:
    """Let the network's attention be computed by one of diffusers' backends; returns how many layers obey.

    diffusers also makes the last choice every other network's; that is undone.

    Raises:
        Refused: no such backend, it does not work here, or this network's attention does not ask for one.
    """
    from diffusers.models import attention_dispatch as dispatch

    known = [one.value for one in dispatch.AttentionBackendName]
    one_of("model.attention_backend:", backend, known)
    registry: Any = dispatch._AttentionBackendRegistry
    before = registry.get_active_backend()[0]
    try:
        asks = [part for part in network.modules() if hasattr(part, "set_attention_backend")]
        for part in asks[:1]:
            cast(Any, part).set_attention_backend(backend)
    except (RuntimeError, ImportError, ValueError, NotImplementedError) as problem:
        said = " ".join(str(problem).split())
        raise Refused(
            f'model.attention_backend = "{backend}" does not work on this machine: {said}'
        ) from problem
    finally:
        registry.set_active_backend(before)
    chosen = [
        part
        for part in network.modules()
        if getattr(getattr(part, "processor", None), "_attention_backend", None) is not None
    ]
    if not chosen:
        raise Refused(
            f"model.attention_backend: {type(network).__name__} computes its attention itself and "
            "asks for no backend. Leave it out."
        )
    return len(chosen)


def _tensors(answer: Any) -> Iterator[Tensor]:
    """The tensors in what a block answers."""
    if isinstance(answer, Tensor):
        yield answer
    elif isinstance(answer, dict | list | tuple):
        for one in answer.values() if isinstance(answer, dict) else answer:
            yield from _tensors(one)


QUANTIZED = ("codes", "scales")
"""The buffers in which a layer keeps frozen weights of few bits."""


class OffloadedBlocks:
    """Frozen weights that live in the CPU's memory and are lent to the GPU block by block.

    While one block is computed the next one's weights are copied on a stream of their own; what was asked is
    dropped, so that two blocks are there at most. Trained weights stay on the GPU.

    Backwards a block is lent when the gradient of its answer is there, and dropped when that of another's is:
    torch's own hook for "the backward pass of this module is over" heeds tensors given by position alone, and
    comes before that pass where none of them needs a gradient. Which block comes next is learned from the
    last forward pass.

    Args:
        alone: parts of blocks that stay on the GPU, because they are asked without their block too.
    """

    def __init__(
        self, blocks: list[nn.Module], device: torch.device, alone: Sequence[nn.Module] = ()
    ) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.homes: list[list[tuple[Tensor, Tensor]]] = []
        self.there: list[Any] = [None] * len(blocks)
        self.after: dict[int, int] = {}
        """The block that was asked after each."""
        self.asked: int | None = None
        self.copies = 0
        stays = {id(weight) for part in alone for weight in part.parameters()}
        for place, block in enumerate(blocks):
            frozen = [
                weight
                for weight in block.parameters()
                if not weight.requires_grad and id(weight) not in stays
            ]
            frozen += [one for name, one in block.named_buffers() if name.split(".")[-1] in QUANTIZED]
            self.homes.append([(weight, self._home(weight)) for weight in frozen])
            self.drop(place)
            block.register_forward_pre_hook(self._before_forward(place))
            block.register_forward_hook(self._after_forward(place))

    def move_rest(self, network: nn.Module) -> None:
        """Move the rest of a network, whose blocks are lent, to the device for good."""
        lent = {id(weight) for homes in self.homes for weight, _ in homes}
        for tensor in (*network.parameters(), *network.buffers()):
            if id(tensor) not in lent:
                tensor.data = tensor.data.to(self.device)

    def _home(self, weight: Tensor) -> Tensor:
        home = weight.detach().to("cpu", copy=True)
        return home.pin_memory() if self.stream is not None else home

    def _before_forward(self, place: int) -> Any:
        def load(*_: Any) -> None:
            if self.asked is not None and self.asked != place:
                self.after[self.asked] = place
            self.asked = place
            self.lend(place, self.after.get(place))

        return load

    def _after_forward(self, place: int) -> Any:
        load = self._before_backward(place)

        def watch(block: nn.Module, given: Any, answer: Any) -> None:
            for one in _tensors(answer):
                if one.requires_grad:
                    one.register_hook(load)

        return watch

    def _before_backward(self, place: int) -> Any:
        def load(gradient: Tensor) -> None:
            if self.asked is not None:  # the last of this forward pass: none follows it
                self.after.pop(self.asked, None)
                self.asked = None
            before = next((one for one, then in self.after.items() if then == place), None)
            self.lend(place, before)

        return load

    def lend(self, place: int, following: int | None = None) -> None:
        """Have a block's weights on the device, begin to copy those of the one that follows, drop others."""
        for other in range(len(self.homes)):
            if self.there[other] is not None and other not in (place, following):
                self.drop(other)
        self.copy(place)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self.there[place])
        if following is not None:
            self.copy(following)

    def copy(self, place: int) -> None:
        """Begin to copy a block's weights to the device, unless they are there."""
        if self.there[place] is not None:
            return
        self.copies += 1
        if self.stream is None:
            for weight, home in self.homes[place]:
                weight.data = home.to(self.device, copy=True)
            self.there[place] = True
            return
        with torch.cuda.stream(self.stream):
            for weight, home in self.homes[place]:
                weight.data = home.to(self.device, non_blocking=True)
            self.there[place] = self.stream.record_event()

    def drop(self, place: int) -> None:
        """Let the copies go; what was queued for them is still computed."""
        for weight, home in self.homes[place]:
            if self.stream is not None and weight.data.is_cuda:
                weight.data.record_stream(torch.cuda.current_stream(self.device))
            weight.data = home
        self.there[place] = None


def offload_blocks(network: nn.Module, device: torch.device, recomputed: bool = True) -> OffloadedBlocks:
    """Keep the frozen weights of the network's blocks in the CPU's memory and lend them to the GPU.

    Args:
        recomputed: whether every block is computed again in the backward pass.
    Raises:
        Refused: there is no GPU to lend to, nothing frozen in blocks, or blocks that keep what they are lent.
    """
    if device.type != "cuda":
        raise Refused(
            f"train.offload lends a GPU what does not fit into its memory, but this run is on the "
            f"{device.type}. Leave train.offload out."
        )
    if not recomputed:
        raise Refused(
            "train.offload frees nothing while blocks keep their weights for the backward pass. Say "
            "train.gradient_checkpointing = 1 with it."
        )
    found = blocks_of(network)
    if not any(not weight.requires_grad for block in found for weight in block.parameters()):
        raise Refused(
            "train.offload: nothing in this network's blocks is frozen. It is for adapters; leave it out."
        )
    return OffloadedBlocks(found, device, asked_alone(network))
