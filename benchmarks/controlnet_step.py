"""What a step of ControlNet training costs beside the loop of diffusers' train_controlnet.py.

    OMP_NUM_THREADS=1 python benchmarks/controlnet_step.py [--rounds 8] [--out FILE.json]

The same UNet of Stable Diffusion's kind, ControlNet, autoencoder and CLIP (random weights, smaller), batch
and float32. Three loops take turns, a step each: diffusers' as the script ships, which asks autoencoder and
CLIP in every step; the same with their answers cached; ours, from the store. CPU seconds, the median.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from sfumato.generation import load
from sfumato.recipe import Recipe
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.workflow.encode_samples import dataset_and_sampler
from sfumato.workflow.finetune import prepare_trainable
from sfumato.workflow.prepare import prepare_run, resolve_recipe

SIDE, BATCH, COUNT = 128, 4, 16
WORDS = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "abcdefghij")]


def pipeline(folder: Path) -> None:
    """A small Stable Diffusion with random weights."""
    torch.manual_seed(0)
    vocabulary = folder / "words"
    vocabulary.mkdir(parents=True)
    (vocabulary / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    (vocabulary / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"), model_max_length=77
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(WORDS), hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
            num_attention_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=8,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDE // 8, block_out_channels=(64, 128, 128), layers_per_block=2, cross_attention_dim=256,
        attention_head_dim=4, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, safety_checker=None,
        feature_extractor=None, scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        ), requires_safety_checker=False,
    ).save_pretrained(folder / "base")  # fmt: skip


def pictures(folder: Path) -> None:
    """Noise of low frequency, a control and a caption beside each."""
    chance, rows = np.random.default_rng(0), []
    (folder / "data").mkdir()
    for index in range(COUNT):
        picture = Image.fromarray(chance.integers(0, 255, (8, 8, 3), np.uint8)).resize((SIDE, SIDE), 3)
        picture.save(folder / "data" / f"{index}.png")
        picture.convert("L").save(folder / "data" / f"{index}-control.png")
        told = {"file_name": f"{index}.png", "text": "a b c", "control": f"{index}-control.png"}
        rows.append(json.dumps(told))
    (folder / "data" / "metadata.jsonl").write_text("\n".join(rows))


def optimized(weights: Any) -> Callable[[torch.Tensor], None]:
    """What both loops do with a loss: AdamW, gradients clipped to norm 1."""
    held = [one for one in weights if one.requires_grad]
    optimizer = torch.optim.AdamW(held, lr=1e-5, weight_decay=1e-2)

    def take(loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(held, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return take


def diffusers_loop(folder: Path, cached: bool) -> Callable[[int], None]:
    """A step of train_controlnet.py's loop, without accelerate; `cached`: nothing is encoded in it."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder / "base", safety_checker=None)
    unet, vae, text = pipe.unet, pipe.vae, pipe.text_encoder
    net = diffusers.ControlNetModel.from_unet(unet).train()
    for frozen in (unet, vae, text):
        frozen.requires_grad_(False)
    table = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    take = optimized(net.parameters())

    def read(name: str) -> torch.Tensor:
        pixels = np.stack([np.asarray(Image.open(file(name, i)).convert("RGB")) for i in range(COUNT)])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1

    def file(name: str, index: int) -> Path:
        return folder / "data" / f"{index}{name}.png"

    pixels, controls = read(""), read("-control") / 2 + 0.5
    ids = pipe.tokenizer(["a b c"] * BATCH, padding="max_length", return_tensors="pt").input_ids

    @torch.no_grad()
    def encoded(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        latents = vae.encode(pixels[rows]).latent_dist.sample() * vae.config.scaling_factor
        return latents, text(ids)[0]

    known = [encoded(slice(i, i + BATCH)) for i in range(0, COUNT, BATCH)] if cached else []

    def step(number: int) -> None:
        start = number * BATCH % COUNT
        rows = slice(start, start + BATCH)
        latents, words = known[start // BATCH] if cached else encoded(rows)
        noise = torch.randn_like(latents)
        times = torch.randint(0, 1000, (BATCH,))
        noisy = table.add_noise(latents, noise, times)
        down, middle = net(
            noisy, times, encoder_hidden_states=words, controlnet_cond=controls[rows], return_dict=False
        )
        answer = unet(
            noisy, times, encoder_hidden_states=words, down_block_additional_residuals=down,
            mid_block_additional_residual=middle, return_dict=False,
        )[0]  # fmt: skip
        take(F.mse_loss(answer.float(), noise.float()))

    return step


def our_loop(folder: Path) -> Callable[[int], None]:
    """A step of ours from a recipe: read from the store, mixed, asked, clipped, stepped."""
    said = f"""
        output = "run"
        [model]
        base = "{folder / "base"}"
        train = "controlnet"
        [data]
        train = "{folder / "data"}"
        resolution = {SIDE}
        cache_dir = "{folder / "store"}"
        held_out = 0.0
        [train]
        batch = {BATCH}
        """
    (folder / "r.toml").write_text(said)
    recipe = Recipe.read(folder / "r.toml")
    prepared = prepare_run(recipe, resolve_recipe(recipe), say=lambda sentence: None)
    network = prepare_trainable(prepared.model, recipe)
    train, order = dataset_and_sampler(recipe, prepared.train, [])
    objective = DiffusionObjective(prepared.model, train, order, recipe.train, recipe.seed, 0.1)
    take = optimized(network.parameters())
    return lambda number: take(objective.losses(number, 0, 1).per_sample.mean())


def main() -> None:
    """Measure, and print a row for each loop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipeline(folder)
        pictures(folder)
        loops = {
            "diffusers, as its script ships": diffusers_loop(folder, cached=False),
            "diffusers, latents and text cached": diffusers_loop(folder, cached=True),
            "sfumato": our_loop(folder),
        }
        trained = load(folder / "base").denoiser
        taken: dict[str, list[float]] = {one: [] for one in loops}
        for number in range(said.rounds + 2):
            for one, step in loops.items():
                began = time.process_time()
                step(number)
                if number >= 2:
                    taken[one].append(time.process_time() - began)
    ours = statistics.median(taken["sfumato"])
    rows = {
        one: {
            "cpu_s": round(statistics.median(some), 3),
            "over_ours": round(statistics.median(some) / ours, 2),
        }
        for one, some in taken.items()
    }
    found = {
        "steps": rows, "rounds": said.rounds, "batch": BATCH, "side": SIDE,
        "threads": torch.get_num_threads(),
        "unet_parameters": sum(one.numel() for one in trained.parameters()), "torch": torch.__version__,
        "diffusers": diffusers.__version__, "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if said.out:
        said.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
