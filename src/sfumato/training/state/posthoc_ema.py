"""Averages of any length, chosen after training.

A power-function average over t steps weighs step τ by τ^γ,

    w̄_t = β_t·w̄_{t−1} + (1 − β_t)·w_t,   β_t = (1 − 1/t)^(γ + 1),

and forgets its random start of itself. Its relative length σ = √(γ+1)/((γ+2)·√(γ+3)) is a share of the
run. Two of them, written down now and then, span a space in which any other length is found by least
squares: Karras et al. 2024, arXiv:2312.02696, section 3 and algorithm 3.

They lie beside the weights where those are on the CPU or are few, as an adapter's are. Of a large network on
a GPU they lie in the host's memory: every eighth step the weights are copied into pinned memory, for which no
step waits, and a thread takes them in.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import Failed, Refused
from sfumato.models import files
from sfumato.run_folder import RunFolder, remove_partial_files
from sfumato.training.distributed.sharding import shards_of, trained_parameters
from sfumato.training.optim.ema import LONGEST_INTERVAL, last_update_step
from sfumato.training.state import checkpoint, sharded_checkpoint

LENGTHS = (0.05, 0.10)
LONGEST = 0.25
MOST_SNAPSHOTS = 10
DEVICE_SHARE = 1 / 16
"""Of a GPU's memory, what the averages may take; larger ones lie in the host's."""
_FOLDER = re.compile(r"step-(\d+)")


def exponent(length: float) -> float:
    """γ of the power function whose relative length is `length`.

    Raises:
        Refused: no power-function average has that length.
    """
    if not 0 < length < LONGEST:
        raise Refused(
            f"An average's length is a share of the run above 0 and below {LONGEST}, not {length:g}."
        )
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if relative_length(middle) > length else (low, middle)
    return low


def relative_length(gamma: float) -> float:
    """σ of the profile τ^γ on [0, 1]: its standard deviation, as a share of the run."""
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


def is_kept_on(device: torch.device, numbers: int) -> bool:
    """Whether the averages of so many trained numbers on this device lie on it too."""
    if device.type != "cuda":
        return device.type == "cpu"
    total = torch.cuda.get_device_properties(device).total_memory
    return 4 * len(LENGTHS) * numbers <= DEVICE_SHARE * total


class PosthocEMA:
    """Power-function averages of a network's weights, one for each of `lengths`."""

    def __init__(self, network: nn.Module, lengths: Sequence[float] = LENGTHS) -> None:
        self._named, self._shards = trained_parameters(network), shards_of(network)
        self.lengths = tuple(lengths)
        self._gammas = [exponent(length) for length in lengths]
        weights = list(self._named.values())
        device = weights[0].device if weights else torch.device("cpu")
        here = self._shards is None and is_kept_on(device, sum(weight.numel() for weight in weights))
        self._place = device if here else torch.device("cpu")
        self._buffers: list[Tensor] | None = None
        """Pinned memory, where a GPU's weights are copied to without being waited for."""
        now = self._now()
        self._means = [[weight.clone() for weight in now] for _ in lengths]
        if device.type == "cuda" and not here and self._shards is None:
            self._buffers = [weight.pin_memory() for weight in now]
        self._interval = 1 if self._buffers is None else LONGEST_INTERVAL
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="averages")
        self._pending: Future[None] | None = None

    def _now(self) -> list[Tensor]:
        return [weight.detach().to(self._place, torch.float32) for weight in self._named.values()]

    def _last_update(self, step: int) -> int:
        """The last step at or before `step` at which the weights are taken in."""
        last = last_update_step(step)
        return last - last % self._interval

    def update(self, step: int) -> None:
        """Take in the weights after `step` updates (1, 2, …), if it is one of the steps that count."""
        if self._last_update(step) != step:
            return
        if self._buffers is None:
            self._take_in(self._means, step, self._now())
            return
        self._finish()
        for buffer, weight in zip(self._buffers, self._named.values(), strict=True):
            buffer.copy_(weight.detach(), non_blocking=True)
        copied = torch.cuda.current_stream(next(iter(self._named.values())).device).record_event()
        self._pending = self._thread.submit(self._take_in_copied, copied, self._buffers, step)

    def _take_in_copied(self, copied: Any, now: list[Tensor], step: int) -> None:
        copied.synchronize()
        self._take_in(self._means, step, now)

    def _finish(self) -> None:
        """Wait for what is being taken in."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    @torch.no_grad()
    def _take_in(self, means: list[list[Tensor]], step: int, now: list[Tensor]) -> None:
        before = self._last_update(step - 1)
        for gamma, mean in zip(self._gammas, means, strict=True):
            share = 1 - (before / step) ** (gamma + 1)
            torch._foreach_lerp_(mean, now, share)  # pyright: ignore[reportPrivateImportUsage]

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """Each average as a group of a checkpoint."""
        self._finish()
        return {
            f"power-{length:.3f}": dict(zip(self._named, means, strict=True))
            for length, means in zip(self.lengths, self._means, strict=True)
        }

    @torch.no_grad()
    def load(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from `groups`, as `groups()` gave them."""
        self._finish()
        for length, means in zip(self.lengths, self._means, strict=True):
            for name, mean in zip(self._named, means, strict=True):
                mean.copy_(groups[f"power-{length:.3f}"][name])

    def write(self, run: RunFolder, step: int, every: int = 0) -> None:
        """Write the averages after `step` updates down for later, in half precision.

        Args:
            every: steps between two snapshots; of many, those of every second interval are let go.
        """
        self._finish()
        means = [[mean.to("cpu", copy=True) for mean in kept] for kept in self._means]
        if self._last_update(step) != step:
            now = [weight.detach().to("cpu", torch.float32) for weight in self._named.values()]
            self._take_in(means, step, now)
        groups = {
            f"power-{length:.3f}": {
                name: mean.half() if not mean.numel() or mean.abs().max() < 6e4 else mean
                for name, mean in zip(self._named, kept, strict=True)
            }
            for length, kept in zip(self.lengths, means, strict=True)
        }
        folder = run.path / "averages" / f"step-{step:06d}"
        if self._shards is None:
            remove_partial_files(folder.parent)
            checkpoint.write(folder, groups, {"step": step})
        else:
            sharded_checkpoint.begin(folder, groups, self._shards.processes)
            part = sharded_checkpoint.local_shards(self._shards, groups)
            sharded_checkpoint.write(folder, *part, {"step": step}, self._shards.processes)
        if every and (self._shards is None or self._shards.processes.is_rank_zero):
            _thin(run, step, every)


