"""The store beside other ways to keep encodings: encoding, size, random reading, and an index of ten million.

Run: python benchmarks/data_store.py [encode|read|index|buckets] [--data DIR] [--count N]
Prints one JSON line per measurement.
"""

import argparse
import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from sfumato.data import buckets, media, sources
from sfumato.data.encode import EncodedSet, Encoding, fill
from sfumato.data.index import COLUMNS, Index
from sfumato.data.sample import Sample
from sfumato.data.shard import Field
from sfumato.data.store import Store

LATENT, TOKENS = (16, 32, 32), (77, 384)


def tell(**facts: object) -> None:
    print(
        json.dumps({name: round(v, 4) if isinstance(v, float) else v for name, v in facts.items()}),
        flush=True,
    )


def timed(work: Callable[[], object]) -> float:
    """Wall seconds: reading waits for disks and other processes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def spent(work: Callable[[], object]) -> float:
    """CPU seconds, which a busy machine hardly changes."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def network() -> torch.nn.Module:
    """The encoder of a small AutoencoderKL (16 to 32 channels, stride 8, 4 latent channels), untrained."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8, layers_per_block=1,
    ).eval()  # fmt: skip


def measure_encode(data: str, count: int, side: int = 128, batch: int = 16, pairs: int = 3) -> None:
    """`fill` beside a plain loop that decodes, fits and encodes the same pictures with the same network.

    Pairs of both, one after the other, in CPU seconds on one thread of arithmetic; the median of the ratios.
    """
    samples = sources.open(data, captions="none").samples[:count]
    net = network()

    def encode(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        posterior = net.encode(pixels).latent_dist
        return {"mean": posterior.mean, "std": posterior.std.bfloat16()}

    def straight() -> None:
        with torch.no_grad():
            for at in range(0, len(samples), batch):
                group = [
                    media.fit(media.read_picture(s.source()), side, side) for s in samples[at : at + batch]
                ]
                encode(media.to_pixels(torch.stack(group)))

    with tempfile.TemporaryDirectory() as folder:
        how = Encoding("net", batch=batch)
        straight()
        plain, filled, walls = [], [], []
        for run in range(pairs):
            place = Path(folder) / str(run)
            plain.append(spent(straight))
            begin = time.perf_counter()
            filled.append(spent(lambda at=place: fill(Store(at), samples, (side, side), encode, None, how)))
            walls.append(time.perf_counter() - begin)
        ratios = sorted(a / b for a, b in zip(plain, filled, strict=True))
        again = spent(lambda: fill(Store(Path(folder) / "0"), samples, (side, side), encode, None, how))
        size = sum(file.stat().st_size for file in (Path(folder) / "0").rglob("*.safetensors"))
        tell(
            measure="encode",
            data=Path(data).name,
            samples=len(samples),
            straight_cpu_s=sorted(plain)[pairs // 2],
            fill_cpu_s=sorted(filled)[pairs // 2],
            fill_wall_s=sorted(walls)[pairs // 2],
            ratio_of_throughput=ratios[pairs // 2],
            ratios=[round(ratio, 3) for ratio in ratios],
            nothing_to_do_cpu_s=again,
            store_megabytes=size / 1e6,
        )


class Reads(Dataset):
    """One random read an item; for DataLoader with workers."""

    def __init__(self, read: Callable[[int], object], order: list[int]) -> None:
        self.read, self.order = read, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> object:
        return self.read(self.order[index])


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def made(count: int, folder: Path) -> EncodedSet:
    """A set of `count` entries of 90 KB: latent 16 × 32 × 32 and 77 × 384 text states, bfloat16."""
    samples = [
        Sample(f"{i:06d}", (f"caption {i}",), content=str(i), picture=lambda: blank) for i in range(count)
    ]
    blank = media.to_picture(torch.zeros(3, 8, 8))

    def pixels(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(x), *LATENT).bfloat16()

    def texts(captions: list[str]) -> list[dict[str, torch.Tensor]]:
        return [{"tokens": torch.randn(*TOKENS).bfloat16()} for _ in captions]

    seconds = -time.perf_counter()
    encoded = fill(Store(folder), samples, (8, 8), pixels, texts, Encoding("p", "t", batch=64))
    tell(measure="write", entries_per_s=count / (seconds + time.perf_counter()))
    return encoded


def measure_read(count: int) -> None:
    """Random reads of 90-KB entries, cold and warm, with workers, beside a file per sample and a tar."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as place:
        folder = Path(place)
        encoded = made(count, folder / "store")
        order = np.random.default_rng(0).permutation(count).tolist()
        (folder / "files").mkdir()
        for index in range(count):
            batch = encoded.read([index])
            one = {"latents": batch.latents[0].bfloat16(), "tokens": batch.conditions[0]["tokens"].bfloat16()}
            save_file(one, folder / "files" / f"{index}.safetensors")
        with tarfile.open(folder / "all.tar", "w") as archive:
            archive.add(folder / "files", "files")

        def ours(index: int) -> object:
            return encoded.read([index]).latents[0]

        def ours_batches() -> None:
            for at in range(0, count - 63, 64):
                encoded.read(order[at : at + 64])

        def a_file(index: int) -> object:
            return load_file(folder / "files" / f"{index}.safetensors")["latents"]

        forget(folder / "store")
        tell(measure="read", way="store, batches of 64, cold", per_s=count / timed(ours_batches))
        tell(
            measure="read",
            way="store, batches of 64, warm",
            per_s=count / min(timed(ours_batches) for _ in "12"),
        )
        for way, read, where in (("store", ours, "store"), ("file per sample", a_file, "files")):
            forget(folder / where)
            tell(
                measure="read", way=f"{way}, cold", per_s=count / timed(lambda r=read: [r(i) for i in order])
            )
            tell(
                measure="read", way=f"{way}, warm", per_s=count / timed(lambda r=read: [r(i) for i in order])
            )
            for workers in (1, 2):
                loader = DataLoader(Reads(read, order), batch_size=64, num_workers=workers)
                rate = count / timed(lambda loader=loader: list(loader))
                tell(measure="read", way=f"{way}, {workers} workers", per_s=rate)
        for way, other in (("LMDB", _lmdb(folder, count)), ("webdataset, in order", _webdataset(folder))):
            if other is not None:
                tell(measure="read", way=f"{way}, warm", per_s=count / timed(lambda r=other: r(order)))
        tell(
            measure="read",
            way="tar, in order, not decoded",
            per_s=count / timed(lambda: _tar(folder / "all.tar")),
        )
        tell(measure="read", way="decode a 512² JPEG instead", per_s=200 / timed(lambda: _decode(200)))


