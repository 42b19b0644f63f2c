"""Captions that a model does not read, or reads in part: said while training, no hindrance to measuring."""

import pytest

from .world import sfumato, write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe, and pictures of which one has a caption of far more than 64 tokens."""
    place = tmp_path_factory.mktemp("captions")
    write_recipe(place)
    table = place / "pictures" / "metadata.jsonl"
    table.write_text(table.read_text().replace("a red thing number 0", "a red thing " * 50))
    return place


def test_training_says_once_how_many_captions_are_cut(folder):
    answer = sfumato("train", folder / "recipe.toml", "train.steps=2", f"output={folder / 'words'}")
    assert answer.code == 0, answer.err
    assert answer.err.count("1 of 8 captions are longer than the 64 tokens") == 1
    assert '"a red thing a red thing' in answer.err


def test_a_model_without_text_is_measured_on_captioned_pictures(folder):
    asked = ("train", folder / "recipe.toml", "train.steps=2", "model.text_encoder=none")
    answer = sfumato(*asked, f"output={folder / 'mute'}")
    assert answer.code == 0, answer.err
    assert "captions are longer" not in answer.err
    asked = (
        "eval",
        folder / "mute",
        "--samples",
        2,
        "--seeds",
        1,
        "--steps",
        2,
        "--out",
        folder / "measured",
    )
    first, second = sfumato(*asked), sfumato(*asked)
    assert first.code == second.code == 0, first.err + second.err
    assert "measured/report.html" in first.out and "measured-2/report.html" in second.out
