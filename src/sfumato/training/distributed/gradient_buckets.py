"""Gradients that are sent while the rest of them is still computed.

Weights stand in buckets in the order in which a backward pass reaches them, the last ones first. A bucket is
sent as soon as its gradients are there, behind the one before it, so that all processes send the same
buckets in the same order.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sfumato.training.distributed.processes import Gradients, Processes

NUMBERS_OF_A_BUCKET = 25_000_000
"""100 MB in float32: large enough for the network's full speed, small enough to begin early."""


def gradients_of(weights: Sequence[nn.Parameter], processes: Processes, exact: bool) -> Gradients:
    """What adds the gradients of a step's parts and of all processes, each of which has the whole network."""
    if processes.count > 1 and not exact:
        return BucketedGradients(weights, processes)
    return Gradients(weights, processes, exact)


class BucketedGradients(Gradients):
    """The sum of the parts' gradients over the processes, most of it sent beside the last backward pass."""

    def __init__(self, weights: Sequence[nn.Parameter], processes: Processes) -> None:
        super().__init__(weights, processes, exact=False)
        self.buckets = [list(bucket) for bucket in _buckets(self.weights)]
        self._bucket_of = {id(one): number for number, bucket in enumerate(self.buckets) for one in bucket}
        self._missing: list[int] = []
        self._sent: list[tuple[Tensor, dist.Work | None]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def begin(self, is_last: bool) -> None:
        """Before each part: in the last one's backward pass gradients are sent as they come."""
        self._remove_hooks()
        if is_last:
            self._missing = [len(bucket) for bucket in self.buckets]
            self._hooks = [one.register_post_accumulate_grad_hook(self._arrived) for one in self.weights]

    def total(self, stop: bool) -> tuple[Tensor, Tensor]:
        """(the batch's mean loss, how many processes were asked to stop), when all gradients are summed."""
        self._remove_hooks()
        while len(self._sent) < len(self.buckets):  # those with a weight that the loss does not hear of
            self._send()
        sums = torch.stack([self.loss, self.loss.new_full((), float(stop))])
        dist.all_reduce(sums)
        for bucket, (packed, work) in zip(self.buckets, self._sent, strict=True):
            if work is not None:
                work.wait()
            for weight, part in zip(bucket, packed.split([one.numel() for one in bucket]), strict=True):
                weight.grad = part.view_as(weight).to(weight.dtype)
        self._sent, self.loss = [], torch.zeros_like(self.loss)
        return sums[0], sums[1]

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _arrived(self, weight: Tensor) -> None:
        self._missing[self._bucket_of[id(weight)]] -= 1
        while len(self._sent) < len(self.buckets) and not self._missing[len(self._sent)]:
            self._send()

    def _send(self) -> None:
        """Send the next bucket: its gradients as one float32 vector, 0 where there is none."""
        packed = torch.cat(
            [
                torch.zeros(one.numel(), device=one.device)
                if one.grad is None
                else one.grad.detach().flatten().float()
                for one in self.buckets[len(self._sent)]
            ]
        )
        self._sent.append((packed, dist.all_reduce(packed, async_op=True)))


def _buckets(weights: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for weight in reversed(weights):
        if bucket and sum(one.numel() for one in bucket) + weight.numel() > NUMBERS_OF_A_BUCKET:
            yield bucket
            bucket = []
        bucket.append(weight)
    yield bucket
