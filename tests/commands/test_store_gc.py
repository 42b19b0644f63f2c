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


# ----------------------------------------------------------------------------- a store heals


HASH = "0123456789abcdef0123456789abcdef"


def killed_save(store):
    """What a kill leaves while a codec is written."""
    codec = min(one for one in (store / "codecs").iterdir() if (one / "stage.json").is_file())
    part = store / "codecs" / f".{codec.name}.999999.part"
    part.mkdir()
    (part / "weights.safetensors").write_bytes(b"x")


def flipped_bit(store):
    codec = min(one for one in (store / "codecs").iterdir() if (one / "stage.json").is_file())
    data = bytearray((codec / "weights.safetensors").read_bytes())
    data[-5] ^= 1
    (codec / "weights.safetensors").write_bytes(data)


def foreign_codec(store, name="mine", text="notes"):
    (store / "codecs" / name).mkdir()
    (store / "codecs" / name / "stage.json").write_text(text)


def link(store, part):
    (store.parent / "elsewhere").mkdir()
    (store.parent / "elsewhere" / "mine").write_text("mine")
    (store / part).mkdir(exist_ok=True)
    (store / part / HASH).symlink_to(store.parent / "elsewhere")


def ring(store, text):
    (store / "rings" / "a").mkdir(parents=True)
    if text is not None:
        (store / "rings" / "a" / "owner.json").write_text(text)
    (store / "rings" / "a" / "mine").write_text("mine")


def odd_use(store):
    """A file of uses that another program wrote."""
    from safetensors.torch import save_file
    from torch import zeros

    metadata = {"format": "sfumato-use-1", "owner": "[1]", "encoders": "{}"}
    save_file({"pixels": zeros(3)}, store / "uses" / "odd.safetensors", metadata)


DAMAGE = {
    "a killed save": (killed_save, ""),
    "a flipped bit": (flipped_bit, "is damaged"),
    "a foreign folder": (foreign_codec, "codecs/mine: it is no codec"),
    "a foreign folder of our name": (lambda store: foreign_codec(store, HASH), f"codecs/{HASH}: "),
    "a list for a stage": (lambda store: foreign_codec(store, HASH, "[1]"), f"codecs/{HASH}: "),
    "an unknown stage": (lambda store: foreign_codec(store, HASH, '{"kind": 5}'), f"codecs/{HASH}: "),
    "a link among codecs": (lambda store: link(store, "codecs"), f"codecs/{HASH}: it is a link"),
    "a link among rings": (lambda store: link(store, "rings"), f"rings/{HASH}: it is a link"),
    "a torn ring": (lambda store: ring(store, '{"owner'), "rings/a: "),
    "a ring of a number": (lambda store: ring(store, '{"owner": 5}'), "rings/a: "),
    "a ring of a list": (lambda store: ring(store, "[]"), "rings/a: "),
    "a ring of nobody": (lambda store: ring(store, None), "rings/a: "),
    "an odd use": (odd_use, ""),
    "a folder named as a shard": (lambda store: (store / "pixels" / f"{HASH}.safetensors").mkdir(), ""),
    "a pipe named as a shard": (lambda store: os.mkfifo(store / "pixels" / f"{HASH}.safetensors"), ""),
    "a folder named as a torn shard": (lambda store: (store / "text" / ".x.part").mkdir(), ""),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_whatever_is_in_a_store_it_is_listed_and_collected(world, tmp_path, damage, said):
    """Law: what is damaged or another's is named and passed by; the rest is listed and collected."""
    _, store = world
    damage(store)
    age(store)
    for words in ((), ("--collect",), ()):
        answer = sfumato("data", store, *words)
        assert answer.code == 0, answer.err
        assert said in answer.out
    after = sfumato("data", store, "--json").json()
    assert after["unused_bytes"] == 0 and after["text"]["entries"] == 9
    assert not list((store / "codecs").glob(".*.part"))
    kept = [*(store / "rings").rglob("mine"), *tmp_path.glob("elsewhere/mine")]
    assert len(kept) == (damage.__name__ == "<lambda>" and ("rings/a" in said or "link" in said))


def test_a_damaged_codec_is_trained_again_and_a_finished_one_keeps_no_checkpoints(world):
    recipe, store = world
    codecs = store / "codecs"
    assert not list(codecs.glob("*.run")) and not list(codecs.rglob("optimizer*"))
    before = {file: file.read_bytes() for file in codecs.rglob("weights.safetensors")}
    for file, data in before.items():
        file.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    done = sfumato("encode", recipe, "--json")
    assert done.code == 0 and done.json()["pictures_encoded"] == 0 and "is trained again" in done.err, done
    sound = [file for file, data in before.items() if file.read_bytes() == data]
    assert len(sound) == len(before) - 1 and not list(codecs.glob("*.run"))
