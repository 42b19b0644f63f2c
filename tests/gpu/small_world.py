"""A few samples in memory, and training on them as the loop does it, step by step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.models.interface import Denoiser, Model
from sfumato.models.networks.dit import DiT
from sfumato.models.networks.unet import UNet
from sfumato.run_folder import RunFolder
from sfumato.theory import get, noise
from sfumato.training.loop.loop import _Loop
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.training.objective.packed_batches import PackedObjective
from sfumato.training.settings import TrainSettings

SHAPE = (4, 8, 8)
SETTINGS = {
    "steps": 40,
    "batch": 4,
    "warmup_steps": 2,
    "learning_rate": 1e-3,
    "log_every": 20,
    "save_every": 20,
}


@dataclass
class Batch:
    ids: list[int]
    latents: Any
    conditions: list[dict[str, Tensor]]
    captions: list[str]


class Encoded:
    """Samples as the store gives them: on the host, their captions of different lengths."""

    def __init__(self, shape: tuple[int, ...] = SHAPE, lengths: tuple[int, ...] = (1, 2, 3)) -> None:
        self.ids = list(range(8))
        self.names = [f"{i}.png" for i in self.ids]
        self.latents = noise.normal(shape, 1, self.ids, purpose="latents")
        self.tokens = noise.normal((max(lengths), 16), 1, self.ids, purpose="tokens")
        self.lengths = lengths
        self.null = {"tokens": torch.zeros(lengths[0], 16), "pooled": torch.zeros(16)}

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, indices: Any, seed: int, epoch: int) -> Batch:
        rows = [
            {"tokens": self.tokens[i, : self.lengths[i % len(self.lengths)]], "pooled": self.tokens[i, 0]}
            for i in indices
        ]
        return Batch([self.ids[i] for i in indices], self.latents[list(indices)], rows, [""] * len(rows))


class Order:
    """Four samples a step."""

    def at(self, step: int) -> tuple[list[int], int]:
        first = 4 * step % 8
        return list(range(first, first + 4)), step // 2


def dit(**known: Any) -> DiT:
    """Our transformer, whose gates have left zero."""
    torch.manual_seed(0)
    words = {
        "width": 32,
        "depth": 2,
        "heads": 2,
        "patch": 2,
        "text_width": 16,
        "pooled_width": 16,
        "canvas": 2,
    }
    return stirred(DiT(SHAPE[0], **{**words, **known}))


def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(SHAPE[0], width=32, depth=2, heads=4, text_width=16, pooled_width=16)


def stirred(network: Any) -> Any:
    """No weight is zero, so that every part of it has a gradient."""
    with torch.no_grad():
        for index, weight in enumerate(network.parameters()):
            weight += 0.02 * noise.normal(tuple(weight.shape), 9, [index])[0]
    return network


def objective_of(
    denoiser: Denoiser, settings: TrainSettings, theory: str = "flow-matching", encoded: Any = None
) -> DiffusionObjective:
    """The loss of four samples a step."""
    model = Model(get(theory), nn.Identity(), nn.Identity(), denoiser)  # pyright: ignore[reportArgumentType]
    kind = PackedObjective if settings.sequence_packing else DiffusionObjective
    return kind(model, encoded or Encoded(), Order(), settings, 0)


class Training:
    """The loop on a device, one step at a time.

    Args:
        folder: for the run. objective: of settings; network: on the device.
    """

    def __init__(self, folder: Path, objective: Any, network: nn.Module, settings: TrainSettings) -> None:
        self.network = network
        self.loop = _Loop(objective, network, settings, RunFolder.create(folder), 0, lambda sentence: None)
        network.train()

    def steps(self, count: int) -> "Training":
        for _ in range(count):
            self.loop.advance()
        return self


def training(
    folder: Path,
    denoiser: Denoiser,
    device: str = "cuda",
    theory: str = "flow-matching",
    encoded: Any = None,
    **changes: Any,
) -> Training:
    """Training of our own networks."""
    torch.manual_seed(0)
    settings = TrainSettings(**{**SETTINGS, **changes})
    denoiser.to(device)
    return Training(folder, objective_of(denoiser, settings, theory, encoded), denoiser, settings)
