"""What a training step costs beside the loops people use: the same network, batch, dtype and cached inputs.

    OMP_NUM_THREADS=1 python benchmarks/training_loop.py [--only dit-40M] [--batch 8] [--steps 16] [--compile]
                                                         [--out FILE.json]

Rivals: (a) the loop of diffusers' training scripts (torch's default AdamW, clip_grad_norm_, EMAModel, a
learning-rate scheduler, loss.item() a step), with the inputs cached as ours are, and as the scripts ship:
SD's autoencoder and CLIP-L (random weights) asked in every step; (b) the loop of DiffSynth-Studio (batch 1,
AdamW, no EMA, no clipping). CPU seconds per sample, the mean of `steps` steps after four, the best of three
turns. Ours is measured as after its first 2,048 steps, when its averages take every eighth step in.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.models.build import new_denoiser
from sfumato.models.codecs.image import PixelCodec
from sfumato.models.condition import Condition
from sfumato.models.interface import Model
from sfumato.models.networks.blocks import compile_blocks
from sfumato.models.settings import ModelSettings
from sfumato.models.text.encoder import NoConditioner
from sfumato.run_folder import RunFolder
from sfumato.theory import get, noise
from sfumato.training import device
from sfumato.training.loop.loop import fit
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.training.optim import ema
from sfumato.training.settings import TrainSettings
from sfumato.training.state.train_state import TrainState

SIDE, TEXT = 8, 384


class Latents(PixelCodec):
    """Sixteen channels, as the demo's codec makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_channels = 16


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


WARM = 4
TURNS = 3
"""The loops take turns, and the best turn of each counts: other programs on the machine slow some of them."""


def timed(step: Callable[[int], None], steps: int) -> float:
    """CPU seconds of a step, the mean of `steps` after the first four."""
    for number in range(WARM):
        step(number)
    began = time.process_time()
    for number in range(steps):
        step(WARM + number)
    return (time.process_time() - began) / steps


def ours(model: Model, samples: Samples, batch: int, steps: int) -> float:
    """A step of `fit`: CPU seconds, the mean after the first four."""
    return sum(seconds(model, samples, batch, steps + WARM)[WARM:]) / steps


def seconds(model: Model, samples: Any, batch: int, steps: int, **known: Any) -> list[float]:
    """CPU seconds of each step of `fit`, without its last, which draws and saves."""
    settings = TrainSettings(
        steps=steps + 1, batch=batch, save_every=10**9, validate_every=0, keep_checkpoints=1, **known
    )
    objective = DiffusionObjective(model, samples, Order(len(samples), batch), settings, 0)
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run")
        note = lambda *_, **__: marks.append(time.process_time())  # noqa: E731
        began = time.process_time()
        fit(objective, model.denoiser, settings, run, progress=note, say=lambda _: None)
    return [end - start for start, end in pairwise([began, *marks[:steps]])]


class Encoders:
    """SD's autoencoder and CLIP-L's text model with random weights, asked as the scripts ask them."""

    def __init__(self) -> None:
        from diffusers import AutoencoderKL
        from transformers import CLIPTextConfig, CLIPTextModel

        blocks = ("Encoder",) * 4, ("Decoder",) * 4
        self.vae = AutoencoderKL(
            down_block_types=tuple(f"Down{kind}Block2D" for kind in blocks[0]),
            up_block_types=tuple(f"Up{kind}Block2D" for kind in blocks[1]),
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        ).eval()
        config = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
        self.text = CLIPTextModel(config).eval()

    @torch.no_grad()
    def __call__(self, batch: int, side: int = 8 * SIDE) -> None:
        """Encode pictures, by default eight times the latents' side, and captions of 77 tokens."""
        self.vae.encode(torch.rand(batch, 3, side, side)).latent_dist.sample()
        self.text(torch.randint(0, 49_000, (batch, 77)))


def diffusers_like(
    network: nn.Module, samples: Samples, batch: int, steps: int, encode: Callable[[int], None] | None = None
) -> float:
    """The loop of examples/text_to_image/train_text_to_image.py, flow matching; with `encode`, uncached."""
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2)
    schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=100)
    mean = EMAModel(network.parameters())
    order = Order(len(samples), batch)

    def step(number: int) -> None:
        if encode is not None:
            encode(batch)
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
        mean.step(network.parameters())

    return timed(step, steps)


def bare(network: nn.Module, samples: Samples, batch: int, steps: int) -> float:
    """Forward, backward and our optimizer on one prepared batch: what cannot be left out."""
    settings = TrainSettings(steps=steps + 3, batch=batch)
    held = TrainState(network, settings)
    data = samples.read(list(range(batch)), 0, 0)
    clock, condition = torch.linspace(0, 1000, batch), Condition.stack(data.conditions)

    def step(number: int) -> None:
        error = (network(data.latents, clock, condition) - data.latents).square().mean()
        error.backward()
        norm = torch.nn.utils.get_total_norm(
            [weight.grad for weight in held.weights if weight.grad is not None]
        )
        held.optimizer.step(number, None, norm.clamp(min=1.0))
        for weight in held.weights:
            weight.grad = None

    with device.keep_freed_memory(torch.device("cpu")):
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
    "dit-40M": ({"denoiser": "dit", "width": 448, "depth": 6, "heads": 7}, [8, 2]),
    "unet-60M": ({"denoiser": "unet", "width": 240, "depth": 2, "heads": 6}, [8, 2]),
}


def compare(name: str, steps: int, batches: list[int], compiled: bool) -> Iterator[dict[str, Any]]:
    """One row for each batch size of a case."""
    words = CASES[name][0]
    theory = get("flow-matching")
    samples, encoders = Samples(), Encoders()

    def fresh(compiled: bool = False) -> Model:
        network = new_denoiser(ModelSettings(**words), theory, Latents(), (TEXT, TEXT))
        if compiled:
            compile_blocks(network, torch.device("cpu"))
        return Model(theory, Latents(), NoConditioner(), network)

    single = diffsynth_like(fresh().denoiser, samples, steps)
    for batch in batches:
        turns = [
            (
                ours(fresh(), samples, batch, steps),
                bare(fresh().denoiser, samples, batch, steps),
                diffusers_like(fresh().denoiser, samples, batch, steps),
            )
            for _ in range(TURNS)
        ]
        mine, least, theirs = (min(taken) / batch for taken in zip(*turns, strict=True))
        parameters = sum(weight.numel() for weight in fresh().denoiser.parameters())
        row = {"case": name, "parameters": parameters, "batch": batch}
        shipped = diffusers_like(fresh().denoiser, samples, batch, max(2, steps // 4), encoders) / batch
        row |= {"ours": mine, "bare": least, "diffusers": theirs, "shipped": shipped, "diffsynth": single}
        row |= {"outside": (mine - least) / mine}
        row |= {f"ratio_{name}": row[name] / mine for name in ("diffusers", "shipped", "diffsynth")}
        if compiled:
            row["compiled"] = ours(fresh(True), samples, batch, steps) / batch
            row["ratio_compiled"] = theirs / row["compiled"]
        yield {key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()}


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", default="")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ema.stride = lambda *_: ema.STRIDE
    rows = []
    for name in CASES:
        if asked.only in name:
            batches = [asked.batch] if asked.batch else CASES[name][1]
            for row in compare(name, asked.steps, batches, asked.compile):
                print(json.dumps(row), flush=True)
                rows.append(row)
    if asked.out:
        Path(asked.out).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
