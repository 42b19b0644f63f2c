"""A step of the whole Stable Diffusion 1.5 UNet (860 M weights, random) beside the loops people use.

    OMP_NUM_THREADS=1 python benchmarks/sd15_step.py [--steps 3] [--only "ours"] [--out FILE.json]

Batch 1, latents 32 × 32 × 4, 77 tokens of 768, float32, inputs cached, no averages. (a) diffusers: the loop
of train_text_to_image.py (accelerate, torch's AdamW, clipping, gather().item()); (b) DiffSynth-Studio's,
AdamW without clipping or gather. Every row is a process of its own: CPU seconds of a step (the median after
two) and peak memory; with 14 GB for weights, gradients and moments alone, none begins unless 18 GB are free.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pretrained_step
import torch
from torch import nn

from sfumato.models.interface import Model
from sfumato.models.pretrained.families.stable_diffusion import StableDiffusion
from sfumato.models.pretrained.stages import PretrainedDenoiser
from sfumato.models.text.encoder import NoConditioner
from sfumato.run_folder import RunFolder
from sfumato.training import device as devices
from sfumato.training.loop.loop import fit
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.training.settings import TrainSettings

NEEDED, WARM = 18e9, 2
WHO = ("ours", "diffusers", "diffsynth")


def network_of(_: str) -> Any:
    """The network of Stable Diffusion 1.5; its weights are drawn quickly."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    network = network.to_empty(device="cpu")
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.02)
        else:
            nn.init.constant_(weight, float("norm" in name and name.endswith("weight")))
    return network


class Enough(Exception):
    """All steps were taken; the 10 GB of a checkpoint need not be written."""


def ours(steps: int) -> list[float]:
    """CPU seconds of each step of `fit`."""
    from diffusers import DDPMScheduler

    denoiser = PretrainedDenoiser(StableDiffusion(), network_of("unet"))
    theory = StableDiffusion().theory(DDPMScheduler(**pretrained_step.BETAS))  # type: ignore[arg-type]
    model = Model(theory, pretrained_step.Latents(), NoConditioner(), denoiser)
    settings = TrainSettings(
        steps=1000, batch=1, ema=0, ema_snapshot_every=0, save_every=10**9, validate_every=0, threads=1
    )
    samples = pretrained_step.Samples()
    order = pretrained_step.training_loop.Order(len(samples), 1)
    objective = DiffusionObjective(model, samples, order, settings, 0)
    marks = [time.process_time()]

    def note(*_: Any, **__: Any) -> None:
        marks.append(time.process_time())
        if len(marks) > steps:
            raise Enough

    with tempfile.TemporaryDirectory() as folder, suppress(Enough):
        fit(objective, denoiser, settings, RunFolder.create(folder), progress=note, say=lambda _: None)
    return [end - start for start, end in pairwise(marks)]


def diffsynth(steps: int) -> list[float]:
    """CPU seconds of each step of its loop."""
    loop = pretrained_step.Loop("unet", lora=False, bf16=False, cached=True)
    optimizer, found = torch.optim.AdamW(loop.weights, lr=1e-4), []
    for batch in loop.loader:
        began = time.process_time()
        optimizer.zero_grad()
        loop.loss(batch).backward()
        optimizer.step()
        found.append(time.process_time() - began)
        if len(found) == steps:
            break
    return found


def row(who: str, steps: int) -> dict[str, Any]:
    """One of WHO, measured in this process."""
    pretrained_step.BATCH, pretrained_step.network_of = 1, network_of
    count = WARM + steps
    if who == "diffusers":
        seconds = pretrained_step.Loop("unet", lora=False, bf16=False, cached=True).seconds(count)
    else:
        seconds = {"ours": ours, "diffsynth": diffsynth}[who](count)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {
        "who": who, "cpu_seconds": round(statistics.median(seconds[WARM:]), 2), "peak_gb": round(peak, 2),
        "steps": [round(one, 2) for one in seconds],
    }  # fmt: skip


def main() -> None:
    """Measure each in a process of its own; print it, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", default="", choices=["", *WHO])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", default="", help="one row, in this process")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.one:
        print(json.dumps(row(asked.one, asked.steps)))
        return
    rows = []
    for who in [asked.only] if asked.only else WHO:
        free = devices.free_bytes(torch.device("cpu"))
        if free < NEEDED:
            raise SystemExit(f"{free / 1e9:.1f} GB are free, {NEEDED / 1e9:.0f} are needed.")
        command = [sys.executable, __file__, "--one", who, "--steps", str(asked.steps)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
        if asked.out:
            asked.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
