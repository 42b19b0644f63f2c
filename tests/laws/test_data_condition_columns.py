"""Companions (control, mask, reference, …) are read from every source and reach the training batch."""

import io
import json
import tarfile
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_data_store import HOW, Encoder

from sfumato.data.encoding import encode
from sfumato.data.encoding.views import Companion
from sfumato.data.settings import DataSettings
from sfumato.data.sources import folder
from sfumato.data.sources.sample import Sample
from sfumato.data.store.store import Store
from sfumato.errors import Refused
from sfumato.theory import get
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.training.settings import TrainSettings
from sfumato.workflow import condition_encoders
from sfumato.workflow.dataset import collect

SIDE = 16


def picture(level, size=(SIDE, SIDE)):
    return Image.new("RGB", size, (level, 255 - level, 40))


def png(level):
    buffer = io.BytesIO()
    picture(level).save(buffer, "PNG")
    return buffer.getvalue()


def in_metadata(folder):
    rows = []
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(10 * i))
        (folder / f"edges{i}.png").write_bytes(png(100 + i))
        rows.append(
            {"file_name": f"{i}.png", "caption": f"number {i}", "conditioning_image": f"edges{i}.png"}
        )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def beside(folder):
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(10 * i))
        (folder / f"{i}.control.png").write_bytes(png(100 + i))
        (folder / f"{i}.txt").write_text(f"number {i}")
    return folder


def in_a_tar(folder):
    with tarfile.open(folder / "a.tar", "w") as archive:
        for i in range(3):
            for name, data in (
                (f"{i}.png", png(10 * i)),
                (f"{i}.control.png", png(100 + i)),
                (f"{i}.txt", f"number {i}".encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder / "a.tar"


def in_arrays(folder):
    both = {
        name: np.stack([np.asarray(picture(first + step * i)) for i in range(3)])
        for name, first, step in (("control", 100, 1), ("pictures", 0, 10))
    }
    np.savez(folder / "a.npz", **both, captions=np.array([f"number {i}" for i in range(3)]))
    return folder / "a.npz"


def in_a_table(folder):
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table(
        {
            "image": [{"bytes": png(10 * i), "path": ""} for i in range(3)],
            "conditioning_image": [{"bytes": png(100 + i), "path": ""} for i in range(3)],
            "text": [f"number {i}" for i in range(3)],
        }
    )
    with (
        arrow.OSFile(str(folder / "data-00000.arrow"), "wb") as file,
        arrow.ipc.new_stream(file, table.schema) as stream,
    ):
        stream.write_table(table)
    (folder / "state.json").write_text("{}")
    (folder / "dataset_info.json").write_text("{}")
    return folder


FORMS = {one.__name__: one for one in (in_metadata, beside, in_a_tar, in_arrays, in_a_table)}


def encoded(samples, root, **given):
    look = Encoder().look
    given.setdefault("companions", {"control": Companion(look, "codec-1")})
    return encode.encode_to_store(Store(root), samples, (SIDE, SIDE), look, Encoder().hear, HOW, **given)


@pytest.mark.parametrize("form", FORMS)
def test_every_source_gives_companions(form, tmp_path):
    (tmp_path / "data").mkdir()
    found = folder.open_collection(FORMS[form](tmp_path / "data"), held_out=0)
    assert len(found.samples) == 3 and not found.set_aside
    assert [one.captions for one in found.samples] == [(f"number {i}",) for i in range(3)]
    batch = encoded(found.samples, tmp_path / "store").read(range(3))
    reds = ((batch.companions["control"][:, 0].mean((1, 2)) + 1) * 127.5).round().tolist()
    assert reds == [100, 101, 102]
    assert torch.equal(batch.conditions[1]["control"], batch.companions["control"][1])


def test_a_column_of_ones_own_is_a_companion_when_it_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2))
    (tmp_path / "metadata.csv").write_text("file_name,caption,scribble\na.png,words,b.png\n")
    (sample,) = folder.open_collection(tmp_path, held_out=0, companions=["scribble"]).samples
    assert sample.companions == {"scribble": tmp_path / "b.png"}


