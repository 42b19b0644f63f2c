"""Clips, measured: how steady they are, what becomes of a first frame, the cost of encoding and decoding.

    python benchmarks/video.py RUN --name emoji_anim [--clips 16] [--out benchmarks/results/video.json]
    python benchmarks/video.py

RUN is a run of `sfumato train` on clips; what is found is put into the file under its name. Times are CPU
seconds on one thread, medians of five. Without a run, decoding at 480 × 832 is measured, in processes of
their own, as the growth of their peak memory.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sfumato.data.encoding.views import EncodingOptions
from sfumato.generation import load
from sfumato.generation.video import image_pixels
from sfumato.models.codecs.tiling import Tiling, decode_tiled
from sfumato.models.codecs.video import ClipCodec
from sfumato.recipe import Recipe
from sfumato.theory import noise
from sfumato.workflow.dataset import PicturesInMemory, collect

SIZE = (33, 480, 832)


def change(clips: np.ndarray | list[np.ndarray]) -> dict[str, float]:
    """Mean |difference| of consecutive frames, in levels of 255, over clips [F, H, W, 3]."""
    each = [np.abs(np.diff(clip.astype(np.float32), axis=0)).mean() for clip in clips]
    return {"mean": float(np.mean(each)), "error": float(np.std(each, ddof=1) / len(each) ** 0.5)}


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal to noise of pictures in levels of 255, dB."""
    return float(10 * np.log10(255**2 / max(np.square(one.astype(float) - other).mean(), 1e-9)))


def cpu(work: Callable[[], object], times: int = 5) -> float:
    """Median CPU seconds of `work`, after one warm-up."""
    taken = []
    for _ in range(times + 1):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return sorted(taken[1:])[times // 2]


def quality(model, recipe: Recipe, count: int) -> dict[str, object]:
    """Steadiness beside the training clips', and the first frame's fate."""
    data = recipe.data
    collection = collect(data)
    held_out = list(collection.with_split("held_out") or collection.with_split("train"))[: 2 * count]
    how = EncodingOptions("", frames=data.frames, fps=data.fps)
    real = PicturesInMemory(held_out, (data.resolution, data.resolution), how)
    captions = {one.name: one.captions[0] for one in held_out}
    clips = [p.permute(1, 2, 3, 0).numpy() for p in real.pictures if p.ndim == 4 and p.shape[1] > 1][:count]
    asked = [captions[name] for name in real.names][: len(clips)]
    drawn = model.generate(asked, seed=[77_000 + i for i in range(len(asked))])
    found: dict[str, object] = {"change_real": change(clips), "change_drawn": change(drawn)}
    whole = torch.stack([torch.from_numpy(c.copy()).permute(3, 0, 1, 2).float() / 127.5 - 1 for c in clips])
    again = model.decode(model.encode(whole)).clamp(-1, 1)
    shown = ((again + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
    found["change_codec"] = change(list(shown))
    found["codec_psnr"] = float(np.mean([psnr(a, b) for a, b in zip(shown, clips, strict=True)]))
    if "first" in model.info.get("known", ()):
        from PIL import Image

        first = [Image.fromarray(clip[0]) for clip in clips]
        held = model.generate(asked, image=first, seed=[88_000 + i for i in range(len(asked))])
        side = data.resolution
        stills = torch.stack([image_pixels(one, side, side) for one in first])[:, :, None]
        through = ((model.decode(model.encode(stills)).clamp(-1, 1) + 1) * 127.5).round().byte()
        coded = through.permute(0, 2, 3, 4, 1).numpy()[:, 0]
        pairs = list(zip(held, clips, coded, strict=True))
        found["first_frame_psnr"] = float(np.mean([psnr(h[0], c[0]) for h, c, _ in pairs]))
        found["first_frame_psnr_of_codec"] = float(np.mean([psnr(k, c[0]) for _, c, k in pairs]))
        found["first_frame_psnr_beside_codec"] = float(np.mean([psnr(h[0], k) for h, _, k in pairs]))
        found["change_from_first_frame"] = change(held)
    return found


def costs(model, recipe: Recipe) -> dict[str, float]:
    """CPU milliseconds a frame: encoding, a training step, an evaluation, decoding."""
    data, batch = recipe.data, 4
    shape = model.codec.latent_shape(data.resolution, data.resolution, data.frames)
    pixels = noise.normal((3, data.frames, data.resolution, data.resolution), 0, range(batch)).clamp(-1, 1)
    x, condition = noise.normal(shape, 0, range(batch)), model.condition(["a"] * batch)
    t = torch.full((batch,), 0.5)
    model.denoiser.requires_grad_(True)

    def step() -> None:
        model.predict(x, t, condition).square().mean().backward()

    def evaluate() -> None:
        with torch.no_grad():
            model.predict(x, t, condition)

    each = 1000 / batch / data.frames
    works = {
        "encode": lambda: model.encode(pixels), "decode": lambda: model.decode(x), "step": step,
        "evaluation": evaluate,
    }  # fmt: skip
    return {f"{name}_ms_per_frame": cpu(work) * each for name, work in works.items()}


def peak() -> float:
    """The most memory this process held, MB (Linux); what a parent held before does not count."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one[:6] == "VmHWM:")
    return int(line.split()[1]) / 1024


def decode_once(tile: int, chunk: int) -> None:
    """Decode SIZE with our codec and print how far the peak of memory rose, in MB, and CPU seconds."""
    torch.set_num_threads(1)
    codec = ClipCodec(8, 32, 32, 4).eval()
    latents = noise.normal(codec.latent_shape(SIZE[2], SIZE[1], SIZE[0]), 0, [0])
    with torch.no_grad():
        codec.decode(latents[:, :, :1, :8, :8])
        before, began = peak(), time.process_time()
        pieces = Tiling(tile, chunk)
        pixels = decode_tiled(codec, latents, pieces) if pieces else codec.decode(latents)
    print(json.dumps({
        "tile": tile, "chunk": chunk, "peak_mb": peak() - before,
        "cpu_seconds": time.process_time() - began, "output_mb": pixels.numel() * 4 / 2**20,
    }))  # fmt: skip


def memory() -> list[dict[str, float]]:
    """Decoding whole, in chunks, and in tiles and chunks, each in a process of its own."""
    found = []
    for tile, chunk in ((0, 0), (0, 4), (256, 4)):
        words = [sys.executable, __file__, "--decode", str(tile), str(chunk)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def main() -> None:
    """Measure a run, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--name", default="", help="what the data are called in the file")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/video.json"))
    parser.add_argument("--decode", nargs=2, type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.decode:
        return decode_once(*asked.decode)
    found = of_run(asked.run, asked.clips) if asked.run else memory()
    known = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.is_file() else {}
    known[(asked.name or asked.run.name) if asked.run else "decode_480x832x33"] = found
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def of_run(folder: Path, clips: int) -> dict[str, object]:
    """What is measured of a run."""
    torch.set_num_threads(1)
    model, recipe = load(folder), Recipe.read(folder)
    data = {"frames": recipe.data.frames, "resolution": recipe.data.resolution, "rate": recipe.data.fps}
    steps = max(int(one.name[5:]) for one in (folder / "checkpoints").glob("step-*"))
    return {**data, "steps": steps, **quality(model, recipe, clips), **costs(model, recipe)}


if __name__ == "__main__":
    main()
