"""What the plan says of a step and what two real steps measure: memory and seconds, one process each.

    OMP_NUM_THREADS=1 python benchmarks/plan.py [--out FILE.md]

Memory is counted on the meta device and compared with the rise of the process's memory; seconds are those of
the step's matrix products at this machine's speed, times the factor the plan uses.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sfumato.stages import blocks
from sfumato.stages.codec import PixelCodec
from sfumato.stages.interface import Condition
from sfumato.stages.scratch import new_denoiser
from sfumato.stages.settings import ModelSettings
from sfumato.theory import get
from sfumato.training import plan
from sfumato.training.settings import TrainSettings
from sfumato.workflow.costs import BESIDE_PRODUCTS

DIT = {"denoiser": "dit", "width": 512, "depth": 6, "heads": 8}
WIDE = {"denoiser": "dit", "width": 768, "depth": 4, "heads": 12}
SMALL = {"denoiser": "dit", "width": 256, "depth": 8, "heads": 4}
UNET = {"denoiser": "unet", "width": 192, "depth": 2, "heads": 8}
CASES: list[tuple[str, dict[str, Any], int, dict[str, Any]]] = [
    ("DiT 512x6, 8x8", DIT, 8, {"batch": 16}),
    ("the same, no averages", DIT, 8, {"batch": 16, "ema": 0.0, "ema_snapshots": 0}),
    ("the same, 4 parts", DIT, 8, {"batch": 16, "accumulate": 4}),
    ("the same, every block again", DIT, 8, {"batch": 16, "checkpointing": 1}),
    ("the same, 16x16", DIT, 16, {"batch": 8}),
    ("the same, every second again", DIT, 16, {"batch": 8, "checkpointing": 2}),
    ("the same, Lion", DIT, 8, {"batch": 16, "optimizer": "lion"}),
    ("the same, Muon", DIT, 8, {"batch": 16, "optimizer": "muon"}),
    ("the same, Adafactor", DIT, 8, {"batch": 16, "optimizer": "adafactor"}),
    ("DiT 768x4, 8x8", WIDE, 8, {"batch": 8}),
    ("DiT 256x8, 8x8", SMALL, 8, {"batch": 64}),
    ("DiT 256x8, 16x16", SMALL, 16, {"batch": 16}),
    ("UNet 192, 8x8", UNET, 8, {"batch": 16}),
    ("UNet 192, 16x16", UNET, 16, {"batch": 8}),
    ("the same, no averages", UNET, 16, {"batch": 8, "ema": 0.0, "ema_snapshots": 0}),
]


class Latents(PixelCodec):
    """Sixteen channels, as the demo's codec makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_channels = 16


def one(number: int) -> dict[str, float]:
    """Predicted and measured: GB and seconds of a case."""
    torch.set_num_threads(1)
    _, words, side, changes = CASES[number]
    settings = TrainSettings(**changes)
    network = new_denoiser(ModelSettings(**words), get("flow-matching"), Latents(), (384, 384))
    blocks.recompute(network, settings.checkpointing)
    count = settings.batch // settings.accumulate
    rows = [{"tokens": torch.randn(4 + i % 5, 384), "pooled": torch.randn(384)} for i in range(count)]
    inputs = torch.randn(count, 16, side, side), torch.full((count,), 500.0), Condition.stack(rows)
    counted = plan.count(network, inputs)
    memory = counted.memory(settings, settings.checkpointing)
    flops = plan.FORWARD_AND_BACKWARD * settings.accumulate * counted.flops
    again = 1 + counted.recomputed_share(settings.checkpointing) / 3 if settings.checkpointing else 1
    seconds = BESIDE_PRODUCTS * again * flops / plan.flops_per_second()
    found = plan.probe(network, inputs, settings)
    # Weights are there before the probe, which trains a copy of them.
    return {
        "predicted_gb": memory.peak / 1e9,
        "measured_gb": found.peak / 1e9,
        "predicted_s": seconds,
        "measured_s": found.seconds,
    }


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=int, default=-1)
    parser.add_argument("--out", default="")
    asked = parser.parse_args()
    if asked.one >= 0:
        print(json.dumps(one(asked.one)))
        return
    lines = [
        "| step | batch | predicted GB | measured GB | off | predicted s | measured s | off |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, (name, _, _, changes) in enumerate(CASES):
        words = [sys.executable, __file__, "--one", str(number)]
        said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        row = json.loads(said.splitlines()[-1])
        off = [row[f"predicted_{unit}"] / row[f"measured_{unit}"] - 1 for unit in ("gb", "s")]
        lines.append(
            f"| {name} | {changes['batch']} | {row['predicted_gb']:.3f} | {row['measured_gb']:.3f} "
            f"| {off[0]:+.1%} | {row['predicted_s']:.2f} | {row['measured_s']:.2f} | {off[1]:+.1%} |"
        )
        print(lines[-1], flush=True)
    if asked.out:
        Path(asked.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
