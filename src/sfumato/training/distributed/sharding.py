"""A network divided among processes: each holds rows of every weight, gradient, moment and average.

torch's `fully_shard` (FSDP2) gathers a block's weights when the block is computed and lets them go again;
gradients are summed and scattered. Everything else here sees the rows that this process holds as plain
tensors: an elementwise optimizer needs no more, and neither do averages and checkpoints.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sfumato.models.files import Rows
from sfumato.models.networks.blocks import asked_alone, blocks_of
from sfumato.training.distributed.processes import Processes
from sfumato.training.precision import NARROW


@dataclass(frozen=True)
class ShardSlice:
    """The rows of a weight that this process holds; shape is the whole weight's.

    is_divided: false for what all processes hold whole.
    """

    shape: tuple[int, ...]
    rows: Rows
    is_divided: bool


class Shards:
    """What this process holds of a divided network's trained weights.

    Args:
        network: as `shard` left it; copies: how many processes hold the same rows (hybrid), else 1.
    """

    def __init__(self, network: nn.Module, processes: Processes, copies: int) -> None:
        self.network, self.processes, self.copies = network, processes, copies
        self.whole = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        self.held = {name: nn.Parameter(_local(weight)) for name, weight in self.whole.items()}
        self.slices = {
            name: ShardSlice(tuple(weight.shape), _rows(weight), hasattr(weight, "placements"))
            for name, weight in self.whole.items()
        }

    @property
    def copy(self) -> int:
        """Which copy this process holds rows of: 0, but for hybrid."""
        return self.processes.rank * self.copies // self.processes.count

    def slice_of(self, key: str) -> ShardSlice | None:
        """The rows here of the weight that a tensor belongs to: by its name, or "part/name/entry"."""
        return self.slices.get(key) or self.slices.get(key.partition("/")[2].rpartition("/")[0])

    def rows_of(self, key: str, tensor: Tensor) -> Rows | None:
        """Which rows a tensor held here is; None if it is whole."""
        piece = self.slice_of(key)
        if piece is None or not piece.is_divided or tensor.shape != (piece.rows.count, *piece.shape[1:]):
            return None
        return piece.rows

    def wanted(self, key: str, shape: Sequence[int]) -> Rows | None:
        """Which rows of a stored tensor belong here; None for all of it."""
        piece = self.slice_of(key)
        return piece.rows if piece is not None and piece.is_divided and tuple(shape) == piece.shape else None

    @property
    def gathering_modules(self) -> list[Any]:
        """The modules that gather their own weights."""
        return [module for module in self.network.modules() if hasattr(module, "set_reshard_after_forward")]

    def take_gradients(self) -> None:
        """Give the rows their gradients; those of weights that are not divided are summed here, at once."""
        kept = [weight.grad for weight in self.whole.values() if not hasattr(weight, "placements")]
        _sum_over_processes([gradient for gradient in kept if gradient is not None])
        for name, weight in self.whole.items():
            gradient = weight.grad
            self.held[name].grad = None if gradient is None else _local(gradient)
            weight.grad = None

    def square(self) -> Tensor:
        """This process's share of the squared norm of all gradients."""
        held = {name: row.grad for name, row in self.held.items() if row.grad is not None}
        if not held:
            return torch.zeros((), device=next(iter(self.held.values())).device)
        norms = torch._foreach_norm(list(held.values()))  # pyright: ignore[reportPrivateImportUsage]
        here = [
            norm.float()
            / (self.copies if hasattr(self.whole[name], "placements") else self.processes.count) ** 0.5
            for name, norm in zip(held, norms, strict=True)
        ]
        return torch.stack(here).square().sum()

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Within it every process has all weights as they are now, and computes without the others."""
        for module in self.gathering_modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in self.gathering_modules:
                module.reshard()
                module.set_reshard_after_forward(True, recurse=False)


_SHARDED: "WeakKeyDictionary[nn.Module, Shards]" = WeakKeyDictionary()


def shards_of(network: nn.Module) -> Shards | None:
    """How a network is divided; None if this process has all of it."""
    return _SHARDED.get(network)


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name, in order; of a divided network, the rows here."""
    if (shards := shards_of(network)) is not None:
        return shards.held
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


