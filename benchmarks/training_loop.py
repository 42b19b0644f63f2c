"""What a training step costs beside the loops people use: the same network, batch, dtype and cached inputs.

    OMP_NUM_THREADS=1 python benchmarks/training_loop.py [--only dit-small] [--steps 12] [--out FILE.json]

Rivals: (a) the loop of diffusers' training scripts (torch's default AdamW, clip_grad_norm_, EMAModel, a
learning-rate scheduler, loss.item() a step); (b) the loop of DiffSynth-Studio (batch 1, AdamW, no EMA, no
clipping). CPU seconds per sample (process time, so a busy machine matters little), the median of steps.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.record import RunFolder
from sfumato.stages.codec import PixelCodec
from sfumato.stages.interface import Condition, Model
from sfumato.stages.scratch import new_denoiser
from sfumato.stages.settings import ModelSettings
from sfumato.stages.text import NoConditioner
from sfumato.theory import get, noise
from sfumato.training.held import Held
from sfumato.training.loop import fit
from sfumato.training.objective import DiffusionObjective
from sfumato.training.settings import TrainSettings

SIDE, TEXT = 8, 384


class Latents(PixelCodec):
    """Sixteen channels, as the demo's codec makes them."""

    latent_channels = 16


class Samples:
    """Random encodings in memory."""

    def __init__(self, count: int = 256) -> None:
        self.ids = list(range(count))
        self.names = [str(i) for i in self.ids]
        self.latents = noise.normal((16, SIDE, SIDE), 0, self.ids)
        self.rows = [
            {"tokens": torch.randn(4 + i % 5, TEXT), "pooled": torch.randn(TEXT)} for i in range(count)
        ]
        self.null = {"tokens": torch.zeros(2, TEXT), "pooled": torch.zeros(TEXT)}

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, indices: list[int], seed: int, epoch: int) -> Any:
        batch = argparse.Namespace(ids=[self.ids[i] for i in indices], latents=self.latents[list(indices)])
        batch.conditions = [self.rows[i] for i in indices]
        return batch


class Order:
    """Batches one after the other."""

    def __init__(self, count: int, batch: int) -> None:
        self.count, self.batch = count, batch

    def at(self, step: int) -> tuple[list[int], int]:
        return [(step * self.batch + i) % self.count for i in range(self.batch)], 0


def timed(step: Callable[[int], None], steps: int) -> float:
    """CPU seconds of the median step, the first three left out."""
    taken = []
    for number in range(steps + 3):
        began = time.process_time()
        step(number)
        taken.append(time.process_time() - began)
    return statistics.median(taken[3:])


def ours(model: Model, samples: Samples, batch: int, steps: int) -> float:
    """The median step of `fit`."""
    settings = TrainSettings(steps=steps + 3, batch=batch, save_every=10**9, held_out_every=0, keep=1)
    objective = DiffusionObjective(model, samples, Order(len(samples), batch), settings, 0)
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run")
        note = lambda *_, **__: marks.append(time.process_time())  # noqa: E731
        fit(objective, model.denoiser, settings, run, progress=note, say=lambda _: None)
    return statistics.median(later - earlier for earlier, later in pairwise(marks[2:]))


def diffusers_like(network: nn.Module, samples: Samples, batch: int, steps: int) -> float:
    """The loop of examples/text_to_image/train_text_to_image.py, flow matching, inputs cached."""
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2)
    schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=100)
    average = EMAModel(network.parameters())
    order = Order(len(samples), batch)

    def step(number: int) -> None:
        data = samples.read(order.at(number)[0], 0, 0)
        x = torch.randn_like(data.latents)
        t = torch.rand(batch)
        noisy = (1 - t.view(-1, 1, 1, 1)) * data.latents + t.view(-1, 1, 1, 1) * x
        answer = network(noisy, 1000 * t, Condition.stack(data.conditions))
        loss = torch.nn.functional.mse_loss(answer.float(), (x - data.latents).float())
        loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(network.parameters())

    return timed(step, steps)


def bare(network: nn.Module, samples: Samples, batch: int, steps: int) -> float:
    """Forward, backward and our optimizer on one prepared batch: what cannot be left out."""
    settings = TrainSettings(steps=steps + 3, batch=batch)
    held = Held(network, settings)
    data = samples.read(list(range(batch)), 0, 0)
    clock, condition = torch.linspace(0, 1000, batch), Condition.stack(data.conditions)

    def step(number: int) -> None:
        error = (network(data.latents, clock, condition) - data.latents).square().mean()
        error.backward()
        norm = torch.nn.utils.get_total_norm(
            [weight.grad for weight in held.weights if weight.grad is not None]
        )
        if norm > 1:
            torch.nn.utils.clip_grads_with_norm_(held.weights, 1.0, norm)
        held.optimiser.step(number)
        held.update(number + 1)
        for weight in held.weights:
            weight.grad = None

    return timed(step, steps)


def diffsynth_like(network: nn.Module, samples: Samples, steps: int) -> float:
    """The loop of DiffSynth-Studio: one sample a step, AdamW, neither average nor clipping."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=1e-2)
    order = Order(len(samples), 1)

    def step(number: int) -> None:
        data = samples.read(order.at(number)[0], 0, 0)
        x = torch.randn_like(data.latents)
        t = torch.rand(1)
        noisy = (1 - t.view(-1, 1, 1, 1)) * data.latents + t.view(-1, 1, 1, 1) * x
        optimizer.zero_grad()
        answer = network(noisy, 1000 * t, Condition.stack(data.conditions))
        torch.nn.functional.mse_loss(answer.float(), (x - data.latents).float()).backward()
        optimizer.step()

    return timed(step, steps)


CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "dit-small": ({"denoiser": "dit", "width": 256, "depth": 8, "heads": 4}, [32, 8]),
    "dit-40M": ({"denoiser": "dit", "width": 512, "depth": 8, "heads": 8}, [8, 2]),
    "unet-60M": ({"denoiser": "unet", "width": 192, "depth": 2, "heads": 8}, [8, 2]),
}


def compare(name: str, steps: int) -> list[dict[str, Any]]:
    """One row for each batch size of a case."""
    words, batches = CASES[name]
    theory = get("flow-matching")
    samples = Samples()
    rows = []

    def fresh() -> Model:
        network = new_denoiser(ModelSettings(**words), theory, Latents(), (TEXT, TEXT))
        return Model(theory, Latents(), NoConditioner(), network)

    single = diffsynth_like(fresh().denoiser, samples, steps)
    for batch in batches:
        mine = ours(fresh(), samples, batch, steps) / batch
        least = bare(fresh().denoiser, samples, batch, steps) / batch
        theirs = diffusers_like(fresh().denoiser, samples, batch, steps) / batch
        parameters = sum(weight.numel() for weight in fresh().denoiser.parameters())
        row = {"case": name, "parameters": parameters, "batch": batch}
        row |= {"ours": mine, "diffusers": theirs, "diffsynth": single}
        row |= {
            "overhead": mine / least - 1,
            "ratio_diffusers": theirs / mine,
            "ratio_diffsynth": single / mine,
        }
        print(
            json.dumps({key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()}),
            flush=True,
        )
        rows.append(row)
    return rows


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", default="")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in CASES if asked.only in name for row in compare(name, asked.steps)]
    if asked.out:
        Path(asked.out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
