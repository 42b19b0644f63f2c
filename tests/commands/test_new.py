"""`sfumato new`: what it writes follows from data, base and machine, and can be planned as it stands."""

import json
import shlex

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sfumato import workflow
from sfumato.errors import Refused
from sfumato.recipe import Recipe
from sfumato.workflow.suggest import measure_steps, rules, suggest_recipe
from sfumato.workflow.suggest.inspect_base import BaseFacts
from sfumato.workflow.suggest.inspect_data import DataFacts, inspect_data
from sfumato.workflow.suggest.measure_steps import StepSeconds
from sfumato.workflow.suggest.rules import Machine

from .world import RECIPE, draw_pictures, one_sentence, sfumato

SMALL = ("model.width=32", "model.depth=1", "model.heads=2", "model.codec_width=8", "data.cache_dir=store")
CPU, GPU = Machine(), Machine("cuda", 24 << 30)


def oblong(folder):
    folder.mkdir()
    for index in range(8):
        Image.new("RGB", (96, 48), (20 * index, 90, 90)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"number {index}")


def classes(folder):
    for index in range(10):
        place = folder / ("cats" if index % 2 else "dogs")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28), 20 * index).save(place / f"{index}.png")


def bare(folder):
    folder.mkdir()
    for index in range(4):
        Image.new("RGBA", (200, 200), (20 * index, 90, 90, 128)).save(folder / f"{index}.png")


def clips(folder):
    folder.mkdir()
    for index in range(4):
        frames = [Image.new("RGB", (32, 32), (9 * index, 20 * at, 90)) for at in range(10)]
        frames[0].save(folder / f"{index}.webp", save_all=True, append_images=frames[1:], duration=100)
        (folder / f"{index}.txt").write_text(f"number {index}")


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (draw_pictures, {"data.resolution": 24, "model.codec_stride": 4, "train.batch": 8}),
        (oblong, {"data.buckets": 2, "data.resolution": 64, "model.codec_stride": 8}),
        (classes, {"data.captions": "folder", "model.text_encoder": "labels", "data.resolution": 32}),
        (bare, {"data.captions": "none", "model.text_encoder": "none", "sample.guidance": 1.0}),
        (clips, {"data.frames": 5, "data.fps": 8, "model.codec_time_stride": 2, "data.resolution": 32}),
    ],
    ids=["small", "oblong", "classes", "without captions", "clips"],
)
@pytest.mark.slow
def test_a_recipe_fits_its_data_and_plans_as_it_stands(make, wanted, tmp_path):
    """Law: sizes, shapes, classes and frames are read from the data; `plan` takes what was written."""
    make(tmp_path / "my data")
    answer = sfumato("new", "a name", "--data", "my data")
    assert answer.code == 0, answer.err
    assert "sfumato train 'a name.toml'" in answer.err
    values = Recipe.read("a name.toml").values()
    assert {name: values[name] for name in wanted} == wanted
    planned = sfumato("plan", "a name.toml", *SMALL, "--json")
    assert planned.code == 0, planned.err


@pytest.mark.parametrize(
    ("minutes", "step", "samples", "steps", "said"),
    [
        (5.5, 0.1, 1000, 2000, "minutes"),
        (5.5, 0.02, 300, 2800, "by heart"),
        (20, 0.1, 5000, 8200, "minutes"),
        (0.5, 0.1, 300, 300, "too few"),
    ],
)
def test_the_minutes_are_filled_by_what_a_step_was_measured_to_take(
    minutes, step, samples, steps, said, tmp_path, monkeypatch
):
    """Law: more minutes give more steps; too few are said, and so are more than the data are good for."""
    draw_pictures(tmp_path / "pictures")
    monkeypatch.setattr(
        "sfumato.workflow.suggest.suggestion.inspect_data", lambda data: DataFacts(samples, side=128)
    )
    found = suggest_recipe(
        "x.toml", "pictures", minutes=minutes, measure=lambda recipe: StepSeconds(0.05, step), machine=CPU
    )
    assert found.values["train.steps"] == steps and any(said in note for note in found.notes)
    assert found.values["sample.every"] * step <= 60 or found.values["sample.every"] <= steps / 15
    assert found.values["train.warmup_steps"] < steps / 4 and found.values["train.lr_schedule"] == "linear"


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("data", [DataFacts(900, side=400), DataFacts(90, side=400, clips=True, seconds=4)])
def test_quality_is_larger_than_speed_and_speed_than_tiny(data, machine):
    """Law: and what is larger learns at a lower rate."""
    made = [rules.scratch_values(data, machine, aim) for aim in ("tiny", "speed", "quality")]
    for name in ("model.width", "model.depth", "data.resolution"):
        sizes = [one[name] for one in made]
        assert sizes == sorted(set(sizes)), name
    rates = [one["train.learning_rate"] for one in made]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("parameters", "machine", "stored"),
    [
        (8e8, GPU, None),
        (6e9, GPU, "bfloat16"),
        (12e9, GPU, "int8"),
        (20e9, GPU, "nf4"),
        (12e9, Machine("cuda", 80 << 30), "bfloat16"),
    ],
)
def test_a_frozen_base_is_stored_so_that_it_fits(parameters, machine, stored):
    base = BaseFacts("pipeline", "FluxPipeline", 1024, parameters=int(parameters))
    values = rules.base_values(DataFacts(20, side=900), base, machine, "lora", "speed")
    assert values.get("model.base_quantization") == stored
    assert "model.base_quantization" not in rules.base_values(DataFacts(20), base, machine, "full", "speed")


