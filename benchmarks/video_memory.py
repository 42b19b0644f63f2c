"""Decoding by our codec of clips and diffusers' video autoencoders: peak memory and time, whole, in tiles, in
tiles and chunks.

    python benchmarks/video_memory.py [--only Wan] [--out benchmarks/results/video_memory.json]

Weights are random and networks narrower than the released ones (memory grows with width); depth, strides
and causal caches are the real ones. Each decoding runs in a process of its own; memory is how far its peak
rose above what it held before, time is CPU seconds on one thread.
"""

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from video import peak

from sfumato.models.codecs.tiling import Tiling, decode_tiled
from sfumato.models.codecs.video import ClipCodec, VideoAutoencoderCodec
from sfumato.theory import noise

SIZE, OURS = (9, 128, 256), (17, 256, 512)
NARROW: dict[str, dict[str, Any]] = {
    "ClipCodec": {"stride": 8, "latent_channels": 32, "width": 32, "time_stride": 4},
    "AutoencoderKLWan": {"base_dim": 24},
    "AutoencoderKLLTXVideo": {
        "block_out_channels": (32, 64, 128, 128), "decoder_block_out_channels": (32, 64, 128, 128),
    },
    "AutoencoderKLHunyuanVideo": {"block_out_channels": (32, 64, 128, 128)},
    "AutoencoderKLCogVideoX": {"block_out_channels": (32, 32, 64, 64)},
    "AutoencoderKLMochi": {
        "encoder_block_out_channels": (32, 32, 64, 96), "decoder_block_out_channels": (32, 64, 128, 192),
    },
}  # fmt: skip


def measured(
    name: str, config: dict[str, Any], size: tuple[int, int, int], pieces: Tiling, answer: Any
) -> None:
    """Decode a clip of noise and put the numbers into the pipe."""
    torch.set_num_threads(1)
    frames, height, width = size
    codec = ClipCodec(**config) if name == "ClipCodec" else VideoAutoencoderCodec(name, **config)
    codec.eval()
    frames = 1 + (frames - 1) // codec.time_stride * codec.time_stride
    latents = noise.normal(codec.latent_shape(width, height, frames), 0, [0])
    with torch.no_grad():
        codec.decode(latents[:, :, :1, :2, :2])  # what the first call of any size needs
        before, began = peak(), time.process_time()
        pixels = decode_tiled(codec, latents, pieces) if pieces else codec.decode(latents)
        spent = time.process_time() - began
    answer.send(
        {
            "codec": name, "config": config, "frames": pixels.shape[2], "height": height, "width": width,
            "tile": pieces.tile, "chunk": pieces.frames, "peak_mb": round(peak() - before),
            "cpu_seconds": round(spent, 1), "output_mb": round(pixels.numel() * 4 / 2**20),
        }
    )  # fmt: skip


def apart(*asked: Any) -> dict[str, Any]:
    """`measured` in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=measured, args=(*asked, theirs))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        found = {"codec": asked[0], "tile": asked[3].tile, "chunk": asked[3].frames, "failed": True}
    process.join()
    print(json.dumps(found), flush=True)
    return found


def ways(name: str) -> tuple[Tiling, ...]:
    """Whole, in tiles, in tiles and chunks; LTX's latents stand for 32 pixels a side."""
    if name == "ClipCodec":
        return Tiling(), Tiling(128), Tiling(128, 4)
    tile = 128 if "LTX" in name else 64
    return Tiling(), Tiling(tile), Tiling(tile, 8)


def main() -> None:
    """Measure all, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/video_memory.json"))
    parser.add_argument("--only", default="", help="part of a codec's name; rows of others stay as they are")
    asked = parser.parse_args()
    known = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.is_file() else []
    for name, config in NARROW.items():
        if asked.only in name:
            known = [row for row in known if row["codec"] != name]
            size = OURS if name == "ClipCodec" else SIZE
            known += [apart(name, config, size, pieces) for pieces in ways(name)]
    order = list(NARROW)
    rows = sorted((row for row in known if row["codec"] in order), key=lambda row: order.index(row["codec"]))
    asked.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