def _lmdb(folder: Path, count: int) -> Callable[[list[int]], object] | None:
    """Random reads of the same entries from LMDB, as safetensors bytes; None where it is not installed."""
    try:
        import lmdb
    except ImportError:
        return None
    from safetensors.torch import load

    base = lmdb.open(str(folder / "lmdb"), map_size=1 << 34)
    with base.begin(write=True) as writing:
        for index in range(count):
            writing.put(str(index).encode(), (folder / "files" / f"{index}.safetensors").read_bytes())

    def read(order: list[int]) -> None:
        with base.begin() as reading:
            for index in order:
                load(reading.get(str(index).encode()))["latents"]

    return read


def _webdataset(folder: Path) -> Callable[[list[int]], object] | None:
    """The tar through webdataset, in order, its entries decoded; None where it is not installed."""
    try:
        import webdataset
    except ImportError:
        return None
    from safetensors.torch import load

    def read(order: list[int]) -> None:
        for sample in webdataset.WebDataset(str(folder / "all.tar"), shardshuffle=False):
            load(sample["safetensors"])["latents"]

    return read


def _tar(path: Path) -> None:
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                file.read()


def _decode(count: int) -> None:
    buffer = io.BytesIO()
    noise = torch.nn.functional.interpolate(torch.randn(1, 3, 32, 32), size=512, mode="bicubic")[0]
    media.to_picture(noise).save(buffer, "JPEG", quality=90)
    for _ in range(count):
        media.fit(media.read_picture(buffer.getvalue()), 256, 256)


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
        places = opened.places(keys)
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
    sizes = [media.size_of(sample.source()) for sample in sources.open(data, captions="none").samples]
    for count in (1, 3, 5, 9):
        plan = buckets.choose(sizes, 256, 16, count)
        tell(measure="buckets", data=Path(data).name, shapes=len(plan.shapes), cut_off=plan.waste(sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", default="read", choices=("encode", "read", "index", "buckets"))
    parser.add_argument("--data", default="")
    parser.add_argument("--count", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "encode":
        measure_encode(given.data, given.count or 400)
    elif given.what == "read":
        measure_read(given.count or 4000)
    elif given.what == "index":
        measure_index(given.count or 10_000_000)
    else:
        measure_buckets(given.data)


if __name__ == "__main__":
    main()
