"""Random reads of the store beside LMDB, a file per sample, one safetensors file, and webdataset in order.

    python benchmarks/data_reading.py [--entry small|large] [--count N]

An entry is a latent and text states in bfloat16, and a read gives both as float32 tensors, whatever the way:
small, latent 4 × 16 × 16 and 16 × 384 text states (14 KB); large, 16 × 32 × 32 and 77 × 384 (90 KB). The
store may not remember captions here, as it does in training. cold: the files are dropped from the page cache
first. Prints one JSON line per measurement, samples a second of wall time; warm_cpu: of CPU time, which a
busy machine changes less.
"""

import argparse
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
import webdataset
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sfumato.data.encoding import encoded_dataset
from sfumato.data.encoding.encode import encode_to_store
from sfumato.data.encoding.views import EncodingOptions
from sfumato.data.sources.sample import Sample
from sfumato.data.store.store import Store

ENTRIES = {"small": ((4, 16, 16), (16, 384)), "large": ((16, 32, 32), (77, 384))}
Read = Callable[[int], tuple[Tensor, Tensor]]


def made(count: int, folder: Path, entry: str) -> encoded_dataset.EncodedDataset:
    """A store of `count` random entries."""
    latent, tokens = ENTRIES[entry]
    blank = Image.new("RGB", (8, 8))
    samples = [
        Sample(f"{i:06d}", (f"caption {i}",), content=str(i), picture=lambda: blank) for i in range(count)
    ]

    def texts(captions: list[str]) -> list[dict[str, Tensor]]:
        return [{"tokens": torch.randn(*tokens).bfloat16()} for _ in captions]

    def pixels(x: Tensor) -> Tensor:
        return torch.randn(len(x), *latent).bfloat16()

    return encode_to_store(Store(folder), samples, (8, 8), pixels, texts, EncodingOptions("p", "t", batch=64))


def ways(data: encoded_dataset.EncodedDataset, folder: Path, count: int) -> dict[str, Read]:
    """The same entries kept in each way, and what reads one of them."""
    rows = [data.read([index]) for index in range(count)]
    both = [
        {"latents": one.latents[0].bfloat16(), "tokens": one.conditions[0]["tokens"].bfloat16()}
        for one in rows
    ]
    (folder / "files").mkdir()
    (folder / "one").mkdir()
    for index, one in enumerate(both):
        save_file(one, folder / "files" / f"{index}.safetensors")
    save_file(
        {f"{i}/{k}": v for i, one in enumerate(both) for k, v in one.items()},
        folder / "one" / "all.safetensors",
    )
    with tarfile.open(folder / "all.tar", "w") as archive:
        for index in range(count):
            archive.add(folder / "files" / f"{index}.safetensors", f"{index}.safetensors")
    base = lmdb.open(str(folder / "lmdb"), map_size=1 << 34)
    with base.begin(write=True) as writing:
        for index in range(count):
            writing.put(str(index).encode(), (folder / "files" / f"{index}.safetensors").read_bytes())
    base.close()
    opened: dict[str, Any] = {}

    def kept(name: str, opens: Callable[[], Any]) -> Any:
        """A handle that each process opens for itself, once."""
        key = f"{name} {os.getpid()}"
        if key not in opened:
            opened[key] = opens()
        return opened[key]

    def ours(index: int) -> tuple[Tensor, Tensor]:
        batch = data.read([index])
        return batch.latents[0], batch.conditions[0]["tokens"]

    def a_file(index: int) -> tuple[Tensor, Tensor]:
        found = load_file(folder / "files" / f"{index}.safetensors")
        return found["latents"].float(), found["tokens"].float()

    def one_file(index: int) -> tuple[Tensor, Tensor]:
        file = kept("one", lambda: safe_open(folder / "one" / "all.safetensors", "pt"))
        return file.get_tensor(f"{index}/latents").float(), file.get_tensor(f"{index}/tokens").float()

    def from_lmdb(index: int) -> tuple[Tensor, Tensor]:
        reading = kept("lmdb", lambda: lmdb.open(str(folder / "lmdb"), readonly=True, lock=False).begin())
        found = load(reading.get(str(index).encode()))
        return found["latents"].float(), found["tokens"].float()

    return {"store": ours, "LMDB": from_lmdb, "one safetensors file": one_file, "file per sample": a_file}


class Reads(Dataset):
    """One random read an item; for DataLoader with workers."""

    def __init__(self, read: Read, order: list[int]) -> None:
        self.read, self.order = read, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.read(self.order[index])


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def rate(count: int, work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    begin = clock()
    work()
    return count / (clock() - begin)


def consume(items: Iterable[Any]) -> None:
    for _ in items:
        pass


def tell(**facts: Any) -> None:
    print(
        json.dumps({name: round(v, 1) if isinstance(v, float) else v for name, v in facts.items()}),
        flush=True,
    )


def measure(entry: str, count: int) -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as place:
        folder = Path(place)
        data = made(count, folder / "store", entry)
        order = np.random.default_rng(0).permutation(count).tolist()
        where = {"store": "store", "LMDB": "lmdb", "one safetensors file": "one", "file per sample": "files"}
        encoded_dataset.REMEMBERED = 0
        data._texts.clear()
        for way, read in ways(data, folder, count).items():

            def alone(read: Read = read) -> None:
                for index in order:
                    read(index)

            for workers in (1, 2):  # before this process opens anything itself: LMDB forbids more
                loader = DataLoader(Reads(read, order), batch_size=64, num_workers=workers)
                found = max(rate(count, lambda loader=loader: consume(loader)) for _ in "12")
                tell(measure="read", entry=entry, way=way, workers=workers, warm=found)
            if way == "store":  # what is mapped stays in the page cache
                pictures = {one.path for item in data.items for one in item.pictures}
                for path in pictures | {one.path for one in data.written.values()}:
                    data.store.release(path)
            forget(folder / where[way])
            cold = rate(count, alone)
            warm = max(rate(count, alone) for _ in "123")
            spent = max(rate(count, alone, time.process_time) for _ in "123")
            tell(measure="read", entry=entry, way=way, cold=cold, warm=warm, warm_cpu=spent)
        batches = [order[at : at + 64] for at in range(0, count - 63, 64)]
        warm = max(rate(64 * len(batches), lambda: consume(map(data.read, batches))) for _ in "123")
        tell(measure="read", entry=entry, way="store, batches of 64", warm=warm)
        for workers in (0, 1, 2):
            tell(
                measure="read",
                entry=entry,
                way="webdataset, in order",
                workers=workers,
                warm=_tar(folder, count, workers),
            )


def _tar(folder: Path, count: int, workers: int) -> float:
    """Samples a second of the tar through webdataset; with workers each reads its part of two tars."""

    def both(sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
        found = load(sample["safetensors"])
        return found["latents"].float(), found["tokens"].float()

    tars = [str(folder / "all.tar")] * max(1, workers)
    data = webdataset.WebDataset(tars, shardshuffle=False).map(both)
    if not workers:
        return rate(count, lambda: consume(data))
    return rate(count * len(tars), lambda: consume(DataLoader(data, batch_size=64, num_workers=workers)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entry", default="large", choices=ENTRIES)
    parser.add_argument("--count", type=int, default=2000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    measure(given.entry, given.count)


if __name__ == "__main__":
    main()
