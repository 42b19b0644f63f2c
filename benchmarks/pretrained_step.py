"""What a step of fine-tuning costs beside diffusers' own training-script loop: same network and inputs.

    OMP_NUM_THREADS=1 python benchmarks/pretrained_step.py [--only unet|mmdit] [--train full|lora]
                                                           [--steps 5] [--bf16] [--ema] [--out FILE.json]

The networks are diffusers' classes at a middle size with random weights: the UNet of Stable Diffusion 1 at a
quarter of its width (57 M) and the transformer of Stable Diffusion 3 (42 M), on latents of 32 × 32 × 4 with
77 tokens of 768, four samples a step. The rival is the loop of diffusers' train_text_to_image.py and
train_dreambooth_lora_sd3.py: accelerate, torch's AdamW, clipping, gather().item() a step; cached, and as it
ships, with SD's autoencoder (its own width) and CLIP-L asked in every step. Neither side averages, or both
do (`--ema`: its EMAModel, ours as after 2,048 steps, when every eighth is taken in). Every row is a process
of its own: CPU seconds of a step (the median after two), and peak memory to its end; ours then writes a
checkpoint, the loop does not. bfloat16 (autocast) is measured only where asked: without AMX a processor is
many times slower with it.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import training_loop
from torch import Tensor, nn

from sfumato.models.codecs.image import PixelCodec
from sfumato.models.interface import Model
from sfumato.models.io import adapter_run
from sfumato.models.lora.adapter import AdapterPlan
from sfumato.models.pretrained.families.stable_diffusion import StableDiffusion
from sfumato.models.pretrained.families.stable_diffusion_3 import StableDiffusion3
from sfumato.models.pretrained.stages import PretrainedDenoiser
from sfumato.models.text.encoder import NoConditioner
from sfumato.training.optim import ema

BATCH, SIDE, WORDS, WIDTH, RANK = 4, 32, 77, 768, 16
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WHO = ("ours", "diffusers", "diffusers uncached")


def network_of(name: str) -> Any:
    """The network, with random weights."""
    import diffusers

    torch.manual_seed(0)
    if name == "unet":
        return diffusers.UNet2DConditionModel(
            sample_size=SIDE, block_out_channels=(80, 160, 320, 320), norm_num_groups=16,
            cross_attention_dim=WIDTH, attention_head_dim=8,
        )  # fmt: skip
    return diffusers.SD3Transformer2DModel(
        sample_size=SIDE, patch_size=2, in_channels=4, out_channels=4, num_layers=8, attention_head_dim=64,
        num_attention_heads=6, joint_attention_dim=WIDTH, caption_projection_dim=384,
        pooled_projection_dim=WIDTH, pos_embed_max_size=SIDE,
    )  # fmt: skip


class Latents(PixelCodec):
    """Four channels."""

    latent_channels = 4


class Samples(training_loop.Samples):
    """Random encodings in memory."""

    def __init__(self, count: int = 64) -> None:
        draw = torch.Generator().manual_seed(1)
        self.ids, self.names = list(range(count)), [str(i) for i in range(count)]
        self.latents = torch.randn(count, 4, SIDE, SIDE, generator=draw)
        shapes = {"tokens": (WORDS, WIDTH), "pooled": (WIDTH,)}
        self.rows = [
            {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()} for _ in self.ids
        ]
        self.null = {name: torch.zeros(shape) for name, shape in shapes.items()}


def ours(name: str, lora: bool, steps: int, bf16: bool, ema: bool = False) -> list[float]:
    """CPU seconds of each step of `fit`."""
    from diffusers import DDPMScheduler

    family = StableDiffusion() if name == "unet" else StableDiffusion3()
    denoiser = PretrainedDenoiser(family, network_of(name))
    if lora:
        adapter_run.attach(denoiser, AdapterPlan(rank=RANK))
    theory = family.theory(DDPMScheduler(**BETAS))  # type: ignore[arg-type]
    model = Model(theory, Latents(), NoConditioner(), denoiser)
    how = {
        "ema": 0.9999 * ema,
        "ema_snapshot_every": 0,
        "precision": "bf16" if bf16 else "fp32",
        "threads": torch.get_num_threads(),
    }
    return training_loop.seconds(model, Samples(), BATCH, steps, **how)  # type: ignore[arg-type]


class Loop:
    """The training scripts' step."""

    def __init__(self, name: str, lora: bool, bf16: bool, cached: bool, ema: bool = False) -> None:
        from accelerate import Accelerator
        from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel
        from peft import LoraConfig

        self.name = name
        self.accelerator = Accelerator(cpu=True, mixed_precision="bf16" if bf16 else "no")
        network = network_of(name).train()
        if lora:
            network.requires_grad_(False)
            targets = list((StableDiffusion if name == "unet" else StableDiffusion3).lora_targets)
            network.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
        self.weights = [weight for weight in network.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(self.weights, lr=1e-4, weight_decay=1e-2)
        schedule = get_scheduler("constant", optimizer)
        samples = Samples()
        rows = [{"latents": x, **row} for x, row in zip(samples.latents, samples.rows, strict=True)]
        loader = torch.utils.data.DataLoader(rows, shuffle=True, batch_size=BATCH)  # type: ignore[arg-type]
        self.network, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            network, optimizer, loader, schedule
        )
        self.betas, self.flow = DDPMScheduler(**BETAS), FlowMatchEulerDiscreteScheduler(shift=3.0)  # type: ignore[arg-type]
        self.mean = EMAModel(self.weights) if ema else None
        self.encode = None if cached else training_loop.Encoders()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """As the scripts have it."""
        latents, words = batch["latents"], batch["tokens"]
        if self.encode is not None:
            self.encode(len(latents), 8 * SIDE)
        noise = torch.randn_like(latents)
        if self.name == "unet":
            t = torch.randint(0, 1000, (len(latents),)).long()
            out = self.network(self.betas.add_noise(latents, noise, t), t, words, return_dict=False)[0]
            return nn.functional.mse_loss(out.float(), noise.float())
        u = torch.normal(0.0, 1.0, (len(latents),)).sigmoid()
        t = self.flow.timesteps[(u * 1000).long()]
        places = [(self.flow.timesteps == one).nonzero().item() for one in t]
        s = self.flow.sigmas[places].view(-1, 1, 1, 1)
        x = (1 - s) * latents + s * noise
        out = self.network(
            hidden_states=x, timestep=t, encoder_hidden_states=words, pooled_projections=batch["pooled"],
            return_dict=False,
        )[0]  # fmt: skip
        return ((out.float() - (noise - latents).float()) ** 2).mean()

    def seconds(self, steps: int) -> list[float]:
        """CPU seconds of each step."""
        found: list[float] = []
        began = time.process_time()
        while True:
            for batch in self.loader:
                loss = self.loss(batch)
                self.accelerator.gather(loss.repeat(BATCH)).mean().item()  # type: ignore[union-attr]
                self.accelerator.backward(loss)
                self.accelerator.clip_grad_norm_(self.weights, 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
                if self.mean is not None:
                    self.mean.step(self.weights)
                found.append(time.process_time() - began)
                began = time.process_time()
                if len(found) == steps:
                    return found


def row(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """One case, measured in this process."""
    name, lora, bf16 = case["network"], case["train"] == "lora", case["dtype"] == "bf16"
    ema = bool(case["ema"])
    count = 2 + (max(2, steps // 2) if case["who"] == "diffusers uncached" else steps)
    if case["who"] == "ours":
        seconds = ours(name, lora, count, bf16, ema)
    else:
        seconds = Loop(name, lora, bf16, case["who"] == "diffusers", ema).seconds(count)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return case | {"cpu_seconds": round(statistics.median(seconds[2:]), 3), "peak_mb": round(peak)}


def main() -> None:
    """Measure every case, each in a process of its own; print it, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--train", default="", choices=["", "full", "lora"])
    parser.add_argument("--bf16", action="store_true", help="bfloat16 instead of float32")
    parser.add_argument("--ema", action="store_true", help="both sides average")
    parser.add_argument("--who", default="", help="measure only this one of: " + ", ".join(WHO))
    parser.add_argument("--out", default="")
    parser.add_argument("--case", default="", help="one row, in this process")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ema.stride = lambda *_: ema.STRIDE
    if asked.case:
        print(json.dumps(row(json.loads(asked.case), asked.steps)))
        return
    dtype, file = "bf16" if asked.bf16 else "fp32", Path(asked.out)
    for name in ("unet", "mmdit"):
        for train in ("full", "lora"):
            if asked.only not in name or asked.train not in train:
                continue
            for who in (asked.who,) if asked.who else WHO:
                case = {"network": name, "train": train, "dtype": dtype, "ema": asked.ema, "who": who}
                command = [sys.executable, __file__, "--case", json.dumps(case), "--steps", str(asked.steps)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                print(json.dumps(found), flush=True)
                if asked.out:
                    known = json.loads(file.read_text()) if file.is_file() else []
                    others = [one for one in known if case != {key: one.get(key) for key in case}]
                    file.write_text(json.dumps([*others, found], indent=1) + "\n")


if __name__ == "__main__":
    main()