def test_classes_in_words_are_numbered(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(png(1))
    (tmp_path / "metadata.csv").write_text("file_name,caption,class\na.png,x,dog\nb.png,y,cat\nc.png,z,dog\n")
    found = folder.open_collection(tmp_path, held_out=0)
    assert found.classes == ["cat", "dog"] and [one.label for one in found.samples] == [1, 0, 1]


def test_a_companion_has_an_encoder_a_size_and_tensors_of_its_own(tmp_path):
    given = [
        Sample(
            str(i),
            (f"picture {i}",),
            picture=lambda i=i: picture(i),
            companions={"reference": lambda: png(50)},
        )
        for i in range(4)
    ]
    asked = []

    def features(pixels):
        asked.append(tuple(pixels.shape[2:]))
        return {"tokens": pixels.flatten(2), "pooled": pixels.mean((2, 3))}

    beside = {"reference": Companion(features, "eyes-1", (8, 4))}
    batch = encoded(given, tmp_path, companions=beside).read([0, 2])
    assert set(asked) == {(4, 8)}
    assert batch.companions["reference.tokens"].shape == (2, 3, 32)
    assert batch.conditions[1]["reference.pooled"].shape == (3,)
    asked.clear()
    encoded(given, tmp_path, companions=beside)
    assert asked == []


def test_a_broken_companion_sets_its_sample_aside(tmp_path):
    given = [
        Sample(
            str(i),
            ("x",),
            picture=lambda i=i: picture(i),
            companions={"control": lambda i=i: png(9)[: 60 + i]},
        )
        for i in range(2)
    ]
    given.append(replace(given[0], name="2", companions={"control": lambda: png(3)}))
    found = encoded(given, tmp_path)
    assert found.names == ["2"] and {one.file for one in found.set_aside} == {"0", "1"}
    assert all("its control" in one.reason for one in found.set_aside)


@dataclass
class Still:
    """An encoded set of one step, without a store."""

    null: dict = field(default_factory=lambda: {"tokens": torch.zeros(1, 2)})


def test_each_conditioner_is_dropped_by_itself():
    model: Any = type("Drawn", (), {"theory": get("flow-matching")})()
    order: Any = None
    objective = DiffusionObjective(
        model,
        Still(),
        order,
        TrainSettings(stratified_timesteps=False),
        0,
        0.5,
        condition_dropout={"control": 0.25},
    )
    rows = [{"tokens": torch.ones(3, 2), "control": torch.ones(4)} for _ in range(4000)]
    drawn = objective.draw(range(4000), torch.zeros(4000, 1), 0)
    kept = objective.apply_dropout(rows, drawn)
    words = torch.tensor([float(row["tokens"].sum()) > 0 for row in kept])
    edges = torch.tensor([float(row["control"].sum()) > 0 for row in kept])
    assert abs(float(words.float().mean()) - 0.5) < 0.03 and abs(float(edges.float().mean()) - 0.75) < 0.03
    both = float((words & edges).float().mean())
    assert abs(both - 0.375) < 0.03  # independent of each other
    assert rows[0]["control"].sum() == 4


def test_shares_name_companions_that_are_there():
    assert condition_encoders.condition_dropout(
        DataSettings(condition_dropout={"control": 0.25}), ["control"]
    ) == {"control": 0.25}
    with pytest.raises(Refused, match="control"):
        condition_encoders.condition_dropout(DataSettings(condition_dropout={"contrl": 0.1}), ["control"])


def test_a_recipe_words_its_captions(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "metadata.csv").write_text('file_name,caption,artist\na.png,"cat, red, small, wild",Ann\n')
    settings = DataSettings(
        train=str(tmp_path),
        trigger_words="sks",
        template="{caption}, by {artist}",
        tag_shuffles=3,
        held_out=0,
    )
    (sample,) = collect(settings).samples
    assert 1 < len(sample.captions) <= 3
    for caption in sample.captions:
        assert caption.startswith("sks cat, ") and caption.endswith(", by Ann")
    assert collect(replace(settings, captions="none")).samples[0].captions == ("",)
