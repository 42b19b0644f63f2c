"""Law: steps and guidance that a recipe does not say are the base's own, wherever they are said."""

from pathlib import Path

import torch
from PIL import Image

import sfumato
from sfumato.recipe import Recipe
from sfumato.workflow import plan, summary

from .zoo import ZOO

BASE = """
output = "run"
[model]
base = "base"
train = "lora"
[data]
train = "pictures"
resolution = 32
held_out = 0.0
cache_dir = "store"
[train]
steps = 1
batch = 2
validate_every = 0
threads = 1
sanity = false
[sample]
every = 0
prompts = ["a red thing"]
"""


def write_world(folder: Path) -> Path:
    (folder / "pictures").mkdir()
    for index in range(2):
        Image.effect_noise((32, 32), 80).convert("RGB").save(folder / "pictures" / f"{index}.png")
        (folder / "pictures" / f"{index}.txt").write_text(f"a thing {index}")
    torch.manual_seed(0)
    ZOO["stable-diffusion-1.5"].make("stable-diffusion-1.5").save_pretrained(folder / "base")
    (folder / "recipe.toml").write_text(BASE)
    return folder / "recipe.toml"


def test_steps_and_guidance_of_a_base_are_those_that_are_said(tmp_path):
    """Law: where the recipe says none, plan, effective.toml and notes say what is drawn with."""
    recipe = write_world(tmp_path)
    found = plan(Recipe.read(recipe))
    assert found["recipe"]["sample.steps"] == {"value": 50, "origin": "base"}
    assert found["recipe"]["sample.guidance"] == {"value": 7.5, "origin": "base"}
    assert "in 50 steps (the base's own) with guidance 7.5" in dict(summary(found))["drawing"]
    run = sfumato.train(recipe, ["train.save_every=1"], say=lambda sentence: None)
    effective = Recipe.read(run.path)
    assert (effective.sample.steps, effective.sample.guidance) == (50, 7.5)
    assert Recipe.read(run.path / "recipe.toml").origin("sample.steps") == "default"
    assert run.model().info["steps"] == 50
    said: list[str] = []
    sfumato.train(recipe, ["sample.steps=3"], say=said.append)
    assert [one for one in said if "sample." in one] == ["sample.steps was 50 and is 3 from here on."]
