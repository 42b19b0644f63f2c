"""Validation and test pictures are never trained on, whatever kind of source holds them."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import ipc, parquet

from sfumato.data.sources import folder, splits
from sfumato.data.sources.sample import HELD_OUT, TRAIN
from sfumato.errors import Refused


def png(level=0):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (level % 256, 40, 80)).save(buffer, "PNG")
    return buffer.getvalue()


def put(root, name, caption=""):
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(len(name) * 7))
    if caption:
        file.with_suffix(".txt").write_text(caption)


def tar(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name in names:
            for member, data in ((f"{name}.png", png()), (f"{name}.txt", f"thing {name}".encode())):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def rows(count):
    return pyarrow.table(
        {"image": [png(i) for i in range(count)], "text": [f"thing {i}" for i in range(count)]}
    )


def table(path, count):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(rows(count), path)


def arrow(path, count):
    path.parent.mkdir(parents=True, exist_ok=True)
    with ipc.new_stream(str(path), rows(count).schema) as writer:
        writer.write_table(rows(count))


def described(root, place, count):
    for index in range(count):
        put(root, f"{place}/{index}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"{place} {i}"}) for i in range(count)]
    (root / place / "metadata.jsonl").write_text("\n".join(lines))


def saved(root, place, count):
    arrow(root / place / "data-00000-of-00001.arrow", count)
    (root / place / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    )
    (root / "dataset_dict.json").write_text('{"splits": []}')


SOURCES = {
    "texts beside": lambda root, split, count: [
        put(root, f"{split}/{i}.png", f"{split} {i}") for i in range(count)
    ],
    "folders below": lambda root, split, count: [
        put(root, f"some/{split}/deep/{i}.png", f"{split} {i}") for i in range(count)
    ],
    "metadata": described,
    "shards": lambda root, split, count: tar(
        root / f"{split}-000000.tar", [f"{i:03d}" for i in range(count)]
    ),
    "shards in folders": lambda root, split, count: tar(
        root / split / "0.tar", [f"{i:03d}" for i in range(count)]
    ),
    "members of one shard": lambda root, split, count: tar(
        root / f"{split} part.tar", [f"{split}/{i:03d}" for i in range(count)]
    ),
    "tables": lambda root, split, count: table(root / "data" / f"{split}-00000-of-00001.parquet", count),
    "tables in folders": lambda root, split, count: table(root / "default" / split / "0000.parquet", count),
    "arrays": lambda root, split, count: np.savez(
        root / f"{split}.npz", x=np.zeros((count, 8, 8, 3), np.uint8), labels=np.zeros(count, int)
    ),
    "saved": saved,
}


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "test"])
@pytest.mark.parametrize("source", SOURCES)
def test_what_lies_in_a_held_out_part_is_held_out(source, name, tmp_path):
    """Law: all of it, and nothing of train."""
    SOURCES[source](tmp_path, "train", 30)
    SOURCES[source](tmp_path, name, 6)
    found = folder.open_collection(tmp_path)
    assert Counter(one.split for one in found.samples) == {TRAIN: 30, HELD_OUT: 6}
    assert all(f"{name}" in one.name for one in found.with_split(HELD_OUT))


@pytest.mark.parametrize(
    "names", [("train", "test"), ("train2017", "val2017"), ("Training Set", "Validation Set")]
)
def test_classes_lie_below_the_splits(names, tmp_path):
    """Law: train/cat and test/cat are one class, cat; its pictures keep their sides."""
    for split in names:
        for index in range(3):
            put(tmp_path, f"{split}/cat/{index}.png")
            put(tmp_path, f"{split}/dog/{index}.png")
    found = folder.open_collection(tmp_path, captions="folder")
    assert found.classes == ["cat", "dog"]
    assert Counter((one.captions, one.label, one.split) for one in found.samples) == {
        ((name,), label, split): 3 for label, name in enumerate(found.classes) for split in (TRAIN, HELD_OUT)
    }


def test_a_class_may_be_called_train_or_test(tmp_path):
    """Law: beside folders that are no splits, and alone, a folder's name is a class."""
    for name in ("train", "plane", "test tube", "test"):
        put(tmp_path / "a", f"{name}/1.png")
    found = folder.open_collection(tmp_path / "a", captions="folder", held_out=0)
    assert found.classes == ["plane", "test", "test tube", "train"]
    put(tmp_path / "b", "train/1.png")
    put(tmp_path / "b", "ship/1.png")
    assert folder.open_collection(tmp_path / "b", captions="folder").classes == ["ship", "train"]
    put(tmp_path / "c", "train/1.png")
    assert folder.open_collection(tmp_path / "c", captions="folder").classes == ["train"]
    for name in ("train", "test"):
        put(tmp_path / "d", f"{name}/1.png")
    with pytest.raises(Refused, match="no folders inside"):
        folder.open_collection(tmp_path / "d", captions="folder")


