"""Encoding into the store beside a straight loop that does the same work with the same encoder.

    python benchmarks/data_encoding.py DIR [--encoder small|sd|clip] [--side N] [--count N] [--pairs N]

The straight loop decodes, fits, encodes and saves, batch after batch, a safetensors file each. Pairs of both,
one after the other; wall seconds (decoding is hidden behind encoding) and CPU seconds of all threads.
Prints one JSON line.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sfumato.data.encoding import views
from sfumato.data.encoding.encode import encode_to_store
from sfumato.data.encoding.encode_plan import plan_encoding
from sfumato.data.encoding.views import EncodingOptions
from sfumato.data.sources import folder
from sfumato.data.store.store import Store
from sfumato.models import new_codec
from sfumato.models.settings import ModelSettings
from sfumato.readers import media

BATCH = 16
FRAMES, RATE = 9, 8.0
SMALL = (16, 32, 32, 32)
SD = (128, 256, 512, 512)


def kl(channels: tuple[int, ...]) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """The encoder of an AutoencoderKL of stride 8, random weights: mean, and deviation in 16 bits."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=channels, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8 if channels == SMALL else 32,
        layers_per_block=1 if channels == SMALL else 2,
    ).eval()  # fmt: skip

    def encode(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        posterior: Any = network.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        return {"mean": posterior.mean, "std": posterior.std.bfloat16()}

    return encode


def clip() -> Callable[[torch.Tensor], torch.Tensor]:
    """Our codec of clips, untrained."""
    codec = new_codec(ModelSettings(), 0, True).eval()
    return lambda pixels: codec.distribution(pixels)[0]


ENCODERS: dict[str, Callable[[], Callable[[torch.Tensor], Any]]] = {
    "small": lambda: kl(SMALL),
    "sd": lambda: kl(SD),
    "clip": clip,
}


def spent(work: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(data: str, encoder: str, side: int, count: int, pairs: int) -> dict[str, Any]:
    collection = folder.open_collection(data, captions="none", empty=True)
    samples = collection.samples[:: max(1, len(collection.samples) // count)][:count]
    encode = ENCODERS[encoder]()
    frames = FRAMES if encoder == "clip" else 0
    how = EncodingOptions("net", batch=BATCH, frames=frames, fps=RATE)
    tasks = plan_encoding(samples, (side, side), how, {}, False, lambda *told: None).tasks

    def straight(folder: Path) -> None:
        with torch.no_grad():
            for at in range(0, len(tasks), BATCH):
                pieces = [views.decode(task) for task in tasks[at : at + BATCH]]
                pictures = [one[0] for one in pieces if not isinstance(one, str)]
                answer = encode(media.to_pixels(torch.stack(pictures)))
                named = {"latents": answer} if isinstance(answer, torch.Tensor) else answer
                save_file(
                    {name: one.contiguous() for name, one in named.items()}, folder / f"{at}.safetensors"
                )

    with tempfile.TemporaryDirectory() as place:
        whole = Path(place)
        straight(whole)
        loops, fills = [], []
        for run in range(pairs):
            loops.append(spent(lambda: straight(whole)))
            root = whole / str(run)
            fills.append(
                spent(
                    lambda root=root: encode_to_store(Store(root), samples, (side, side), encode, None, how)
                )
            )
        again = spent(lambda: encode_to_store(Store(whole / "0"), samples, (side, side), encode, None, how))
        size = sum(file.stat().st_size for file in (whole / "0").rglob("*") if file.is_file())
    ratios = [[a[i] / b[i] for a, b in zip(loops, fills, strict=True)] for i in (0, 1)]
    middle = statistics.median
    return {
        "measure": "encode", "data": Path(data).name, "encoder": encoder, "side": side, "samples": len(tasks),
        "pairs": pairs, "wall_ratio": middle(ratios[0]), "cpu_ratio": middle(ratios[1]),
        "wall_ratios": ratios[0], "cpu_ratios": ratios[1],
        "straight_s": middle(one[0] for one in loops), "store_s": middle(one[0] for one in fills),
        "straight_cpu_s": middle(one[1] for one in loops), "store_cpu_s": middle(one[1] for one in fills),
        "samples_per_s": len(tasks) / middle(one[0] for one in fills), "nothing_to_do_s": again[0],
        "store_megabytes": size / 1e6, "bytes_per_sample": size / len(tasks),
    }  # fmt: skip


def rounded(value: Any) -> Any:
    return [rounded(one) for one in value] if isinstance(value, list) else (
        round(value, 3) if isinstance(value, float) else value
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--encoder", default="small", choices=ENCODERS)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--count", type=int, default=160)
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(given.data, given.encoder, given.side, given.count, given.pairs)
    print(json.dumps({name: rounded(value) for name, value in found.items()}), flush=True)


if __name__ == "__main__":
    main()
