"""The data keys of a recipe do what they say, from the command line to the weights."""

import io
import json
import tarfile

import pytest
import torch
from safetensors.torch import load_file

import sfumato as public
from sfumato.recipe import Recipe

from .world import draw_pictures, one_sentence, sfumato, write_recipe


def weights(run):
    folder = max((run / "checkpoints").iterdir())
    return load_file(next(folder.glob("model*.safetensors")))


def tensors(store):
    return {name.partition("/")[2] for file in store.glob("pixels/*.safetensors") for name in load_file(file)}


def test_the_store_keeps_mean_and_deviation_and_training_may_sample(tmp_path):
    recipe = write_recipe(tmp_path)
    assert sfumato("train", recipe).code == 0
    assert tensors(tmp_path / "store") == {"mean", "std"}
    told = sfumato("train", recipe, "data.latent_sampling=sample", "output=other", "--json")
    assert told.code == 0 and "pictures:" not in told.err  # nothing was encoded again
    mode, sample = weights(tmp_path / "run"), weights(tmp_path / "other")
    assert any(not torch.equal(mode[name], sample[name]) for name in mode)


def test_a_streamed_run_equals_a_stored_one_and_keeps_no_latents(tmp_path):
    recipe = write_recipe(tmp_path)
    assert sfumato("train", recipe, "data.flip=true").code == 0
    stored = weights(tmp_path / "run")
    shards = list((tmp_path / "store" / "pixels").glob("*.safetensors"))
    for shard in shards:
        shard.unlink()
    assert sfumato("train", recipe, "data.flip=true", "data.stream=true", "output=streamed").code == 0
    assert not list((tmp_path / "store" / "pixels").glob("*.safetensors"))
    streamed = weights(tmp_path / "streamed")
    for name, weight in stored.items():
        torch.testing.assert_close(streamed[name], weight, atol=1e-4, rtol=1e-3)
    words = ["data.flip=true", "data.cache_limit=0.8KB", "output=ringed"]
    assert sfumato("train", recipe, *words, "train.steps=3").code == 0
    assert len(list((tmp_path / "store" / "rings").glob("*/owner.json"))) == 1
    assert sfumato("train", recipe, *words, "train.steps=6").code == 0
    ringed = weights(tmp_path / "ringed")
    assert all(torch.equal(streamed[name], ringed[name]) for name in streamed)
    assert not list((tmp_path / "store").rglob("rings/*/*/*"))
    one_sentence(sfumato("train", recipe, "data.cache_limit=0.1KB", "output=o"), "cache_limit", "one step")
    one_sentence(sfumato("plan", recipe, "data.cache_limit=big"), "data.cache_limit", "20GB")


def test_several_sets_are_one_with_weights(tmp_path):
    recipe = write_recipe(tmp_path)
    draw_pictures(tmp_path / "more", 4)
    text = recipe.read_text().replace('"pictures"', '["pictures", "more"]\nset_repeats = [1, 2.5]')
    recipe.write_text(text)
    assert Recipe.read(recipe).data.train == (str(tmp_path / "pictures"), str(tmp_path / "more"))
    ready = public.encode(recipe)
    assert {one.split("/")[0] for one in ready.train.names} == {"0-pictures", "1-more"}
    assert set(ready.train.repeats) == {1.0, 2.5}
    assert sfumato("train", recipe).code == 0
    one_sentence(sfumato("plan", recipe, "data.set_repeats=[1]"), "data.set_repeats", "2 sets")


def test_a_curriculum_and_a_token_budget_train(tmp_path):
    recipe = write_recipe(tmp_path)
    given = ["data.curriculum=8:3", "data.resolution=16", "model.codec_stride=4", "data.buckets=3"]
    answer = sfumato("train", recipe, *given, "data.token_budget=true", "train.gradient_accumulation=2")
    assert answer.code == 0, answer.err
    plan = sfumato("plan", recipe, *given, "--json", "output=other").json()
    assert sum(one["samples"] for one in plan["buckets"].values()) == plan["samples"]
    assert all("carried_over" in one for one in plan["buckets"].values())
    one_sentence(sfumato("plan", recipe, "data.curriculum=8"), "data.curriculum", "32:1000")


