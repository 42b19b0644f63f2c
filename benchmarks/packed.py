"""Packed against bucketed batches on a folder of pictures of many shapes: cut, waiting, cost.

    OMP_NUM_THREADS=1 python benchmarks/packed.py FOLDER [--resolution 64] [--batch 16] [--out FILE]

Shapes are those that `data.buckets` chooses for the folder; latents of those shapes and captions of 3 to
14 words are random. A step is losses, backward pass and fused AdamW on a DiT of 192 channels, 6 blocks; the
ways take turns, CPU seconds, the best of the turns. "Apart" computes the samples of the same mixed batches
shape by shape, as one would without packing.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sfumato.data import buckets
from sfumato.data.encoding.batch_sampler import BatchSampler, PackedSampler
from sfumato.data.sources import folder
from sfumato.models.interface import Model
from sfumato.models.networks.dit import DiT
from sfumato.theory import get, noise
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.training.objective.packed_batches import PackedObjective, indices_by_shape
from sfumato.training.settings import TrainSettings
from sfumato.workflow.dataset import known_sizes

STRIDE, CHANNELS, TEXT = 8, 16, 384


class Samples:
    """Random encodings of these shapes."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        self.buckets, self.ids = shapes, list(range(len(shapes)))
        self.names = [str(one) for one in self.ids]
        self.rows = [{"tokens": torch.randn(3 + i % 12, TEXT), "pooled": torch.randn(TEXT)} for i in self.ids]
        self.null = {"tokens": torch.zeros(2, TEXT), "pooled": torch.zeros(TEXT)}

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, indices: list[int], seed: int, epoch: int) -> Any:
        latents = noise.normal(self.buckets[indices[0]], 0, indices)
        return SimpleNamespace(ids=list(indices), latents=latents, conditions=[self.rows[i] for i in indices])


def shapes_of(sizes: list[tuple[int, int]], resolution: int, count: int) -> tuple[list, float]:
    """(the latents' shape of each picture, the mean share cut off) with so many buckets."""
    chosen = buckets.choose(sizes, resolution, STRIDE, count)
    pixels = [chosen(size) for size in sizes]
    return [(CHANNELS, height // STRIDE, width // STRIDE) for width, height in pixels], chosen.waste(sizes)


def waiting(order: BatchSampler, count: int) -> float:
    """Share of the samples that the first epoch does not show."""
    shown = {index for step in range(order.steps_before(1)) for index in order.at(step)[0]}
    return 1 - len(shown) / count


def made(
    kind: type[DiffusionObjective], samples: Samples, order: BatchSampler, batch: int
) -> DiffusionObjective:
    """An objective on a fresh DiT."""
    torch.manual_seed(0)
    dit = DiT(CHANNELS, width=192, depth=6, heads=4, text_width=TEXT)
    model = Model(get("flow-matching"), nn.Identity(), nn.Identity(), dit)
    return kind(model, samples, order, TrainSettings(batch=batch), 0)


def stepper(objective: DiffusionObjective, apart: bool = False) -> Callable[[int], int]:
    """step(number) → samples it took."""
    dit = objective.model.denoiser
    optimizer = torch.optim.AdamW(dit.parameters(), 1e-4, fused=True)

    def together(step: int) -> int:
        losses = objective.losses(step, 0, 1)
        (losses.per_sample.sum() / losses.of).backward()
        return losses.of

    def one_by_one(step: int) -> int:
        indices, epoch = objective.order.at(step)
        told = objective.draw_times(indices, step)
        for places in indices_by_shape(indices, objective.encoded.buckets):
            batch = objective.encoded.read([indices[place] for place in places], 0, epoch)
            drawn = objective.draw_noise(told.rows(places), batch.ids, batch.latents, step)
            loss = objective.measure(batch.latents, drawn, objective.rows(batch))
            (loss.sum() / len(indices)).backward()
        return len(indices)

    def step(number: int) -> int:
        taken = (one_by_one if apart else together)(number)
        optimizer.step()
        optimizer.zero_grad()
        return taken

    return step


def timed(ways: dict[str, Callable[[int], int]], steps: int, turns: int) -> dict[str, float]:
    """Samples a CPU second, the best turn of each."""
    best = dict.fromkeys(ways, 0.0)
    for step in ways.values():
        step(0)
    for turn in range(turns):
        for name, step in ways.items():
            began = time.process_time()
            taken = sum(step(1 + turn * steps + number) for number in range(steps))
            best[name] = max(best[name], taken / (time.process_time() - began))
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    for name, usual in (("resolution", 64), ("batch", 16), ("steps", 6), ("turns", 2)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--out", type=Path, help="a line of JSON is appended")
    said = parser.parse_args()
    torch.set_num_threads(1)
    sizes = known_sizes(folder.open_collection(said.folder).samples)
    found: dict[str, Any] = {"folder": Path(said.folder).name, "pictures": len(sizes), **vars(said)}
    ways: dict[str, Callable[[int], int]] = {}
    for count in (1, 5, 64):
        shapes, cut = shapes_of(sizes, said.resolution, count)
        samples, kinds = Samples(shapes), len(set(shapes))
        tokens = [shape[1] * shape[2] for shape in shapes]
        like, mixed = BatchSampler(shapes, said.batch), BatchSampler([0] * len(shapes), said.batch)
        budget = PackedSampler(tokens, said.batch)
        waits = {"bucketed": like, "packed": mixed, "packed by tokens": budget}
        found[f"{count} buckets"] = {
            "shapes": kinds, "cut off": round(cut, 4),
            "not shown in the first epoch": {k: round(waiting(o, len(sizes)), 4) for k, o in waits.items()},
        }  # fmt: skip
        ways[f"bucketed, {kinds} shapes"] = stepper(made(DiffusionObjective, samples, like, said.batch))
        if count > 1:
            ways[f"packed, {kinds} shapes"] = stepper(made(PackedObjective, samples, mixed, said.batch))
            apart = made(DiffusionObjective, samples, mixed, said.batch)
            ways[f"apart, {kinds} shapes"] = stepper(apart, apart=True)
    speeds = timed(ways, said.steps, said.turns)
    found["samples a CPU second"] = {name: round(speed, 2) for name, speed in speeds.items()}
    del found["out"]
    print(json.dumps(found | {"folder": Path(said.folder).name}, indent=1, ensure_ascii=False))
    if said.out:
        with said.out.open("a") as file:
            file.write(json.dumps(found | {"folder": Path(said.folder).name}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
