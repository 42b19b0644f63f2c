"""Many processes, one run: each computes parts of the batch, and their gradients are added.

Fast: one all-reduce a step, equal to one process up to rounding. Exact: the batch always has the same
parts, whoever computes them, and gradients are added in one fixed binary tree,

    ((g₀ + g₁) + (g₂ + g₃)) + ((g₄ + g₅) + (g₆ + g₇)),

each process its own subtree first, so that 1, 2, 4 … processes end with the same bits.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.run_folder import RunFolder
from sfumato.training.settings import TrainSettings

PATIENCE = timedelta(hours=2)
LONG_PATIENCE = timedelta(days=7)
"""While one process encodes or trains a codec, the others wait."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run and which of them this is; `group_size` share each sample (context parallel)."""

    rank: int = 0
    count: int = 1
    group_size: int = 1

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes, draws and speaks for all."""
        return self.rank == 0

    @property
    def group(self) -> int:
        """Which group of processes that share samples this one is in; of `groups`."""
        return self.rank // self.group_size

    @property
    def groups(self) -> int:
        """Groups of processes that compute samples of their own."""
        return self.count // self.group_size

    @property
    def is_group_leader(self) -> bool:
        """Whether this process reports what its group computed."""
        return self.rank % self.group_size == 0

    def broadcast_number(self, number: int) -> int:
        """The number the leading process has."""
        if self.count == 1:
            return number
        leading = torch.tensor([number], device=_own_device())
        dist.broadcast(leading, 0)
        return int(leading)

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors that the groups have, on the CPU."""
        if self.count > 1:
            total = (
                tensor.to(_own_device())
                if self.is_group_leader
                else torch.zeros_like(tensor, device=_own_device())
            )
            dist.all_reduce(total)
            return total.cpu()
        return tensor

    def wait(self) -> None:
        """Return when every process is here."""
        if self.count > 1:
            _wait_for_all()

    def indices_of_rank(self, count: int) -> list[int]:
        """Which of `count` things this group does; one at least, so that all compute together."""
        return list(range(self.group, count, self.groups)) or [0] * bool(count)

    @torch.no_grad()
    def broadcast_weights(self, network: nn.Module) -> None:
        """Give every process the leading one's weights and buffers."""
        if self.count > 1:
            for tensor in network.state_dict().values():
                dist.broadcast(tensor, 0)

    @contextmanager
    def first(self) -> Iterator[None]:
        """The leading process does the block, then the others do, and find done what is kept on disk."""
        if not self.is_rank_zero:
            _wait_for_all()
        yield
        if self.is_rank_zero and self.count > 1:
            _wait_for_all()


def current_processes() -> Processes:
    """The processes that were joined; one if none were."""
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size(), _GROUP_SIZE.get())
    return Processes()


_GROUP_SIZE: ContextVar[int] = ContextVar("group_size", default=1)


@contextmanager
def shared_samples(group_size: int) -> Iterator[None]:
    """Inside it, so many processes share each sample."""
    token = _GROUP_SIZE.set(group_size)
    try:
        yield
    finally:
        _GROUP_SIZE.reset(token)


@contextmanager
def join_processes(device: str = "auto") -> Iterator[Processes]:
    """Join the other processes if torchrun started this one; leave them at the end.

    On GPUs each process takes the one of its local rank (nccl), on CPUs they talk through gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or current_processes().count > 1:
        yield current_processes()
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu and ":" in device:
        raise Refused(
            f'train.device = "{device}" puts every process on one GPU. Under torchrun say train.device = '
            '"cuda": each process takes the GPU of its local rank.'
        )
    if on_gpu:
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(own)
        dist.init_process_group("nccl", timeout=PATIENCE, device_id=own)
        waiting = dist.new_group(backend="gloo", timeout=LONG_PATIENCE)
        _WAITING.extend([waiting] if isinstance(waiting, dist.ProcessGroup) else [])
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield current_processes()
    finally:
        _WAITING.clear()
        dist.destroy_process_group()


_WAITING: list[dist.ProcessGroup] = []
"""The group in which processes with GPUs wait: NCCL's watchdog ends those that wait for long."""


def _wait_for_all() -> None:
    dist.barrier(_WAITING[0] if _WAITING else None)


def _own_device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def run_folder_of_rank(run: RunFolder) -> RunFolder:
    """The run folder as this process may use it: all of it if it leads, else without writing."""
    return run if current_processes().is_rank_zero or isinstance(run, SilentRun) else SilentRun(run.path)