def shard(network: nn.Module, processes: Processes, precision: str, shard_size: int = 0) -> Shards:
    """Divide a network among the processes, block by block; all begin with the leading one's weights.

    Args:
        precision: "fp32", "bf16" or "fp16": what weights are gathered and computed in; sums are float32.
        shard_size: hybrid: so many processes share one copy of the network; 0: all of them.
    """
    # Importing it takes a while, which runs that need none of it should not wait for.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    processes.broadcast_weights(network)
    device = next(network.parameters()).device
    mesh, copies = _mesh(device.type, processes.count, shard_size)
    narrow = NARROW.get(precision)
    policy = MixedPrecisionPolicy(
        param_dtype=narrow, reduce_dtype=torch.float32 if narrow else None, cast_forward_inputs=False
    )
    undivided = set(_undivided(network))
    for block in dict.fromkeys([*asked_alone(network), *blocks_of(network), network]):
        if any(weight not in undivided for weight in block.parameters()):
            fully_shard(
                block, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=undivided
            )
    shards = Shards(network, processes, copies)
    for module in shards.gathering_modules:
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    _SHARDED[network] = shards
    return shards


def _undivided(network: nn.Module) -> Iterator[nn.Parameter]:
    """The weights every process holds whole, in float32: single numbers, and what autocast computes wide.

    Gathered in bf16 the scales of norms and small tables would be rounded, which autocast leaves as they are,
    and a norm of float32 samples refuses narrow scales on a CPU. They are a thousandth of a network.
    """
    for module in network.modules():
        is_narrow = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding))
        for weight in module.parameters(recurse=False):
            if weight.ndim == 0 or not is_narrow:
                yield weight


def _sum_over_processes(gradients: Sequence[Tensor]) -> None:
    """Replace each by the sum of what the processes have, in one message."""
    if not gradients:
        return
    message = torch.cat([gradient.float().flatten() for gradient in gradients])
    dist.all_reduce(message)
    parts = message.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def _mesh(kind: str, count: int, shard_size: int) -> tuple[Any, int]:
    """(the processes in rows that share a copy each, how many copies there are)."""
    from torch.distributed.device_mesh import init_device_mesh

    if not shard_size or shard_size == count:
        return init_device_mesh(kind, (count,)), 1
    copies = count // shard_size
    return init_device_mesh(kind, (copies, shard_size), mesh_dim_names=("copies", "shares")), copies


def _local(tensor: Tensor) -> Tensor:
    """The rows that this process holds, in the same memory."""
    detached = tensor.detach()
    return cast(Any, detached).to_local() if hasattr(detached, "placements") else detached


def _rows(weight: Tensor) -> Rows:
    """Which rows this process holds: what `torch.chunk` gives to its place in the last mesh dimension."""
    held = _local(weight)
    if not hasattr(weight, "placements"):
        return Rows(0, held.shape[0] if held.ndim else 0)
    mesh = cast(Any, weight).device_mesh
    place, many = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    each = -(-weight.shape[0] // many)
    return Rows(min(place * each, weight.shape[0]), held.shape[0])


class ShardedGradients:
    """The sum of the parts' gradients, each process's rows of it left in the held rows' `.grad`."""

    def __init__(self, shards: Shards) -> None:
        self.shards, self.weights = shards, list(shards.held.values())
        self.loss = torch.zeros((), device=self.weights[0].device)
        self.squared = self.loss

    def begin(self, is_last: bool) -> None:
        """Before each part: only the last one's backward pass talks to the other processes."""
        network = cast(Any, self.shards.network)
        network.set_requires_gradient_sync(is_last)
        network.set_is_last_backward(is_last)

    def add(self, loss: Tensor) -> None:
        """Take in one part after its backward pass; `loss` is its share of the batch's mean."""
        self.loss = self.loss + loss.float()

    def total(self, stop: bool) -> tuple[Tensor, Tensor]:
        """(the batch's mean loss, how many processes were asked to stop)."""
        self.shards.take_gradients()
        sums = torch.stack([self.loss, self.loss.new_tensor(float(stop)), self.shards.square()])
        dist.all_reduce(sums)
        self.loss = torch.zeros_like(self.loss)
        self.squared = sums[2]
        return sums[0], sums[1]

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of the whole gradient, of which this process holds rows."""
        return self.squared.sqrt()

    def clear(self) -> None:
        """Forget the gradients."""
        for weight in [*self.weights, *self.shards.whole.values()]:
            weight.grad = None