@pytest.mark.parametrize("form", ["bfloat16", "int8", "float8"])
def test_smaller_numbers_say_what_they_cost(form, tmp_path):
    answer = sfumato(
        "encode", write_recipe(tmp_path), f"data.latent_format={form}", f"data.text_format={form}"
    )
    assert answer.code == 0
    assert f"stored pixels as {form}: relative error" in answer.err
    assert f"stored text as {form}: relative error" in answer.err


READS = """
from sfumato.models.networks.dit import DiT

class Reads(DiT):
    def forward(self, x, clock, condition):
        return super().forward(x + 0 * condition.get("control", x), clock, condition)
"""


def test_a_control_picture_reaches_the_denoiser_and_is_dropped_by_itself(tmp_path):
    recipe = write_recipe(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "pictures" / "metadata.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows[:-1]):
        row["conditioning_image"] = f"edges/{index}.png"
    draw_pictures(tmp_path / "pictures" / "edges")
    (tmp_path / "pictures" / "edges" / "metadata.jsonl").unlink()
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["data.condition_columns=control", "data.condition_dropout=control=0.5"]
    (tmp_path / "reads.py").write_text(READS)
    answer = sfumato("train", recipe, *given, f"model.denoiser={tmp_path}/reads.py:Reads")
    assert answer.code == 0, answer.err
    assert "it has no control" in answer.err
    for command in ("train", "plan"):
        one_sentence(
            sfumato(command, recipe, *given, "output=other"), 'names "control"', "scratch would not read"
        )
    assert not (tmp_path / "other").exists()
    ready = public.encode(Recipe.read(recipe, given))
    batch = ready.train.read([0, 1])
    assert batch.companions["control"].shape == batch.latents.shape
    assert batch.conditions[0]["control"].shape == batch.latents[0].shape
    one_sentence(
        sfumato("plan", recipe, "data.condition_dropout=control=0.5"),
        "data.condition_dropout",
        "data.condition_columns",
    )


def test_a_recipes_data_are_planned_for_as_it_says(tmp_path):
    recipe = write_recipe(tmp_path)
    words = [
        "data.buckets=2",
        "data.resolution=64",
        f"data.template=a {'very ' * 70}good picture of {{caption}}",
    ]
    told = sfumato("data", recipe, *words, "--json").json()
    assert told["bucket_plan"]["resolution"] == 64 and len(told["bucket_plan"]["buckets"]) == 2
    assert told["tokens"]["most"] == 64 and told["tokens"]["truncated"] == told["captions"] == 8
    assert "veiled" in (tmp_path / "runs" / "data" / "report.html").read_text()
    assert sfumato("plan", recipe, *words, "--json").json()["tokens"]["cut_off"] == 8
    one_sentence(sfumato("data", recipe, "--resolution", "32"), "data.resolution=32")
    one_sentence(sfumato("data", tmp_path / "pictures", "data.flip=true"), "no recipe")


def test_a_tar_is_a_data_set_for_every_command(tmp_path):
    pictures = draw_pictures(tmp_path / "pictures")
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for row in map(json.loads, (pictures / "metadata.jsonl").read_text().splitlines()):
            archive.add(pictures / row["file_name"], row["file_name"])
            member = tarfile.TarInfo(row["file_name"].replace(".png", ".txt"))
            member.size = len(row["caption"])
            archive.addfile(member, io.BytesIO(row["caption"].encode()))
    assert sfumato("data", "shard.tar", "--json").json()["samples"] == 8
    assert sfumato("new", "tarred", "--data", "shard.tar").code == 0
    assert sfumato("plan", "tarred.toml", "--json").json()["samples"] + 1 >= 7
