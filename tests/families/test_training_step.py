"""Laws of a step on every family: it moves what the recipe promises and nothing else, and can be repeated."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import sfumato
from sfumato.models.lora import adapter
from sfumato.models.networks import blocks
from sfumato.run_folder import RunFolder
from sfumato.training.loop.loop import fit
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.workflow import finetune, prepare, train_run
from sfumato.workflow.encode_samples import dataset_and_sampler, is_conditional

from . import pictures
from .test_image_conditioned_training import beside
from .test_training import write_recipe
from .zoo import ZOO

EDITING = ("qwen-image-edit", "qwen-image-edit-plus")
QUICK = ("ltx-video", "dit")


def recipe_of(name: str, folder: Path, *model: str) -> tuple[Path, list[str]]:
    """A recipe of the family, on clips where it draws clips, on sources where it edits."""
    if name in EDITING:
        return beside(name, folder, *model), ["data.captions=files"]
    recipe = write_recipe(name, folder, *model)
    codec = sfumato.load(folder / "base").codec
    if not codec.of_clips or name.startswith("qwen"):
        return recipe, []
    frames = 1 + codec.time_stride
    for file in (folder / "pictures").rglob("*.png"):
        clip = [Image.new("RGB", (64, 64), (12 * i, 90, 200 - 9 * i)) for i in range(frames)]
        clip[0].save(file.with_suffix(".gif"), save_all=True, append_images=clip[1:], duration=125)
        file.unlink()
    side = ["data.resolution=64"] if name.startswith("wan-2.2-ti2v") else []
    return recipe, [f"data.frames={frames}", *side]


class Trained:
    """A run's parts, as `train` puts them together."""

    def __init__(self, recipe: Path, keys: list[str]) -> None:
        self.recipe = train_run.read_recipe(recipe, [*keys, "train.sanity=false"])
        self.ready = prepare.prepare_run(self.recipe, prepare.resolve_recipe(self.recipe))
        self.model = self.ready.model
        self.network = finetune.prepare_trainable(self.model, self.recipe)
        train, order = dataset_and_sampler(self.recipe, self.ready.train, [])
        dropout = 0.1 if is_conditional(self.model) else 0.0
        self.objective = DiffusionObjective(self.model, train, order, self.recipe.train, 0, dropout)
        self.run = RunFolder.create(self.recipe.output)

    def weights(self) -> dict[str, Tensor]:
        """Of all three stages."""
        parts = {"denoiser": self.network, "codec": self.model.codec, "conditioner": self.model.conditioner}
        return {
            f"{part}.{name}": weight.detach().clone()
            for part, stage in parts.items()
            for name, weight in stage.named_parameters()
        }

    def promised(self) -> set[str]:
        return {f"denoiser.{name}" for name, one in self.network.named_parameters() if one.requires_grad}

    def train(self) -> None:
        with self.run.lock():
            fit(self.objective, self.network, self.recipe.train, self.run, 0)

    def gradients(self) -> dict[str, Tensor]:
        """Of the first batch."""
        self.network.train()
        torch.manual_seed(0)
        self.objective.losses(0, 0, 1).per_sample.mean().backward()
        found = {
            name: one.grad.clone() for name, one in self.network.named_parameters() if one.grad is not None
        }
        self.network.zero_grad()
        return found


def some(names: Any) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some(ZOO))
def test_a_step_moves_what_is_promised_and_resumes_to_the_bit(name, tmp_path):
    """Law: an adapter's weights (whole: the denoiser's) move, all others stay; 1 + 1 steps are 2; blocks that
    are computed again give the same gradients."""
    lora = ('train = "lora"', "rank = 2")
    with pictures.small():
        for model in (lora, ()):
            output = "lora" if model else "whole"
            recipe, keys = recipe_of(name, tmp_path, *model)
            once = Trained(recipe, [*keys, f"output={tmp_path}/{output}"])
            before = once.weights()
            pulled = {f"denoiser.{key}" for key, slope in once.gradients().items() if slope.any()}
            once.train()
            after = once.weights()
            moved = {key for key in before if not torch.equal(before[key], after[key])}
            assert pulled and pulled <= moved <= once.promised()
            if not model:
                assert not any("lora" in key for key in moved)
                continue
            assert all("lora_" in key for key in moved)
            twice = [f"output={tmp_path}/twice", *keys]
            Trained(recipe, [*twice, "train.steps=1"]).train()
            again = Trained(recipe, twice)
            again.train()
            assert all(torch.equal(one, after[key]) for key, one in again.weights().items())
            plain = Trained(recipe, [*keys, f"output={tmp_path}/plain"])
            usual = plain.gradients()
            body = adapter.peft_target(plain.model.denoiser)
            if blocks.blocks_of(body):
                blocks.recompute(body, 1)
                found = plain.gradients()
                assert found.keys() == usual.keys()
                assert all(torch.allclose(found[k], usual[k], atol=1e-7, rtol=1e-5) for k in found)