def _thin(run: RunFolder, newest: int, every: int) -> None:
    """Keep at most ten snapshots, evenly spread, and the newest."""
    steps = sorted({one.step for one in snapshots(run)})
    while newest // every > MOST_SNAPSHOTS:
        every *= 2
    for step in steps:
        if step % every and step != newest:
            folder = run.path / "averages" / f"step-{step:06d}"
            folder.rename(gone := folder.with_name(f".{folder.name}.gone.part"))
            shutil.rmtree(gone, ignore_errors=True)


@dataclass(frozen=True)
class EMASnapshot:
    """One average that was written down."""

    step: int
    length: float
    folder: Path

    @property
    def group(self) -> str:
        """Its name in the folder."""
        return f"power-{self.length:.3f}"


def snapshots(run: RunFolder) -> list[EMASnapshot]:
    """All averages of the run, oldest first."""
    found = []
    for folder in sorted((run.path / "averages").glob("step-*")):
        if match := _FOLDER.fullmatch(folder.name):
            files = folder.glob("power-*.safetensors")
            lengths = {float(file.name.split(".safe")[0].split("-")[1]) for file in files}
            found += [EMASnapshot(int(match[1]), length, folder) for length in sorted(lengths)]
    return found


def inner_product(step: Tensor, gamma: Tensor, other_step: Tensor, other_gamma: Tensor) -> Tensor:
    """⟨p, p'⟩ of two profiles τ^γ, each ending at its step and of unit sum."""
    ratio = step / other_step
    power = torch.where(step < other_step, other_gamma, -gamma)
    longest = torch.maximum(step, other_step)
    return (gamma + 1) * (other_gamma + 1) * ratio**power / ((gamma + other_gamma + 1) * longest)


def snapshot_weights(taken: Sequence[EMASnapshot], step: int, length: float) -> tuple[Tensor, float]:
    """The weights [n] of the snapshots whose sum is nearest to the average of `length` at `step`.

    Returns:
        the weights in float64, and the part of the wanted profile's norm that they miss, in [0, 1].
    """
    steps = torch.tensor([float(one.step) for one in taken], dtype=torch.float64)
    gammas = torch.tensor([exponent(one.length) for one in taken], dtype=torch.float64)
    wanted = (
        torch.tensor(float(step), dtype=torch.float64),
        torch.tensor(exponent(length), dtype=torch.float64),
    )
    gram = inner_product(steps[:, None], gammas[:, None], steps, gammas)
    right = inner_product(steps, gammas, *wanted)
    weights = torch.linalg.lstsq(gram, right[:, None], driver="gelsd").solution[:, 0]
    own = inner_product(*wanted, *wanted)
    missed = (own - 2 * weights @ right + weights @ gram @ weights).clamp(min=0)
    return weights, float((missed / own).sqrt())


def reconstruct(run: RunFolder, length: float, step: int | None = None) -> tuple[dict[str, Tensor], float]:
    """The weights averaged over `length` of the run up to `step` (default: the last snapshot's).

    Returns:
        {name: float32 tensor}, and the relative error of the averaging profile, in [0, 1].
    Raises:
        Refused: the run wrote no averages, or no such length. Failed: one of them is damaged.
    """
    taken = [one for one in snapshots(run) if step is None or one.step <= step]
    if not taken:
        raise Refused(
            f"{run.path} has no averages to reconstruct from. Train with train.ema_snapshot_every = 500, "
            "say, to write them every 500 steps."
        )
    for folder in {one.folder for one in taken}:
        if reason := checkpoint.find_damage(folder):
            raise Failed(f"{reason}. Remove {folder} to reconstruct from the other averages.")
    weights, missed = snapshot_weights(taken, step or taken[-1].step, length)
    total: dict[str, Tensor] = {}
    for share, one in zip(weights.tolist(), taken, strict=True):
        for name, tensor in files.read(one.folder, one.group).items():
            total[name] = total.get(name, torch.zeros(tensor.shape)) + share * tensor.float()
    return total, missed
