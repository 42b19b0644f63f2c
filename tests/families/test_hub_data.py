"""Laws of data sets on a Hub: the files that are asked for are read as a folder's, and nothing is run."""

import io

import pytest
from huggingface_hub import constants
from PIL import Image

from sfumato.data.settings import DataSettings
from sfumato.errors import Refused
from sfumato.workflow.dataset import collect

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402


def png(number: int) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (16, 16), (number * 20, 9, 9)).save(held, "PNG")
    return held.getvalue()


def table(words, image="image", caption="caption") -> bytes:
    """A Parquet file as the Hub keeps data sets: pictures as structs of bytes."""
    pictures = [{"bytes": png(number), "path": None} for number in range(len(words))]
    held = io.BytesIO()
    pq.write_table(pa.table({image: pictures, caption: list(words)}), held)
    return held.getvalue()


CARD = b"""---
configs:
- config_name: small
  data_files:
  - split: train
    path: small/train-*
  - split: test
    path: small/test-*
- config_name: large
  data_files:
  - split: train
    path: large/*.parquet
---
"""


@pytest.fixture
def cats(hub):
    hub.add(
        "acme/cats",
        {
            "README.md": CARD,
            "cats.py": b"raise SystemExit('it ran')",
            "small/train-00000.parquet": table(["a cat", "two cats"]),
            "small/test-00000.parquet": table(["a held out cat"]),
            "large/photos.parquet": table(["big cat"], image="photo", caption="title"),
        },
        kind="dataset",
    )
    return hub


def captions(given: str, **more):
    found = collect(DataSettings(train=given, **more))
    return {one.captions[0]: one.split for one in found.samples}


def test_a_config_its_splits_and_its_columns_are_read(cats):
    """Law: the card's configs; only the files that are asked for come; its script never."""
    assert captions("hf:acme/cats") == {"a cat": "train", "two cats": "train", "a held out cat": "held_out"}
    assert set(captions("hf:acme/cats?config=small&split=train")) == {"a cat", "two cats"}
    assert not [name for name in cats.fetched() if name.startswith("large") or name.endswith(".py")]
    assert list(captions("hf:acme/cats?config=large&image=photo&caption=title")) == ["big cat"]


def test_a_selection_that_is_not_there_is_refused_with_what_there_is(cats):
    """Law: config, split, column and key."""
    for given, sentence in {
        "hf:acme/cats?config=smal": r'no config "smal"\. Did you mean "small"',
        "hf:acme/cats?config=large&split=test": r'no split "test"',
        "hf:acme/cats?config=large": r"has no column image; it has photo, title",
        "hf:acme/cats?splitt=x": r'Did you mean "split"',
        "hf:acme": r"names no data set of the Hub",
        "hf:acme/dogs": r"acme/dogs is no folder here, and not at",
    }.items():
        with pytest.raises(Refused, match=sentence):
            captions(given)


def test_pictures_in_folders_and_webdataset_are_read_as_from_disk(hub, tmp_path, monkeypatch):
    """Law: train and validation folders, shards of tar; once read, also offline."""
    import tarfile

    hub.add(
        "acme/folders",
        {f"{side}/{n}.png": png(n) for n, side in enumerate(("train", "train", "validation"))}
        | {
            f"{side}/{n}.txt": f"number {n}".encode()
            for n, side in enumerate(("train", "train", "validation"))
        },
        kind="dataset",
    )
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        for name, content in (("0.png", png(3)), ("0.txt", b"of a shard")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    hub.add("acme/shards", {"shard-000.tar": held.getvalue()}, kind="dataset")
    expected = {"number 0": "train", "number 1": "train", "number 2": "held_out"}
    assert captions("hf:acme/folders") == expected
    assert list(captions("hf:acme/shards")) == ["of a shard"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert captions("hf:acme/folders") == expected
    with pytest.raises(Refused, match="was not read here before"):
        captions("hf:acme/cats")
