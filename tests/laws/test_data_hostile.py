"""A folder of hostile files: each is read correctly or set aside with a reason; nothing leaves the folder."""

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from sfumato.data import dataset_report
from sfumato.data.encoding import views
from sfumato.data.encoding.views import EncodingOptions
from sfumato.data.sources import folder as sources_folder
from sfumato.data.sources import metadata
from sfumato.errors import Refused
from sfumato.readers import media
from sfumato.report import data_page

RED = (200, 30, 40)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def png_head(width, height, tail=b""):
    """A PNG that claims a size without having the pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + tail + chunk(b"IEND", b"")


def whole_png(size=24):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), RED).save(buffer, "PNG")
    return buffer.getvalue()


READABLE = {
    "palette with a clear color": lambda p: save(p, clear_palette()),
    "alpha": lambda p: save(p, Image.new("RGBA", (20, 20), (0, 0, 0, 0))),
    "grey with alpha": lambda p: save(p, Image.new("LA", (20, 20), (0, 0))),
    "one bit": lambda p: save(p, Image.new("1", (20, 20), 1)),
    "sixteen bits": lambda p: save(p, Image.fromarray(np.full((20, 20), 65535, np.uint16))),
    "cmyk": lambda p: save(p.with_suffix(".jpg"), Image.new("CMYK", (20, 20), (0, 0, 0, 0))),
    "float tiff": lambda p: save(p.with_suffix(".tiff"), Image.fromarray(np.ones((20, 20), np.float32))),
    "animated": lambda p: save(
        p.with_suffix(".gif"),
        Image.new("RGB", (20, 20), "white"),
        save_all=True,
        append_images=[Image.new("RGB", (20, 20), "black")],
    ),
    "broken profile": lambda p: save(
        p, Image.new("RGB", (20, 20), "white"), icc_profile=b"no profile at all"
    ),
    "wrong extension": lambda p: save(
        p.with_suffix(".jpg"), Image.new("RGB", (20, 20), "white"), format="PNG"
    ),
}


def clear_palette():
    image = Image.new("P", (20, 20), 0)
    image.putpalette([0, 0, 0] * 256)
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize("kind", READABLE)
def test_every_kind_of_white_is_read_as_white(kind, tmp_path):
    file = READABLE[kind](tmp_path / "picture.png") or tmp_path / "picture.png"
    picture = media.read_picture(file)
    assert picture.mode == "RGB" and picture.size == (20, 20)
    assert np.asarray(picture).min() >= 253


@pytest.mark.parametrize("turn", range(1, 9))
def test_an_exif_turn_is_undone_and_its_size_known_from_the_head(turn, tmp_path):
    upright = Image.new("RGB", (30, 20), "white")
    upright.paste((0, 0, 0), (0, 0, 10, 10))  # black in the upper left corner
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    lying = upright.transpose(Image.Transpose(back[turn])) if turn > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = turn
    file = save(tmp_path / "turned.png", lying, exif=exif)
    assert media.size_of(file) == (30, 20)
    np.testing.assert_array_equal(np.asarray(media.read_picture(file)), np.asarray(upright))


BROKEN = {
    "empty.png": b"",
    "text.png": b"this is no picture",
    "truncated.png": whole_png()[:60],
    "bomb.png": png_head(60_000, 60_000),
    "thirty thousand.png": png_head(30_000, 30_000),
    "claims.png": png_head(500, 500),
    "strip.png": None,
    "dot.png": None,
    "nan.tiff": None,
    "html.jpg": b"<html><body>404</body></html>",
    "gif.gif": b"GIF89a\xff\xff\xff\xff\x00\x00\x00",
    "half.webp": b"RIFF\x10\x00\x00\x00WEBPVP8 \x00",
    "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n",
    "inf.tiff": None,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_usable_picture_has_a_reason(name, tmp_path):
    file = tmp_path / name
    if name in ("nan.tiff", "inf.tiff"):
        save(file, Image.fromarray(np.full((20, 20), float(name[:3]), np.float32)))
    elif BROKEN[name] is None:
        save(file, Image.new("RGB", (1, 900) if name == "strip.png" else (1, 1)))
    else:
        file.write_bytes(BROKEN[name])
    with pytest.raises(media.Unreadable) as told:
        media.read_picture(file)
    assert 5 < len(str(told.value)) < 200 and "\n" not in str(told.value)


@pytest.fixture
def folder(tmp_path):
    """A data folder with two good pictures, and secrets beside it."""
    root = tmp_path / "data"
    (tmp_path / "secrets").mkdir()
    save(tmp_path / "secrets" / "secret.png", Image.new("RGB", (20, 20), RED))
    for name in ("a", "b"):
        save(root / f"{name}.png", Image.new("RGB", (20, 20), RED))
    return root


def table(root, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (root / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")


def reasons(collection):
    return {one.file: one.reason for one in collection.set_aside}


@pytest.mark.parametrize(
    "name",
    ["../secrets/secret.png", "sub/../../secrets/secret.png", "/etc/hostname", "link.png", "out/secret.png"],
)
def test_no_path_leaves_the_data_folder(name, folder):
    (folder / "link.png").symlink_to(folder.parent / "secrets" / "secret.png")
    (folder / "out").symlink_to(folder.parent / "secrets")
    table(folder, [{"file_name": "a.png", "caption": "a"}, {"file_name": name, "caption": "secret"}])
    found = sources_folder.open_collection(folder)
    assert reasons(found)[name] == "refused: outside the data folder"
    assert [sample.name for sample in found.samples] == ["a.png"]
    everything = sources_folder.open_collection(folder, captions="none")
    assert all("secret" not in str(sample.file.resolve()) for sample in everything.samples)


def test_links_within_the_folder_are_followed_and_loops_do_no_harm(folder):
    (folder / "again.png").symlink_to(folder / "a.png")
    (folder / "loop").symlink_to(folder)
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    found = sources_folder.open_collection(folder, captions="none")
    assert [sample.name for sample in found.samples] == ["a.png", "again.png", "b.png"]
    assert set(reasons(found)) == {"self.png", "gone.png", "pipe.png"}


ROWS = {
    "empty caption": ({"file_name": "b.png", "caption": "  "}, "b.png", "its caption is empty"),
    "no caption": ({"file_name": "b.png", "caption": None}, "b.png", "no caption"),
    "nan caption": ('{"file_name": "b.png", "caption": NaN}', "b.png", "no caption"),
    "number": ({"file_name": "b.png", "caption": 7}, "b.png", "its caption is no text"),
    "not utf-8": ('{"file_name": "b.png", "caption": "caf\udce9"}', "b.png", "its caption is not UTF-8 text"),
    "missing": ({"file_name": "c.png", "caption": "c"}, "c.png", "there is no such file"),
    "no file": ({"caption": "c"}, "metadata.jsonl:2", "the row names no file"),
    "no json": ("{broken", "metadata.jsonl:2", "the line is not a JSON object"),
    "unknown split": (
        {"file_name": "b.png", "caption": "b", "split": "later"},
        "b.png",
        'its split "later" is none of',
    ),
    "null byte": ({"file_name": "b\0.png", "caption": "b"}, "b\\x00.png", "the row names no file"),
    "very long name": ({"file_name": "x" * 5000, "caption": "b"}, "x" * 5000, "a link that leads nowhere"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_bad_row_is_set_aside_with_its_reason_and_the_others_stay(kind, folder):
    row, file, reason = ROWS[kind]
    table(folder, [{"file_name": "a.png", "caption": "fine"}, row])
    found = sources_folder.open_collection(folder)
    assert [sample.name for sample in found.samples] == ["a.png"]
    assert reasons(found)[file].startswith(reason)


def test_repeated_rows_give_one_sample_with_all_captions(folder):
    row = {"file_name": "a.png", "caption": "one"}
    table(
        folder, [row, row, {"file_name": "a.png", "caption": "two"}, {"file_name": "b.png", "caption": "b"}]
    )
    found = sources_folder.open_collection(folder)
    assert [sample.captions for sample in found.samples] == [("one", "two"), ("b",)]
    assert "listed 2 times" in reasons(found)["a.png"]


def test_strange_names_are_kept_and_can_be_printed(folder):
    names = ("ünïcode 🦊", "new\nline", " space ", "\u202eturned", os.fsdecode(b"caf\xe9"))
    for name in names:
        save(folder / f"{name}.png", Image.new("RGB", (20, 20), RED))
        (folder / f"{name}.txt").write_text("words")
    (folder / "a.txt").write_text("a")
    found = dataset_report.report(sources_folder.open_collection(folder))
    assert found.summary["samples"] == 6
    json.dumps(found.summary).encode()
    shown = [metadata.printable(name) for name in names]
    assert shown == ["ünïcode 🦊", "new\\nline", " space ", "\\u202eturned", "caf\\xe9"]
    data_page.render(found.summary, found.sheets, found.twins).encode()


def test_one_picture_without_caption_is_set_aside_but_all_are_refused(folder):
    (folder / "a.txt").write_text("words", encoding="utf-8-sig")
    found = sources_folder.open_collection(folder)
    assert found.samples[0].captions == ("words",) and "b.png" in reasons(found)
    (folder / "a.txt").unlink()
    with pytest.raises(Refused, match=r'2 pictures but no captions.*"folder".*"none"'):
        sources_folder.open_collection(folder)


def test_a_report_is_made_even_if_every_file_was_set_aside(folder):
    table(folder, [{"file_name": "a.png", "caption": ""}, {"file_name": "../x.png", "caption": "x"}])
    (folder / "b.png").unlink()
    with pytest.raises(Refused, match="all 2 pictures were set aside"):
        sources_folder.open_collection(folder)
    told = dataset_report.report(sources_folder.open_collection(folder, empty=True))
    assert told.summary["samples"] == 0 and len(told.summary["set_aside"]) == 2
    assert "its caption is empty" in data_page.render(told.summary, told.sheets, told.twins)


def test_nothing_no_folder_no_pictures_no_column_are_refused(folder, tmp_path):
    with pytest.raises(Refused, match="does not exist"):
        sources_folder.open_collection(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match="no pictures"):
        sources_folder.open_collection(tmp_path / "empty")
    table(folder, [{"file_name": "a.png", "description": "a"}])
    with pytest.raises(Refused, match=r'no column of captions: it has file_name, description.*"caption"'):
        sources_folder.open_collection(folder)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("name,caption\na.png,a\n")
    with pytest.raises(Refused, match=r'no column of files: it has name, caption.*"file_name"'):
        sources_folder.open_collection(folder)
    with pytest.raises(Refused, match="no folders inside"):
        sources_folder.open_collection(folder, captions="folder")
    with pytest.raises(Refused, match="not known"):
        sources_folder.open_collection(folder, captions="fils")


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "txt", "json", "tar"])
def test_all_forms_of_captions_say_the_same(form, folder):
    rows = [{"file_name": "a.png", "caption": 'a "red", thing'}, {"file_name": "b.png", "caption": "blau ☂"}]
    if form == "jsonl":
        table(folder, rows)
    elif form == "csv":
        import csv

        with (folder / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "caption"])
            writer.writeheader()
            writer.writerows(rows)
    elif form == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        arrow = pytest.importorskip("pyarrow")
        parquet.write_table(arrow.Table.from_pylist(rows), folder / "metadata.parquet")
    else:
        for row in rows:
            text = row["caption"] if form != "json" else json.dumps({"caption": row["caption"]})
            (folder / row["file_name"]).with_suffix(".json" if form == "json" else ".txt").write_text(text)
    if form == "tar":
        with tarfile.open(folder.parent / "shard.tar", "w") as archive:
            archive.add(folder, "things")
        folder = folder.parent / "shard.tar"
    found = sources_folder.open_collection(folder)
    assert [sample.captions[0] for sample in found.samples] == [row["caption"] for row in rows]
    assert all(media.read_picture(sample.source()).size == (20, 20) for sample in found.samples)


def test_a_tar_that_names_outside_files_gives_only_what_it_holds(tmp_path):
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        for name, data in (("../../evil.png", whole_png()), ("../../evil.txt", b"evil")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    (tmp_path / "cut.tar").write_bytes((tmp_path / "evil.tar").read_bytes()[:700])
    found = sources_folder.open_collection(tmp_path)
    assert [sample.captions for sample in found.samples] == [("evil",)]
    assert not (tmp_path.parent.parent / "evil.png").exists()


@pytest.mark.parametrize("form", ["beside", "folder", "none", "npz", "tar"])
def test_every_source_has_a_held_out_part(form, tmp_path):
    place = tmp_path / "things"
    for index in range(80):
        file = place / f"class {index % 4}" / f"{index}.png"
        save(file, Image.new("RGB", (8, 8), RED))
        file.with_suffix(".txt").write_text(f"thing {index}")
    if form == "npz":
        place = tmp_path / "digits.npz"
        np.savez(place, images=np.zeros((80, 8, 8), np.uint8), labels=np.arange(80) % 4)
    if form == "tar":
        with tarfile.open(tmp_path / "all.tar", "w") as archive:
            archive.add(place, "things")
        place = tmp_path / "all.tar"
    found = sources_folder.open_collection(
        place, captions=form if form in ("folder", "none") else "files", held_out=0.2
    )
    assert 4 <= len(found.with_split("held_out")) <= 32
    assert len(found.with_split("train")) + len(found.with_split("held_out")) == 80


def test_an_npz_of_objects_is_refused_and_one_of_pictures_is_read(tmp_path):
    np.savez(tmp_path / "objects.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(Refused, match="plain arrays"):
        sources_folder.open_collection(tmp_path / "objects.npz", captions="folder")
    images = np.zeros((5, 12, 12), np.uint8)
    np.savez(tmp_path / "digits.npz", images=images, labels=np.arange(5), classes=np.array(list("vwxyz")))
    found = sources_folder.open_collection(tmp_path / "digits.npz", captions="folder")
    assert [sample.captions[0] for sample in found.samples] == list("vwxyz")
    assert [sample.label for sample in found.samples] == [0, 1, 2, 3, 4]


def test_folders_are_classes(tmp_path):
    for name in ("red_apple/1.png", "red_apple/2.png", "pear/1.png", "stray.png"):
        save(tmp_path / name, Image.new("RGB", (20, 20), RED))
    found = sources_folder.open_collection(tmp_path, captions="folder")
    assert [(sample.captions[0], sample.label) for sample in found.samples] == [
        ("pear", 0), ("red apple", 1), ("red apple", 1)
    ]  # fmt: skip
    assert reasons(found) == {"stray.png": "it lies in no class folder"}


def test_a_caption_is_never_on_both_sides_and_a_split_column_is_honored(tmp_path):
    rows = []
    for index in range(120):
        save(tmp_path / f"{index}.png", Image.new("RGB", (8, 8), RED))
        rows.append(
            {"file_name": f"{index}.png", "caption": [f"thing {index % 60}", f"alias {index // 2 % 50}"]}
        )
    table(tmp_path, rows)
    found = sources_folder.open_collection(tmp_path, held_out=0.3)
    sides = {side: {c for s in found.with_split(side) for c in s.captions} for side in ("train", "held_out")}
    assert sides["train"] and not sides["train"] & sides["held_out"]
    table(tmp_path, [{**row, "split": "validation" if i < 7 else "train"} for i, row in enumerate(rows)])
    assert len(sources_folder.open_collection(tmp_path).with_split("held_out")) == 7


def test_the_report_counts_what_is_there_and_names_what_is_not(folder):
    for name, data in BROKEN.items():
        if data is not None:
            (folder / name).write_bytes(data)
            (folder / name).with_suffix(".txt").write_text("broken")
    (folder / "a.txt").write_text("same <b>words</b>")
    (folder / "b.txt").write_text("other words")
    told = dataset_report.report(sources_folder.open_collection(folder))
    summary = told.summary
    assert summary["samples"] == 2 and summary["captions"] == 2
    assert {one["file"] for one in summary["set_aside"]} >= {name for name, data in BROKEN.items() if data}
    assert all(one["reason"] for one in summary["set_aside"])
    assert summary["equal_pictures"] == [["a.png", "b.png"]]
    page = data_page.render(told.summary, told.sheets, told.twins)
    assert "://" not in page and page.count("<script") == 1 and "<b>words" not in page
    assert "empty.png" in page


def test_companions_stay_in_the_folder_and_are_no_samples_themselves(folder):
    rows = [
        {"file_name": "a.png", "caption": "a", "conditioning_image": "b.png", "mask": "not a picture"},
        {"file_name": "c.png", "caption": "c", "control_file_name": "../secrets/secret.png"},
    ]
    save(folder / "c.png", Image.new("RGB", (20, 20), RED))
    table(folder, rows)
    found = sources_folder.open_collection(folder)
    (sample,) = found.samples
    assert sample.companions == {"control": folder / "b.png"} and sample.extra["mask"] == "not a picture"
    assert reasons(found) == {"c.png": "its control ../secrets/secret.png: refused: outside the data folder"}


def claims(path, shape):
    """An .npz whose array claims a shape without having the numbers."""
    with zipfile.ZipFile(path, "w") as file:
        head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        file.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode())


def cells(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)


def cut(path, **columns):
    cells(path, **columns)
    path.write_bytes(path.read_bytes()[:-20])


ARRAYS = np.zeros((4, 8, 8, 3), np.uint8)
ARCHIVES = {
    "claims.npz": (lambda path: claims(path, (10**6, 10**4, 10**4, 3)), "no .npz"),
    "channels.npz": (lambda path: np.savez(path, x=ARRAYS.repeat(3, 3), labels=np.arange(4)), "no pictures"),
    "labels.npz": (lambda path: np.savez(path, x=ARRAYS, labels=np.array([0, 1, 2, 10**9])), "numbered"),
    "empty.npz": (lambda path: np.savez(path, x=ARRAYS[:0], labels=np.zeros(0, int)), "no pictures"),
    "columns.parquet": (lambda path: cells(path, a=[1, 2]), "no column image"),
    "cut.parquet": (lambda path: cut(path, image=[whole_png()], text=["a"]), "no Parquet"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_cannot_be_used_is_refused_in_a_sentence(name, tmp_path):
    make, why = ARCHIVES[name]
    make(tmp_path / name)
    with pytest.raises(Refused, match=why):
        sources_folder.open_collection(tmp_path / name)


def test_tables_of_pictures_are_read_and_what_they_lack_is_said(tmp_path):
    given = [whole_png(), None, b"no picture", whole_png()]
    cells(tmp_path / "test-0.parquet", image=given, text=["a", "b", "c", None], label=[0, 1, 2, 3])
    np.savez(tmp_path / "some.npz", x=ARRAYS, labels=np.array([-1, 0, 0, 1]))
    found = sources_folder.open_collection(tmp_path / "some.npz")
    assert [one.label for one in found.samples] == [0, 0, 1] and len(found.set_aside) == 1
    np.savez(tmp_path / "some.npz", x=ARRAYS, labels=np.array([3, 0, 0, 1], np.uint8))
    assert [one.label for one in sources_folder.open_collection(tmp_path / "some.npz").samples] == [
        3,
        0,
        0,
        1,
    ]
    (tmp_path / "some.npz").unlink()
    found = sources_folder.open_collection(tmp_path)
    assert [one.reason for one in found.set_aside] == ["no caption"]
    assert [(one.captions, one.label) for one in found.samples] == [(("a",), 0), (("b",), 1), (("c",), 2)]
    reasons = [views.plan_task(one, lambda size: size, EncodingOptions("x")) for one in found.samples]
    assert reasons[0].size == (24, 24)
    assert [one.reason[:19] for one in reasons[1:]] == ["there is no picture", "no picture in any k"]