def test_a_lone_train_folder_says_nothing_of_what_is_held_out(tmp_path):
    """Law: then `data.held_out` decides, as without folders; and a column `split` is above a path."""
    for index in range(80):
        put(tmp_path / "a", f"train/{index}.png", f"thing {index}")
    found = folder.open_collection(tmp_path / "a", held_out=0.2)
    assert 4 <= len(found.with_split(HELD_OUT)) <= 32
    for place in ("train", "val"):
        put(tmp_path / "b", f"{place}/1.png")
    lines = [
        {"file_name": "train/1.png", "text": "a", "split": "test"},
        {"file_name": "val/1.png", "text": "b", "split": "train"},
    ]
    (tmp_path / "b" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    told = folder.open_collection(tmp_path / "b")
    assert {one.name: one.split for one in told.samples} == {"train/1.png": HELD_OUT, "val/1.png": TRAIN}


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("validation/cat/1.png", HELD_OUT),
        ("coco/val2017/1.jpg", HELD_OUT),
        ("valid_64x64/1.png", HELD_OUT),
        ("Held-Out/1.png", HELD_OUT),
        ("train-images/1.png", TRAIN),
        ("train/test/1.png", TRAIN),
        ("birds-test-003.tar/1.png", HELD_OUT),
        ("shard-1.tar/val/1.png", HELD_OUT),
        ("data/validation-00000-of-00001.parquet", HELD_OUT),
        ("default/dev/0000.parquet", HELD_OUT),
        ("test tube/1.png", ""),
        ("contest/1.png", ""),
        ("test.png", ""),
        ("devices/valley/1.png", ""),
    ],
)
def test_a_path_says_its_split(path, split):
    """Law: whole words of folders and shards, never the name of a picture."""
    assert splits.splits_of([path])[0][0] == split


def test_a_saved_set_is_what_its_state_lists(tmp_path):
    """Law: caches that .map() and .shuffle() leave beside it are no samples, and are named."""
    arrow(tmp_path / "data-00000-of-00001.arrow", 10)
    arrow(tmp_path / "cache-1f2e3d.arrow", 10)
    with ipc.new_stream(
        str(tmp_path / "cache-indices.arrow"), pyarrow.schema([("indices", pyarrow.uint64())])
    ) as to:
        to.write_table(pyarrow.table({"indices": pyarrow.array(range(10), pyarrow.uint64())}))
    (tmp_path / "dataset_info.json").write_text("{}")
    state = {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}, {"filename": "data-00001-of-00002.arrow"}]
    }
    (tmp_path / "state.json").write_text(json.dumps(state))
    found = folder.open_collection(tmp_path)
    assert len(found.samples) == 10 and all(one.name.startswith("data-0") for one in found.samples)
    assert {one.file: one.reason for one in found.set_aside} == {
        "cache-1f2e3d.arrow": "a cache of the datasets library, no part of the saved set",
        "cache-indices.arrow": "a cache of the datasets library, no part of the saved set",
        "data-00001-of-00002.arrow": "state.json lists it, but it is not there",
    }
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(Refused, match="not what save_to_disk writes"):
        folder.open_collection(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    assert len(folder.open_collection(tmp_path).samples) == 10
