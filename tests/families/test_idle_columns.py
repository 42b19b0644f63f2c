"""Laws of pictures beside a sample: each is read by somebody, or its column is refused by name."""

import json
import shutil

import pytest
from PIL import Image

import sfumato
from sfumato.errors import Refused

from .test_training import losses, write_recipe


def with_columns(folder, *names):
    """A copy of the recipe's pictures in one folder, with pictures under these columns."""
    pictures = sorted((folder / "pictures").glob("*/*.png"))
    flat = folder / "flat"
    flat.mkdir()
    rows = []
    for index, file in enumerate(pictures):
        shutil.copy(file, flat / f"{index}.png")
        row = {"file_name": f"{index}.png", "caption": "a red circle"}
        for name in names:
            Image.new("L", (64, 64), 255 * (index % 2)).save(flat / f"{name}{index}.png")
            row[name] = f"{name}{index}.png"
        rows.append(json.dumps(row))
    (flat / "metadata.jsonl").write_text("\n".join(rows))
    return [f"data.train={flat}", "data.captions=files", "train.steps=1"]


@pytest.mark.parametrize("name", ["mask", "control", "depth", "reference", "edges"])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_column_that_nobody_reads_is_refused(name, train, tmp_path):
    """Law: a user who names a mask gets it used, or a sentence before anything is computed."""
    recipe = write_recipe("stable-diffusion-1.5", tmp_path, f'train = "{train}"')
    words = with_columns(tmp_path, name)
    with pytest.raises(Refused, match=f'data.condition_columns names "{name}"'):
        sfumato.train(
            recipe, [*words, f"data.condition_columns={name}", f"data.condition_dropout={name}=0.5"]
        )
    assert not (tmp_path / "run").exists() and not (tmp_path / "store").exists()


def test_a_column_that_a_control_module_reads_is_taken(tmp_path):
    """Law: what the model reads may be named, by its own name or by the column it is made from."""
    recipe = write_recipe("stable-diffusion-1.5", tmp_path, 'train = "controlnet"')
    words = [*with_columns(tmp_path, "edges", "mask"), "data.control_image=edges", "train.sanity=false"]
    assert len(losses(sfumato.train(recipe, [*words, "data.condition_columns=edges"]).path)) == 1
    with pytest.raises(Refused, match=r'names "mask".*it reads control'):
        sfumato.train(recipe, [*words, "data.condition_columns=mask", "output=other"])
