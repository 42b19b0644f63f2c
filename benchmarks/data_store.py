"""An index of ten million entries, what buckets cut off, and how long a run takes to its first step.

    python benchmarks/data_store.py index [--count N]
    python benchmarks/data_store.py buckets|first --data DIR

Encoding and reading have benchmarks of their own (data_encoding.py, data_reading.py). Prints JSON lines.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from sfumato.data import buckets
from sfumato.data.sources import folder
from sfumato.data.store.index import COLUMNS, Index
from sfumato.data.store.shard import Field
from sfumato.readers import media

LATENT = (16, 32, 32)


def tell(**facts: object) -> None:
    print(
        json.dumps({name: round(v, 4) if isinstance(v, float) else v for name, v in facts.items()}),
        flush=True,
    )


def measure_index(count: int) -> None:
    """Open an index of `count` entries in simulated shards of 256, and look a thousand keys up."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as place:
        folder = Path(place)
        shards = [f"{number:032x}.safetensors" for number in range(-(-count // 256))]
        for name in shards:
            (folder / name).touch()
        index = Index.__new__(Index)
        index.folder, index.file = folder, folder / "index.safetensors"
        chance = np.random.default_rng(0)
        rows = np.arange(count, dtype=np.uint64)
        index._columns = dict.fromkeys(COLUMNS, np.zeros(count, np.uint64)) | {
            "high": np.sort(chance.integers(0, 2**64, count, np.uint64)),
            "low": rows,
            "shard": rows // np.uint64(256),
            "begin": rows % np.uint64(256) * np.uint64(32768),
        }
        index._shards = shards
        index._layouts = [(Field("latents", torch.bfloat16, LATENT, 0, 32768),)]
        index._save()
        keys = [
            f"{int(index._columns['high'][i]):016x}{int(i):016x}" for i in chance.integers(0, count, 1000)
        ]
        begin = time.perf_counter()
        opened = Index(folder)
        middle = time.perf_counter()
        places = opened.locations(keys)
        tell(
            measure="index",
            entries=len(opened),
            megabytes=index.file.stat().st_size / 1e6,
            open_s=middle - begin,
            lookup_us=(time.perf_counter() - middle) * 1e6 / len(keys),
            found=sum(place is not None for place in places),
        )


def measure_buckets(data: str) -> None:
    """What is cut off the pictures of a folder with 1, 3, 5 and 9 shapes."""
    sizes = [
        media.size_of(sample.source()) for sample in folder.open_collection(data, captions="none").samples
    ]
    for count in (1, 3, 5, 9):
        plan = buckets.choose(sizes, 256, 16, count)
        tell(measure="buckets", data=Path(data).name, shapes=len(plan.shapes), cut_off=plan.waste(sizes))


def measure_first_step(data: str) -> None:
    """Seconds from the command `sfumato train` to the end of its first step: empty store, then full."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as place:
        folder = Path(place)
        recipe = folder / "recipe.toml"
        recipe.write_text(
            f'[data]\ntrain = "{data}"\nstore = "store"\n[model]\ncodec_steps = 20\n'
            "[train]\nsteps = 1\nheld_out_every = 0\nlog_every = 1\nthreads = 1\n[sample]\nevery = 0\n"
        )
        for store in ("cold", "warm", "warm"):
            begin = time.time()
            output = f"output={folder / store}-{begin}"
            words = [sys.executable, "-m", "sfumato", "train", str(recipe), output]
            subprocess.run(words, check=True, capture_output=True)
            events = Path(output.partition("=")[2], "events.jsonl").read_text().splitlines()
            told = [json.loads(line) for line in events]
            first = next(one["time"] for one in told if one.get("step") == 1)
            phases = {one["name"]: one["seconds"] for one in told if one["kind"] == "phase"}
            tell(
                measure="first step", data=Path(data).name, store=store, seconds=first - begin,
                codec_s=phases.get("codec"), encode_s=phases.get("encode"), sanity_s=phases.get("sanity"),
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("index", "buckets", "first"))
    parser.add_argument("--data", default="")
    parser.add_argument("--count", type=int, default=10_000_000)
    given = parser.parse_args()
    if given.what == "index":
        measure_index(given.count)
    elif given.what == "buckets":
        measure_buckets(given.data)
    else:
        measure_first_step(given.data)


if __name__ == "__main__":
    main()