def pipeline(folder, kind="StableDiffusionPipeline", side=64):
    for place, config in (("unet", {"sample_size": side}), ("vae", {"block_out_channels": [1, 1, 1, 1]})):
        (folder / place).mkdir(parents=True)
        (folder / place / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))


def test_a_single_file_has_the_sizes_of_the_folder_that_describes_it(tmp_path):
    draw_pictures(tmp_path / "pictures", 20)
    pipeline(tmp_path / "sdxl", "StableDiffusionXLPipeline", 128)
    save_file({"a": torch.zeros(3, 5)}, tmp_path / "sdxl.safetensors")
    answer = sfumato("new", "dog", "--data", "pictures", "--base", "sdxl.safetensors", "--train", "lora")
    assert answer.code == 0, answer.err
    recipe = Recipe.read("dog.toml")
    assert recipe.data.resolution == 1024 and recipe.train.batch == 4 and recipe.train.steps == 500
    assert recipe.train.learning_rate == 1e-4 and recipe.model.base.endswith("sdxl.safetensors")


@pytest.fixture(scope="module")
def run_of_clips(tmp_path_factory):
    """A folder with clips, and a run that learned a little of them."""
    folder = tmp_path_factory.mktemp("clips")
    clips(folder / "clips")
    text = RECIPE.replace('"pictures"', f'"{folder / "clips"}"').replace("resolution = 16", "resolution = 32")
    text = text.replace("[train]", "frames = 5\nfps = 10\nshort_clip_frames = [1]\n[train]")
    (folder / "recipe.toml").write_text(text.replace("held_out = 0.25", "held_out = 0"))
    workflow.train(Recipe.read(folder / "recipe.toml", ["train.steps=2", "model.codec_stride=4"]))
    return folder


@pytest.mark.parametrize("train", ["full", "lora", "controlnet"])
def test_beside_a_run_of_clips_frames_rate_and_size_are_the_runs(train, run_of_clips, tmp_path):
    """Law: and the recipe plans as it stands, with edges of the pictures where no control is beside."""
    where = ("--data", run_of_clips / "clips", "--base", run_of_clips / "run")
    assert sfumato("new", "more", *where, "--train", train).code == 0
    recipe = Recipe.read("more.toml")
    assert (recipe.data.frames, recipe.data.fps, recipe.data.resolution) == (5, 10, 32)
    assert recipe.train.steps == 300 and recipe.train.batch == 4
    assert recipe.data.control_image == ("canny" if train == "controlnet" else "control")
    planned = sfumato("plan", "more.toml", "data.cache_dir=store", "--json")
    assert planned.code == 0, planned.err
    if train == "lora":
        assert sfumato("new", "timed", *where, "--train", train, "--minutes", 1).code == 0
        assert Recipe.read("timed.toml").train.steps > 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--base", "pictures"), ("pictures", "--data")),
        (("--base", "sd/unet"), ("sd/unet", "one part", "--base sd")),
        (("--base", "nobody/nothing"), ("nobody/nothing", "cache")),
        (("--base", "sdd"), ("sdd", "does not exist")),
        (("--base", "lone.safetensors"), ("lone.safetensors", "weights alone")),
        (("--base", "weights.ckpt"), ("weights.ckpt",)),
        (("--base", "empty"), ("empty", "no model")),
        (("--base", "run"), ("run", "no model yet")),
        (("--train", "lora"), ("--train lora", "--base")),
        (("--train", "lorra"), ("lorra", '"lora"')),
        (("--base", "sd", "--train", "edit"), ("edit_source",)),
        (("--for", "qality"), ("qality", '"quality"')),
        (("--minutes", -1), ("--minutes", "above 0")),
    ],
)
def test_what_cannot_be_is_refused_by_new_itself(words, said, tmp_path):
    """Law: in a sentence that says what was meant, and nothing is written."""
    draw_pictures(tmp_path / "pictures")
    pipeline(tmp_path / "sd")
    for name in ("lone.safetensors", "weights.ckpt"):
        (tmp_path / name).write_bytes(b"")
    for name in ("empty", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "effective.toml").write_text("seed = 0\n")
    one_sentence(sfumato("new", "mine", "--data", "pictures", *words), *said)
    assert not (tmp_path / "mine.toml").exists()


def test_the_data_are_found_from_wherever_the_recipe_lies(tmp_path):
    draw_pictures(tmp_path / "pictures")
    assert sfumato("new", "recipes/mine", "--data", "pictures").code == 0
    assert Recipe.read("recipes/mine.toml").data.train == str(tmp_path / "recipes" / "../pictures")


def test_embedded_data_have_recipes_too():
    assert inspect_data("moving-shapes").clips and not inspect_data("shapes").clips
    with pytest.raises(Refused, match="no folder"):
        inspect_data("nowhere")


def test_a_step_is_measured_on_this_machine(monkeypatch):
    monkeypatch.setattr(measure_steps, "SECONDS", 0.0)
    words = ["model.width=16", "model.depth=1", "model.heads=1", "model.codec_width=8", "model.codec_batch=2"]
    recipe = Recipe().overridden([*words, "data.resolution=16", "train.batch=2"], "test")
    found = measure_steps.measure_steps(recipe)
    assert 0 < found.codec < 60 and 0 < found.denoiser < 60


def test_a_quoted_name_is_one_word_of_a_shell(tmp_path):
    draw_pictures(tmp_path / "pictures")
    said = sfumato("new", "it's mine", "--data", "pictures").err.split("Next: ")[1]
    assert shlex.split(said.split(", then")[0]) == ["sfumato", "plan", "it's mine.toml"]