class SilentRun(RunFolder):
    """A run folder as the processes that do not lead see it: read, never written."""

    def event(self, kind: str, *, sync: bool = False, **fields: object) -> None:
        """Leave the writing to the leading process; who listens here hears it."""
        for listener in self.listeners:
            listener({"kind": kind, **fields})

    @contextmanager
    def lock(self) -> Iterator[RunFolder]:
        """The leading process holds it for all."""
        yield self


@dataclass(frozen=True)
class BatchSplit:
    """How a batch is divided: into `parts`, of which this process computes `mine`."""

    parts: int
    mine: range
    exact: bool

    @classmethod
    def of(cls, settings: TrainSettings, processes: Processes) -> "BatchSplit":
        """As the settings say.

        Raises:
            Refused: the batch has fewer samples than parts, or exact parts cannot be shared evenly.
        """
        among = replace(processes, group_size=settings.context_parallel)
        exact, count = settings.exact_elastic, max(1, among.groups)
        parts = settings.gradient_accumulation * count
        if exact:
            parts = 1 << (max(settings.elastic_max_ranks, settings.gradient_accumulation) - 1).bit_length()
        if parts > settings.batch:
            also = "train.elastic_max_ranks, " if exact else ""
            raise Refused(
                f"A batch of {settings.batch} cannot be divided into {parts} parts. Raise train.batch, or "
                f"lower {also}train.gradient_accumulation or the number of processes."
            )
        if parts % count or (exact and count & (count - 1)):
            raise Refused(
                f"With train.exact_elastic a batch has {parts} parts, which {count} processes cannot share "
                f"in one tree. Start a power of two of them, at most {parts} (train.elastic_max_ranks)."
            )
        each = parts // count
        return cls(parts, range(among.group * each, (among.group + 1) * each), exact)


class Gradients:
    """The sum of the parts' gradients, left in the weights' `.grad` when a batch is complete.

    Those of many processes are added in exact mode alone; in fast mode `BucketedGradients` adds them.
    """

    def __init__(self, weights: Sequence[nn.Parameter], processes: Processes, exact: bool) -> None:
        self.weights, self.processes, self.exact = list(weights), processes, exact
        self.loss = torch.zeros((), device=self.weights[0].device)
        self._tree: list[tuple[int, Tensor]] = []

    def begin(self, is_last: bool) -> None:
        """Before each part: nothing is sent until all are computed."""

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of the gradients, which every process has whole."""
        return torch.nn.utils.get_total_norm(gradients, foreach=True)

    def add(self, loss: Tensor) -> None:
        """Take in one part after its backward pass; `loss` is its share of the batch's mean."""
        if not self.exact:
            self.loss = self.loss + loss.float()
            return
        level, packed = 0, self._pack(loss.float())
        while self._tree and self._tree[-1][0] == level:
            packed = self._tree.pop()[1].add_(packed)
            level += 1
        self._tree.append((level, packed))
        self.clear()

    def total(self, stop: bool) -> tuple[Tensor, Tensor | bool]:
        """Add what the processes have: (the batch's mean loss, how many of them were asked to stop)."""
        if not self.exact:
            loss, self.loss = self.loss, torch.zeros_like(self.loss)
            return loss, stop
        packed = self._sum_in_tree(self._tree.pop()[1], stop)
        self._unpack(packed)
        return packed[-2].clone(), packed[-1].clone()

    def clear(self) -> None:
        """Forget the weights' gradients."""
        for weight in self.weights:
            weight.grad = None

    def _sum_in_tree(self, mine: Tensor, stop: bool) -> Tensor:
        """The root of the tree whose subtrees the processes hold."""
        mine[-1] = float(stop)
        if self.processes.count == 1:
            return mine
        held = [torch.empty_like(mine) for _ in range(self.processes.count)]
        dist.all_gather(held, mine)
        while len(held) > 1:
            held = [left.add_(right) for left, right in zip(held[::2], held[1::2], strict=True)]
        return held[0]

    def _pack(self, loss: Tensor) -> Tensor:
        """All gradients as one float32 vector, followed by the loss and a place for the wish to stop."""
        flat = [
            torch.zeros(weight.numel(), device=weight.device)
            if weight.grad is None
            else weight.grad.detach().flatten().float()
            for weight in self.weights
        ]
        return torch.cat([*flat, loss.detach().view(1), torch.zeros(1, device=loss.device)])

    def _unpack(self, packed: Tensor) -> None:
        place = 0
        for weight in self.weights:
            weight.grad = packed[place : place + weight.numel()].view_as(weight).to(weight.dtype)
            place += weight.numel()
