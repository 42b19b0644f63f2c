"""A world small enough for laws: twelve latents, a denoiser of two layers, a run in a temporary folder.

Run as a script it trains in its own process, so that it can be killed: FOLDER STEPS [key=value ...].
"""

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.models.condition import Condition
from sfumato.models.interface import Denoiser, Model
from sfumato.run_folder import RunFolder
from sfumato.theory import get, noise
from sfumato.training.distributed.processes import current_processes, join_processes
from sfumato.training.loop import loop as training_loop
from sfumato.training.loop import periodic_tasks
from sfumato.training.loop.validation import ValidationLoss
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.training.settings import TrainSettings

SHAPE = (2, 4, 4)
SETTINGS = {
    "steps": 12,
    "batch": 6,
    "warmup_steps": 3,
    "learning_rate": 1e-2,
    "save_every": 5,
    "log_every": 2,
}
SETTINGS |= {"validate_every": 6, "ema": 0.9, "max_grad_norm": 0.5}


@dataclass
class Batch:
    ids: list[int]
    latents: Tensor
    conditions: list[dict[str, Tensor]]
    captions: list[str]


class Encoded:
    """Samples in memory, read as the store's are."""

    def __init__(self, count: int = 12, first: int = 0) -> None:
        self.ids = [1000 + first + i for i in range(count)]
        self.names = [f"cat_{first + i:03d}.png" for i in range(count)]
        self.latents = noise.normal(SHAPE, 5, self.ids, purpose="latents")
        self.tokens = noise.normal((3, 8), 5, self.ids, purpose="tokens")
        self.null = {"tokens": torch.zeros(1, 8)}

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, indices: list[int], seed: int, epoch: int) -> Batch:
        rows = [{"tokens": self.tokens[i, : 1 + i % 3]} for i in indices]
        return Batch([self.ids[i] for i in indices], self.latents[list(indices)], rows, [""] * len(rows))


@dataclass
class Order:
    count: int = 12
    batch: int = 6
    seed: int = 0

    def at(self, step: int) -> tuple[list[int], int]:
        each = self.count // self.batch
        shuffled = noise.permutation(self.count, self.seed, "order", step // each).tolist()
        return shuffled[step % each * self.batch :][: self.batch], step // each


class Network(Denoiser):
    """Sees x, the clock and the mean token; draws from torch's generator through dropout."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        size = SHAPE[0] * SHAPE[1] * SHAPE[2]
        self.first = nn.Linear(size + 1 + 8, width)
        self.dropout = nn.Dropout(0.1)
        self.second = nn.Linear(width, size)
        self.register_buffer("scale", torch.tensor(0.5))

    def config(self) -> dict[str, object]:
        return {}

    def forward(self, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        mask = condition["mask"][..., None]
        told = (condition["tokens"] * mask).sum(1) / mask.sum(1)
        hidden = self.first(torch.cat([x.flatten(1), clock[:, None] / 1000, told], 1))
        return self.second(self.dropout(torch.tanh(hidden))).view_as(x) * self.scale


def make(
    theory: str = "flow-matching", **changes: object
) -> tuple[DiffusionObjective, nn.Module, TrainSettings]:
    """(objective, network, settings) of a fresh run."""
    settings = TrainSettings(**{**SETTINGS, **changes})
    torch.manual_seed(0)
    network = Network()
    model = Model(get(theory), nn.Identity(), nn.Identity(), network)
    order = Order(batch=settings.batch)
    return (
        DiffusionObjective(model, Encoded(), order, settings, seed=3, caption_dropout=0.3),
        network,
        settings,
    )


def train(
    folder: Path | str, preview: periodic_tasks.Preview | None = None, pause: float = 0.0, **changes: object
) -> training_loop.Outcome:
    """Train in `folder` until settings.steps; `pause` seconds a step make it easier to hit with a signal."""
    objective, network, settings = make(**changes)
    with current_processes().first():
        run = RunFolder.create(folder)
    measure = ValidationLoss(objective, Encoded(4, first=50), objective.encoded, run, samples=4, levels=2)
    slow = (lambda *_, **__: time.sleep(pause)) if pause else None
    with run.lock() if current_processes().is_rank_zero else nullcontext():
        return training_loop.fit(
            objective,
            network,
            settings,
            run,
            seed=3,
            preview=preview,
            preview_every=6,
            held_out=measure,
            progress=slow,
            say=lambda sentence: print(sentence, file=sys.stderr, flush=True),
        )


def fingerprint(folder: Path | str) -> str:
    """The checksums of the last checkpoint's tensors: weights, average, optimizer."""
    import json

    last = RunFolder.open(folder).checkpoint_folders()[-1]
    files = json.loads((last / "manifest.json").read_text())["files"]
    sums = {name: entry["sha256"] for name, entry in files.items() if name.endswith("safetensors")}
    return f"{last.name} {sums}"


def truth(word: str) -> bool:
    return word == "True"


if __name__ == "__main__":
    torch.set_num_threads(1)
    words = dict(word.split("=") for word in sys.argv[2:])
    pause = float(words.pop("pause", 0))
    kinds = {name: type(getattr(TrainSettings(), name)) for name in words}
    changes = {
        name: truth(word) if kinds[name] is bool else kinds[name](word) for name, word in words.items()
    }
    with join_processes("cpu"):
        train(sys.argv[1], pause=pause, **changes)
