"""Nothing is ignored: what cannot be read is set aside with a true reason, within limits of memory."""

import io
import json
import tarfile
import tracemalloc
import unicodedata

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from sfumato.data import dataset_report
from sfumato.data.sources import archives, folder, metadata
from sfumato.errors import Refused
from sfumato.report import data_page


def png(level=0):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (level % 256, 40, 80)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(root, *names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number * 40))


def read(root, **options):
    """({name: captions}, {file: reason}) of a source."""
    found = folder.open_collection(root, **options)
    return {one.name: one.captions for one in found.samples}, {
        one.file: one.reason for one in found.set_aside
    }


# ---------------------------------------------------------------- tables of captions

COMMAS = "a red apple, on a table, at night"
ROWS = {
    "last column": ("file_name,caption", f"a.png,{COMMAS}", (COMMAS,)),
    "quoted": ("file_name,caption", f'a.png,"{COMMAS}"', (COMMAS,)),
    "quoted, with a column behind": ("file_name,caption,split", f'a.png,"{COMMAS}",train', (COMMAS,)),
    "cells that are empty": ("file_name,caption", "a.png,a pear,,", ("a pear",)),
    "inches": ("file_name,caption", 'a.png,a 5" nail, on wood', ('a 5" nail, on wood',)),
    "lines in quotes": ("file_name,caption", 'a.png,"a pear,\non a plate"', ("a pear, on a plate",)),
    "file behind": ("caption,file_name", f'"{COMMAS}",a.png', (COMMAS,)),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_caption_with_commas_is_whole(kind, tmp_path):
    """Law: whether it stands in quotation marks or in the last column."""
    head, row, captions = ROWS[kind]
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text(f"{head}\n{row}\n", encoding="utf-8")
    assert read(tmp_path) == ({"a.png": captions}, {})


ASIDE = {
    "a column behind": (
        "file_name,caption,label",
        f"b.png,{COMMAS},1",
        "b.png",
        "have commas in them into quotation",
    ),
    "file behind": (
        "caption,file_name",
        f"{COMMAS},b.png",
        "metadata.csv:3",
        "have commas in them into quotation",
    ),
    "never closed": (
        "file_name,caption",
        'b.png,"a pear',
        "metadata.csv:3",
        "quotation mark in it is not closed",
    ),
}


@pytest.mark.parametrize("kind", ASIDE)
def test_a_row_that_cannot_be_trusted_is_set_aside_alone(kind, tmp_path):
    """Law: the reason names the commas or the quotation mark, and the rows around it are read."""
    head, row, file, reason = ASIDE[kind]
    pictures(tmp_path, "a.png", "b.png", "c.png")
    good = {"a": "a.png,fine", "c": "c.png,good"}
    if head.startswith("caption"):
        good = {"a": "fine,a.png", "c": "good,c.png"}
    (tmp_path / "metadata.csv").write_text(f"{head}\n{good['a']}\n{row}\n{good['c']}\n", encoding="utf-8")
    samples, aside = read(tmp_path)
    assert samples == {"a.png": ("fine",), "c.png": ("good",)}
    assert reason in aside[file]


TABLES = {
    "semicolons": (b"file_name;caption\na.png;a pear\n", "separated by semicolons, not by commas"),
    "tabs": (b"file_name\tcaption\na.png\ta pear\n", "separated by tabs.*metadata.tsv"),
    "utf-16 with a mark": ("file_name,caption\na.png,a pear\n".encode("utf-16"), "is UTF-16, not UTF-8"),
    "utf-16 without": ("file_name,caption\na.png,a pear\n".encode("utf-16-le"), "is UTF-16, not UTF-8"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_of_another_form_is_refused_with_its_cause(kind, tmp_path):
    data, reason = TABLES[kind]
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_bytes(data)
    with pytest.raises(Refused, match=reason):
        folder.open_collection(tmp_path)


def test_a_text_beside_a_picture_says_what_is_wrong_with_it(tmp_path):
    """Law: UTF-16, paragraphs, and texts that are too long."""
    pictures(tmp_path, "a.png", "b.png", "c.png", "d.png", "e.png")
    (tmp_path / "a.txt").write_bytes("a red apple".encode("utf-16-le"))
    (tmp_path / "b.txt").write_bytes("ein Apfel".encode("utf-16"))
    (tmp_path / "c.txt").write_text("A first paragraph.\n\nA second one.\n")
    (tmp_path / "d.txt").write_text("one\ntwo\n")
    (tmp_path / "e.txt").write_text("word " * 250_000)
    samples, aside = read(tmp_path)
    assert samples == {"c.png": ("A first paragraph.", "A second one."), "d.png": ("one", "two")}
    assert aside["a.png"] == aside["b.png"] == "its caption file is UTF-16, not UTF-8: save it as UTF-8"
    assert aside["c.png"].startswith("its 2 lines are 2 captions")
    assert aside["e.png"] == "its caption file is longer than 1 MB"


def test_a_name_is_found_in_either_form_of_unicode_and_another_case_is_named(tmp_path):
    """Law: ü is ü, whether as one sign or as u and two dots; Photo.PNG is not photo.png."""
    apart = unicodedata.normalize("NFD", "apfel grün.png")
    pictures(tmp_path, apart, "Photo.PNG")
    whole = unicodedata.normalize("NFC", apart)
    assert whole != apart
    rows = [{"file_name": whole, "caption": "green"}, {"file_name": "photo.png", "caption": "photo"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples, aside = read(tmp_path)
    assert samples == {apart: ("green",)}
    assert aside["photo.png"] == "there is no such file, but Photo.PNG: large and small letters differ"


# ---------------------------------------------------------------- files of other kinds


def test_clips_and_pictures_of_kinds_that_are_not_read_are_named(tmp_path):
    """Law: each by its name, whatever lies beside it."""
    clips = ("mpg", "mpeg", "ts", "3gp", "wmv", "flv", "MTS", "m2ts", "ogv", "vob")
    endings = (*clips, "heic", "jxl", "tga", "exr", "zip", "tar", "parquet")
    pictures(tmp_path, "good.png")
    (tmp_path / "good.txt").write_text("fine")
    for ending in endings:
        (tmp_path / f"x.{ending}").write_bytes(b"x" * 100)
    samples, aside = read(tmp_path)
    assert set(samples) == {"good.png"} and set(aside) == {f"x.{ending}" for ending in endings}
    assert aside["x.ts"] == "not a kind that is read; save it as MP4"
    (tmp_path / "good.png").unlink()
    (tmp_path / "x.tar").unlink()
    (tmp_path / "x.parquet").unlink()
    with pytest.raises(Refused, match=r"no picture that is read.*save it as MP4"):
        folder.open_collection(tmp_path)


def test_a_folder_of_links_is_told_from_an_empty_one(tmp_path):
    """Law: as curated folders are made; a snapshot of no repository of the Hub is one of them."""
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number in range(3):
        (tmp_path / "blobs" / f"{number}").write_bytes(png(number))
        (snapshot / f"{number}.png").symlink_to(f"../../blobs/{number}")
    with pytest.raises(Refused, match=r"3 links that lead out of it.*Copy what they lead to"):
        folder.open_collection(snapshot)


# ---------------------------------------------------------------- shards


def shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


MEMBERS = {
    "a key with a dot": ({"cat v1.5.png": png(), "cat v1.5.txt": b"a cat"}, {"cat v1.5.png": ("a cat",)}, {}),
    "two views of one text": (
        {"dog.left.png": png(), "dog.right.png": png(9), "dog.txt": b"a dog"},
        {"dog.left.png": ("a dog",), "dog.right.png": ("a dog",)},
        {},
    ),
    "a further picture": (
        {"1.jpg": png(), "1.seg.png": png(9), "1.txt": b"one"},
        {"1.jpg": ("one",)},
        {"1.seg.png": "a further picture of 1.jpg; name it in data.condition_columns to use it"},
    ),
    "a second picture": (
        {"1.jpg": png(), "1.png": png(9), "1.txt": b"one"},
        {"1.png": ("one",)},
        {"1.jpg": "a second picture beside 1.png, which is used"},
    ),
    "a foreign picture": (
        {"1.heic": b"xx", "1.txt": b"a cat", "2.jpg": png(), "2.txt": b"two"},
        {"2.jpg": ("two",)},
        {"1.heic": "not a kind that is read; save it as PNG"},
    ),
    "no picture": (
        {"1.npy": b"xx", "1.txt": b"a cat", "2.jpg": png(), "2.txt": b"two"},
        {"2.jpg": ("two",)},
        {"1.npy": "there is no picture beside it: only .npy, .txt"},
    ),
    "further numbers of a sample": (
        {"1.jpg": png(), "1.txt": b"one", "1.meta.json": b"{}", "1.clip.npy": b"x"}, {"1.jpg": ("one",)}, {}
    ),
    "the picture's ending in the text's name": (
        {"1.jpg": png(), "1.jpg.txt": b"one", "2 v1.5.png": png(), "2 v1.5.png.txt": b"two"},
        {"1.jpg": ("one",), "2 v1.5.png": ("two",)},
        {},
    ),
    "a control": ({"1.jpg": png(), "1.control.png": png(9), "1.txt": b"one"}, {"1.jpg": ("one",)}, {}),
    "utf-16": (
        {"1.jpg": png(), "1.txt": "one".encode("utf-16"), "2.jpg": png(), "2.txt": b"two"},
        {"2.jpg": ("two",)},
        {"1.jpg": "its .txt is UTF-16, not UTF-8: save it as UTF-8"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MEMBERS)
def test_every_member_of_a_shard_is_used_or_named(kind, tmp_path):
    members, samples, aside = MEMBERS[kind]
    found = read(shard(tmp_path / "a.tar", members))
    assert found[0] == {f"a.tar/{name}": captions for name, captions in samples.items()}
    assert found[1] == {f"a.tar/{name}": reason for name, reason in aside.items()}


def test_a_huge_text_in_a_shard_is_not_read(tmp_path):
    """Law: a caption of two gigabytes and a class of 5,000 digits cost one sample each, and no memory."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in (
            ("1.png", png()),
            ("2.png", png()),
            ("2.txt", b"two"),
            ("3.png", png()),
            ("3.txt", b"3"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("3.cls")
        info.size = 5000
        archive.addfile(info, io.BytesIO(b"7" * 5000))
        info = tarfile.TarInfo("1.txt")
        info.size = 2 << 30
        archive.fileobj.write(info.tobuf())
        place = archive.fileobj.tell() + info.size
    with path.open("r+b") as file:
        file.truncate(place + 1024)  # sparse
    tracemalloc.start()
    samples, aside = read(path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert samples == {"a.tar/2.png": ("two",), "a.tar/3.png": ("3",)}
    assert aside == {"a.tar/1.png": "its .txt is longer than 1 MB"}
    _, aside = read(path, captions="folder", empty=True)
    assert aside["a.tar/3.png"] == "its .cls is a number of 5000 digits"


def test_an_npz_bomb_is_set_aside_before_it_unpacks(tmp_path, monkeypatch):
    """Law: the file, not the collection; nothing of it is unpacked."""
    monkeypatch.setattr(archives, "BOMB_BYTES", 1 << 20)
    np.savez(tmp_path / "good.npz", x=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(4))
    bomb = np.zeros((500, 100, 100), np.uint8)
    np.savez_compressed(tmp_path / "bomb.npz", x=bomb, labels=np.zeros(500, np.int64))
    (tmp_path / "torn.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:-40])
    tracemalloc.start()
    samples, aside = read(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()
    assert len(samples) == 4
    assert "decompression bomb" in aside["bomb.npz"] and "no .npz" in aside["torn.npz"]
    with pytest.raises(Refused, match="decompression bomb"):
        folder.open_collection(tmp_path / "bomb.npz")
    monkeypatch.setattr(archives.psutil, "virtual_memory", lambda: type("Free", (), {"available": 1000}))
    with pytest.raises(Refused, match="GB of memory are free"):
        folder.open_collection(tmp_path / "good.npz")


def test_a_huge_line_of_a_table_is_set_aside(tmp_path, monkeypatch):
    """Law: and the lines after it are read, in JSON lines and in CSV."""
    monkeypatch.setattr(metadata, "MOST_JSON", 5000)
    pictures(tmp_path / "a", "a.png", "b.png")
    rows = [{"file_name": "a.png", "caption": "x" * 9000}, {"file_name": "b.png", "caption": "b"}]
    (tmp_path / "a" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples, aside = read(tmp_path / "a")
    assert samples == {"b.png": ("b",)} and aside["metadata.jsonl:1"] == "the line is longer than 0.005 MB"
    pictures(tmp_path / "b", "a.png", "b.png")
    (tmp_path / "b" / "metadata.csv").write_text(f"file_name,caption\na.png,{'x' * 9000}\nb.png,b\n")
    samples, aside = read(tmp_path / "b")
    assert samples == {"b.png": ("b",)} and aside["metadata.csv:2"] == "the line is longer than 0.005 MB"


def test_a_page_is_made_of_a_folder_with_one_short_animation(tmp_path):
    """Law: charts all of whose rows are 0 are drawn too."""
    pictures(tmp_path, *(f"{i}.png" for i in range(4)))
    frames = [Image.new("L", (16, 16), 90 * i) for i in range(2)]
    frames[0].save(tmp_path / "short.gif", save_all=True, append_images=frames[1:], duration=50)
    for name in ("0", "1", "2", "3", "short"):
        (tmp_path / f"{name}.txt").write_text(name)
    told = dataset_report.report(folder.open_collection(tmp_path))
    assert told.summary["samples"] == 5 and told.summary["clips"]["count"] == 1
    assert not any(number for _, number in told.summary["clips"]["long_enough"][1:])
    for fps, frames in ((1000.0, 9), (8.0, 9)):
        told = dataset_report.report(folder.open_collection(tmp_path), frames=frames, fps=fps)
        assert "1 of them move" in data_page.render(told.summary, told.sheets, told.twins)


@pytest.mark.parametrize("own", ["tar", "npz", "parquet"])
def test_what_lies_beside_archives_is_named(own, tmp_path):
    """Law: pictures in folders below, archives of other kinds; hidden folders are not looked into."""
    if own == "tar":
        shard(tmp_path / "A.TAR", {"1.png": png(), "1.txt": b"one"})
    elif own == "npz":
        np.savez(tmp_path / "a.npz", x=np.zeros((1, 8, 8), np.uint8), labels=np.zeros(1, int))
    else:
        table = pyarrow.table({"image": [png()], "text": ["one"]})
        parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("more.zip", "shards.tar.gz", ".cache/hidden.tar", "film.mpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"xx")
    if own != "parquet":
        pictures(tmp_path, "below/stray.png")
    samples, aside = read(tmp_path)
    assert len(samples) == 1
    stray = set() if own == "parquet" else {"below/stray.png"}
    assert set(aside) == {"more.zip", "shards.tar.gz", "film.mpg"} | stray


def test_an_absolute_path_into_the_folder_is_read_and_one_out_of_it_is_not(tmp_path):
    """Law: where a file lies decides, not how its path is written."""
    pictures(tmp_path / "data", "a.png", "deep/b.png")
    pictures(tmp_path, "c.png")
    names = ("data/a.png", "data/deep/b.png", "c.png")
    rows = [{"file_name": str(tmp_path / name), "caption": name} for name in names]
    rows += [{"file_name": str(tmp_path / "data" / ".." / "c.png"), "caption": "around"}]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples, aside = read(tmp_path / "data")
    assert set(samples) == {"a.png", "deep/b.png"}
    assert set(aside.values()) == {"refused: outside the data folder"}
