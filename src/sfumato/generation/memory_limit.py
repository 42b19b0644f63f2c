"""Drawing with less memory than a model takes: stages in turn on the device, the largest block by block.

Nothing is computed otherwise: what does not fit at once waits in the host's memory, and is copied to the
device when it is asked. What that costs is copying.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.models.interface import Model, StagePlacement
from sfumato.models.networks.blocks import OffloadedBlocks, asked_alone, blocks_of

WORKING_SHARE = 0.2
"""Of the memory, what is left to what the stages compute with."""
STAYS, COMES, BY_BLOCKS = "stays", "comes", "by blocks"
NAMES = {"conditioner": "text encoders", "denoiser": "network", "codec": "codec"}


def stage_bytes(module: nn.Module) -> int:
    """Bytes of a stage's, or any network's, weights and buffers."""
    return sum(one.nbytes for one in _tensors(module))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


class LimitedPlacement(StagePlacement):
    """Where stages are while others work, so that a device's memory is enough for the one that does.

    Args:
        stages: by their names; limit: bytes. say: hears what was chosen, and what had to be chosen later.
    """

    def __init__(
        self, device: torch.device, limit: float, stages: Mapping[str, nn.Module], say: Callable[[str], None]
    ) -> None:
        super().__init__(device)
        self.limit, self.stages, self.say = limit, dict(stages), say
        self.sizes = {name: stage_bytes(stage) for name, stage in stages.items()}
        self.ways: dict[str, str] = {}
        self._lent: dict[str, OffloadedBlocks] = {}
        self._left = [one for one in self._arrangements() if self._needs(one) <= limit * (1 - WORKING_SHARE)]
        self._left = self._left or self._arrangements()[-1:]
        self.step_down()

    def _arrangements(self) -> list[dict[str, str]]:
        """Ways to place the stages, each with less on the device than the one before."""
        found = [dict.fromkeys(self.stages, STAYS)]
        found.append({**dict.fromkeys(self.stages, COMES), "denoiser": STAYS})
        found.append(dict.fromkeys(self.stages, COMES))
        for name in sorted(self.stages, key=lambda one: -self.sizes[one]):
            if blocks_of(self.stages[name]) and name != "codec":
                found.append({**found[-1], name: BY_BLOCKS})
        return found

    def _needs(self, ways: Mapping[str, str]) -> float:
        """Bytes of weights on the device at once."""
        at_once = {
            name: self.sizes[name] if way != BY_BLOCKS else self._lent_bytes(name)
            for name, way in ways.items()
        }
        staying = sum(at_once[name] for name, way in ways.items() if way == STAYS)
        return staying + max((at_once[name] for name, way in ways.items() if way != STAYS), default=0)

    def _lent_bytes(self, name: str) -> int:
        """Bytes of a stage on the device when its blocks come one by one, the next one beside each."""
        blocks = [stage_bytes(block) for block in blocks_of(self.stages[name])]
        return self.sizes[name] - sum(blocks) + 2 * max(blocks)

    def step_down(self) -> bool:
        """Place the stages so that less is on the device at once; False where nothing is left to do."""
        if not self._left:
            return False
        self.ways = self._left.pop(0)
        for name, way in self.ways.items():
            stage = self.stages[name].requires_grad_(False)
            if name not in self._lent:
                for tensor in _tensors(stage):
                    tensor.data = tensor.data.to(self.device if way == STAYS else "cpu")
                if way == BY_BLOCKS:
                    self._lent[name] = OffloadedBlocks(blocks_of(stage), self.device, asked_alone(stage))
        if self.device.type != "cpu":
            torch.get_device_module(self.device).empty_cache()
        if set(self.ways.values()) != {STAYS}:
            self.say(self.describe())
        return True

    def describe(self) -> str:
        """What is where, and what is copied for it."""
        parts = []
        for name, way in self.ways.items():
            what = f"the {NAMES.get(name, name)} ({self.sizes[name] / 1e9:.2f} GB)"
            each = "for each evaluation" if name == "denoiser" else "each time it is asked"
            parts.append(
                {
                    STAYS: f"{what} stays on the device",
                    COMES: f"{what} is copied there while it works",
                    BY_BLOCKS: f"{what} is copied there block by block, {each}",
                }[way]
            )
        return f"In {self.limit / 1e9:.3g} GB of memory: {'; '.join(parts)}."

    @contextmanager
    def at_work(self, *stages: nn.Module) -> Iterator[None]:
        """Within it the stages are on the device, or their blocks come when they are asked."""
        names = {id(stage): name for name, stage in self.stages.items()}
        with ExitStack() as places:
            for stage in stages:
                way = self.ways.get(names.get(id(stage), ""), STAYS)
                if way == COMES:
                    places.enter_context(super().at_work(stage))
                elif way == BY_BLOCKS:
                    places.enter_context(self._by_blocks(stage, self._lent[names[id(stage)]]))
            yield

    @contextmanager
    def _by_blocks(self, stage: nn.Module, lent: OffloadedBlocks) -> Iterator[None]:
        if id(stage) in self.busy:
            yield
            return
        own = {id(tensor) for homes in lent.homes for tensor, _ in homes}
        homes = [(tensor, tensor.data) for tensor in _tensors(stage) if id(tensor) not in own]
        self.busy.add(id(stage))
        try:
            for tensor, home in homes:
                tensor.data = home.to(self.device)
            yield
        finally:
            self.busy.discard(id(stage))
            for place in range(len(lent.homes)):
                lent.drop(place)
            for tensor, home in homes:
                tensor.data = home


def place_within(
    model: Model,
    device: torch.device,
    limit: float | None,
    say: Callable[[str], None] = lambda sentence: None,
) -> None:
    """Let a model draw on a device within so many bytes of its memory; None: within what is free there.

    Raises:
        Refused: the device has no memory of its own.
    """
    if device.type == "cpu":
        raise Refused(
            "memory bounds what a model takes of a GPU's memory, and this one is drawn with on the CPU. "
            "Leave memory out."
        )
    memory: Any = torch.get_device_module(device)
    if limit is None:
        limit = float(memory.mem_get_info(device)[0]) if hasattr(memory, "mem_get_info") else math.inf
    elif device.type == "cuda":
        total = memory.mem_get_info(device)[1]
        memory.set_per_process_memory_fraction(min(1.0, limit / total), device)
    stages = {"conditioner": model.conditioner, "denoiser": model.denoiser, "codec": model.codec}
    model.placement = LimitedPlacement(device, limit, stages, say)


def within_memory(model: Model, work: Callable[[], Any]) -> Any:
    """What `work` gives; where memory is out, again with less on the device, as long as that can be."""
    while True:
        try:
            return work()
        except torch.OutOfMemoryError:
            if not (isinstance(model.placement, LimitedPlacement) and model.placement.step_down()):
                raise
