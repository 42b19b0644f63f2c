"""Laws of families that start from a picture: training shows them the data's own, and drawing the user's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sfumato
from sfumato.errors import Refused
from sfumato.run_folder import RunFolder
from sfumato.workflow import base_images, prepare, train_run

from . import pictures
from .test_training import losses, write_recipe

QUICK = ["train.sanity=false"]


def some(first: list[str], others: list[str]) -> list[Any]:
    """The first quickly, the others among the slow tests."""
    return [*first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


def kept(run: Any) -> dict[str, torch.Tensor]:
    """What the newest checkpoint holds."""
    return load_file(RunFolder.open(run.path).checkpoint_folders()[-1] / "model.safetensors")


def beside(name: str, folder: Path, *model: str) -> Path:
    """A recipe whose pictures are edits of others, told by a column."""
    recipe = write_recipe(name, folder, *model)
    lines = []
    for index, file in enumerate(sorted((folder / "pictures").rglob("*.png"))):
        Image.new("RGB", (64, 64), (200, 60 * index, 90)).save(folder / "pictures" / f"before{index}.png")
        said = {"caption": f"make it {index % 2}", "edit_source": f"before{index}.png"}
        lines.append(json.dumps({"file_name": str(file.relative_to(folder / "pictures")), **said}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    return recipe


def moving(name: str, folder: Path, *model: str) -> Path:
    """A recipe whose data are clips of five frames."""
    recipe = write_recipe(name, folder, *model)
    for file in (folder / "pictures").rglob("*.png"):
        frames = [Image.new("RGB", (64, 64), (50 * i, 90, 200 - 30 * i)) for i in range(5)]
        frames[0].save(file.with_suffix(".gif"), save_all=True, append_images=frames[1:], duration=125)
        file.unlink()
    return recipe


EDITING = some(["qwen-image-edit", "flux-kontext"], ["qwen-image-edit-plus", "flux-2-klein-edit"])


@pytest.mark.parametrize("name", EDITING)
def test_an_editing_family_is_shown_the_source_of_each_sample(name, tmp_path):
    """Law: what training shows is what drawing shows for the same picture; a LoRA of it trains and draws."""
    with pictures.small():
        recipe = beside(name, tmp_path, 'train = "lora"', "rank = 2")
        keys = ["data.captions=files", "data.source_image=edit_source", "data.caption_dropout=0.5", *QUICK]
        run = sfumato.train(recipe, keys)
        assert len(losses(run.path)) == 2
        ready = prepare.prepare_run(
            train_run.read_recipe(recipe, keys), prepare.resolve_recipe(train_run.read_recipe(recipe, keys))
        )
        row = ready.train.read([0], 0, 0).conditions[0]
        assert "reference" in row
        source = base_images.fit_picture(
            train_run.read_recipe(recipe, keys).data, tmp_path / "pictures" / "before0.png"
        )
        if name == "flux-kontext":
            shown = ready.model.condition(["make it 0"], image=[source])
            torch.testing.assert_close(row["reference"], shown["reference"][0], atol=1e-5, rtol=1e-4)
        if name.startswith("qwen"):  # words are read beside the picture: the same caption differs
            rows = [ready.train.condition(item.captions[0][1])["tokens"] for item in ready.train.items]
            assert ready.train.captions[0] == ready.train.captions[2]
            assert rows[0].shape != rows[2].shape or not torch.equal(rows[0], rows[2])
            assert all(item.null for item in ready.train.items)
        model = run.model()
        drawn = model.generate(prompt=["make it 1"], image=source, steps=1, height=32, width=32)
        assert drawn[0].size == (32, 32)


@pytest.mark.parametrize("name", some(["wan-2.2-ti2v"], ["wan-2.1-i2v", "wan-2.1-flf", "wan-2.2-i2v"]))
def test_a_clip_is_learned_from_its_own_frames(name, tmp_path):
    """Law: training shows a clip's own ends as drawing shows them; LoRA and all weights train and resume."""
    with pictures.small():
        recipe = moving(name, tmp_path, 'train = "lora"', "rank = 2")
        side = "data.resolution=64" if name == "wan-2.2-ti2v" else "data.resolution=32"
        keys = ["data.frames=5", side, *QUICK]
        once = sfumato.train(recipe, keys)
        asked = train_run.read_recipe(recipe, keys)
        ready = prepare.prepare_run(asked, prepare.resolve_recipe(asked))
        row, model = ready.train.read([0], 0, 0).conditions[0], ready.model
        shown = base_images.image_arguments(model, asked.data, [ready.train.items[0].sample])
        size = model.codec.pixel_size(ready.train.items[0].shape)
        told = model.condition(["a red circle"], **shown, **size)
        for tensor in {"known", "first", "vision"} & set(told):
            torch.testing.assert_close(row[tensor], told[tensor][0], atol=1e-4, rtol=1e-3)
        sfumato.train(recipe, [*keys, f"output={tmp_path}/twice", "train.steps=1"])
        twice = sfumato.train(recipe, [*keys, f"output={tmp_path}/twice"])
        first, second = (kept(run) for run in (once, twice))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        drawn = once.model().generate(prompt=["a red circle"], **shown, steps=1, frames=5)
        assert drawn[0].shape[0] == 5
        whole = sfumato.train(moving(name, tmp_path), [*keys, "train.steps=1", f"output={tmp_path}/whole"])
        assert len(losses(whole.path)) == 1


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("qwen-image-edit", [], "it has no edit_source"),
        ("qwen-image-edit", ["data.flip=true"], "reads its words beside the picture"),
        ("wan-2.1-i2v", [], "name a folder of clips and set data.frames"),
        ("flux-dev", ["data.source_image=before"], "draws from words"),
    ],
)  # fmt: skip
def test_data_that_do_not_begin_with_a_picture_are_refused(name, keys, words, tmp_path):
    with pictures.small(), pytest.raises(Refused, match=words):
        sfumato.train(write_recipe(name, tmp_path, 'train = "lora"', "rank = 2"), [*keys, *QUICK])
