"""Laws of hub ids: what the Hub's own cache holds is found offline, what it does not is refused."""

import shutil

import pytest
from huggingface_hub import constants

import sfumato
from sfumato.errors import Refused
from sfumato.models.io import adapter_run

from .test_training import make_base, write_recipe

COMMIT = "0a1b" * 10


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache as `hf download acme/tiny` leaves it: blobs, links to them, and which commit main is."""
    make_base("dit", tmp_path)
    home = tmp_path / "cache" / "models--acme--tiny"
    files = [file for file in (tmp_path / "base").rglob("*") if file.is_file()]
    for number, file in enumerate(files):
        blob, link = (
            home / "blobs" / str(number),
            home / "snapshots" / COMMIT / file.relative_to(tmp_path / "base"),
        )
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(blob)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return home


@pytest.mark.parametrize("given", ["acme/tiny", "acme/tiny@main", f"acme/tiny@{COMMIT}"])
def test_a_hub_id_in_the_cache_is_loaded_without_a_network(given, cache):
    """Law: its revision, or main, by name or by commit."""
    assert sfumato.load(given).info["family"] == "ClassDiT"


def test_a_run_goes_on_from_a_hub_id_and_remembers_where_it_lay(cache, tmp_path):
    """Law: a recipe's base may be a hub id; the run refers to the snapshot and is loaded from it."""
    (cache / "refs" / "main").unlink()  # an only snapshot needs no reference
    recipe = write_recipe("dit", tmp_path, 'train = "lora"', "rank = 2")
    recipe.write_text(recipe.read_text().replace('base = "base"', 'base = "acme/tiny"'))
    shutil.rmtree(tmp_path / "base")
    run = sfumato.train(recipe, ["train.sanity=false"])
    assert adapter_run.read_base(run.path / "model")[0] == cache / "snapshots" / COMMIT
    assert run.model().info["family"] == "ClassDiT"


def test_an_id_that_is_nowhere_is_refused_with_the_two_ways_out(cache):
    """Law: where to put the folder, and how the cache is filled; also for a revision that is not there."""
    for given in ("acme/gated", "acme/tiny@v2"):
        with pytest.raises(Refused, match=r"put the folder at .*hf download acme/") as refusal:
            sfumato.load(given)
        assert "you were offline" in str(refusal.value)
