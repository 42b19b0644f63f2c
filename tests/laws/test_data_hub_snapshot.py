"""A snapshot of the Hub's cache is read: its links end in its own repository's blobs, and nowhere else."""

import io
import tarfile

import pytest
from PIL import Image

from sfumato.data.sources import folder
from sfumato.errors import Refused


def picture(color):
    """A small PNG."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


def shard():
    """A tar of one captioned picture."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in (("0.png", picture("red")), ("0.txt", b"a red square")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def parquet():
    """A table of one captioned picture."""
    pyarrow, file = pytest.importorskip("pyarrow"), io.BytesIO()
    rows = [{"image": {"bytes": picture("red"), "path": "0.png"}, "caption": "a red square"}]
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


FILES = {
    "folder": {"0.png": picture("red"), "0.txt": b"a red square"},
    "table": {
        "0.png": picture("red"),
        "metadata.jsonl": b'{"file_name": "0.png", "caption": "a red square"}',
    },
    "parquet": {"train.parquet": parquet()},
    "tar": {"train-000.tar": shard()},
}


def snapshot(cache, files, repository="datasets--ann--squares"):
    """A snapshot as huggingface_hub lays it out."""
    blobs, place = cache / repository / "blobs", cache / repository / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    place.mkdir(parents=True)
    for number, (name, content) in enumerate(files.items()):
        (blobs / f"b{number}").write_bytes(content)
        (place / name).symlink_to(f"../../blobs/b{number}")
    return place


@pytest.mark.parametrize("kind", FILES)
def test_a_snapshot_is_read_through_its_links(kind, tmp_path):
    found = folder.open_collection(snapshot(tmp_path, FILES[kind]))
    assert [one.captions for one in found.samples] == [("a red square",)] and not found.set_aside


@pytest.mark.parametrize("kind", FILES)
def test_a_link_to_another_repository_is_refused(kind, tmp_path):
    other = snapshot(tmp_path, FILES[kind], "datasets--eve--other")
    place = snapshot(tmp_path, {})
    for file in other.iterdir():
        (place / file.name).symlink_to(file.resolve())
    with pytest.raises(Refused):
        folder.open_collection(place)
