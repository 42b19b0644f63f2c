"""A store is collected by command: what runs and recipes need stays, also beside those at work."""

import json
import os
import shutil
import time

import pytest

import sfumato as public
from sfumato.data.store.store import Store
from sfumato.recipe import Recipe

from .world import draw_pictures, one_sentence, sfumato, write_recipe


def age(store, days=40):
    """Make everything in a store look written so many days ago."""
    for file in store.rglob("*"):
        os.utime(file, (time.time() - 86400 * days,) * 2)


def content(store):
    return [Store(store).content_hash(kind) for kind in ("pixels", "text")]


@pytest.fixture
def world(tmp_path):
    """A recipe, and a store with the encodings of its run and of another run that was thrown away."""
    recipe = write_recipe(tmp_path)
    store = tmp_path / "store"
    public.encode(recipe)
    (tmp_path / "run").mkdir()
    draw_pictures(tmp_path / "pictures", 12)
    public.encode(recipe, [f"output={tmp_path / 'gone'}", "data.template=a photo, {caption}"])
    age(store)
    return recipe, store


def test_what_nobody_needs_is_counted_and_only_removed_when_asked(world, tmp_path):
    _, store = world
    full = content(store)
    for owner in ("run", "gone"):
        (store / "rings" / owner).mkdir(parents=True)
        (store / "rings" / owner / "owner.json").write_text(json.dumps({"owner": str(tmp_path / owner)}))
    age(store)
    told = sfumato("data", store, "--json").json()
    assert content(store) == full
    assert told["pixels"]["unused_entries"] > 0 and told["text"]["unused_entries"] == 12
    assert told["unused_bytes"] > 0 == told["freed_bytes"]
    assert {user["owner"]: user["kept"] for user in told["users"]} == {
        str(tmp_path / "run"): True, str(tmp_path / "gone"): False,
    }  # fmt: skip
    done = sfumato("data", store, "--collect")
    assert done.code == 0 and "Freed" in done.out
    again = sfumato("data", store, "--json").json()
    assert [one["owner"] for one in again["rings"]] == [str(tmp_path / "run")]
    assert again["unused_bytes"] == 0 and again["text"]["entries"] == 9
    assert again["pixels"]["entries"] == 8


def test_what_a_recipe_needs_and_what_is_young_is_kept(world):
    recipe, store = world
    full = content(store)
    wording = recipe.with_name("other.toml")
    wording.write_text(recipe.read_text().replace("[train]", 'template = "a photo, {caption}"\n[train]', 1))
    assert sfumato("data", store, "--collect", "--days", "100").code == 0
    assert content(store) == full
    assert sfumato("data", store, "--collect", "--keep", wording).code == 0
    assert content(store) == full
    (store / "pixels" / ".x.part").write_bytes(b"torn")
    age(store)
    assert sfumato("data", store, "--json").json()["leftover_bytes"] == 4


def test_what_a_process_works_with_is_left_alone_and_a_store_may_move(world, tmp_path):
    recipe, store = world
    words = [f"output={tmp_path / 'gone'}", "data.template=a photo, {caption}"]
    given = Recipe.read(recipe, words)
    ready = public.encode(given)
    age(store)
    before = ready.train.read([0, 1]).latents
    shutil.rmtree(tmp_path / "run")
    assert sfumato("data", store, "--collect").code == 0
    reread = public.encode(given).train
    assert reread.counts["pictures_encoded"] == 0 and (reread.read([0, 1]).latents == before).all()
    assert [user["busy"] for user in sfumato("data", store, "--json").json()["users"]] == [True]
    store.rename(tmp_path / "elsewhere")
    moved = public.encode(recipe, [*words, f"data.cache_dir={tmp_path / 'elsewhere'}"]).train
    assert moved.counts["pictures_encoded"] == moved.counts["captions_encoded"] == 0


def test_only_a_store_is_collected(world, tmp_path):
    one_sentence(sfumato("data", tmp_path / "pictures", "--collect"), "no store", "data.cache_dir")
