"""Laws of frozen bases kept narrow: a plan and a probe ask the network as training does."""

import pytest
import torch
from typer.testing import CliRunner

import sfumato
from sfumato.cli import app
from sfumato.models.lora import adapter
from sfumato.models.lora.adapter import AdapterPlan
from sfumato.models.networks import quantized
from sfumato.training.estimate.memory import count_memory

from .test_training import losses, make_base, write_recipe

PLANNED = (
    "stable-diffusion-1.5",
    "stable-diffusion-xl",
    "stable-diffusion-3.5",
    "flux-dev",
    "qwen-image",
    "wan-2.1",
)
QUICK = ("qwen-image", "wan-2.1")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in PLANNED]
)
def test_a_run_on_a_bfloat16_base_is_planned_and_trained(name, tmp_path):
    """Law: plan ends with a plan, whatever the precision, and training takes its steps."""
    recipe = write_recipe(name, tmp_path, 'train = "lora"', "rank = 2", 'base_quantization = "bfloat16"')
    for precision in ("fp32", "bf16"):
        answer = CliRunner().invoke(app, ["plan", str(recipe), f"train.precision={precision}"])
        assert answer.exit_code == 0, answer.exception
    run = sfumato.train(recipe, ["train.steps=1"])
    assert len(losses(run.path)) == 1


@pytest.mark.slow
def test_a_bfloat16_base_learns_beside_a_text_encoder(tmp_path):
    """Law: also inside the network that holds text encoders that learn."""
    recipe = write_recipe("stable-diffusion-1.5", tmp_path, 'train = "lora"', "rank = 2")
    more = ["model.base_quantization=bfloat16", 'model.train_text_encoder="lora"']
    assert CliRunner().invoke(app, ["plan", str(recipe), *more]).exit_code == 0
    assert len(losses(sfumato.train(recipe, [*more, "train.steps=1"]).path)) == 1


def test_a_denoiser_answers_as_its_model_does(tmp_path):
    """Law: asked directly a denoiser on a bfloat16 base gives the very answer of `predict`, gradients too."""
    model = sfumato.load(make_base("pixart-sigma", tmp_path))
    network = adapter.peft_target(model.denoiser)
    adapter.attach(network, AdapterPlan(rank=2), model.denoiser.lora_targets)
    model.denoiser.compute_dtype = quantized.quantize_frozen(network, "bfloat16")
    x, condition = torch.randn(1, 4, 8, 8), model.condition(["a red circle"])
    t = torch.tensor([0.5], dtype=torch.float64)
    told = model.theory.clock(t).float()
    scaled = x * model.theory.input_scale(t).float().view(-1, 1, 1, 1)
    answer = model.denoiser(scaled, told, condition)
    assert answer.dtype == torch.bfloat16
    assert torch.equal(answer.float(), model.predict(x, 0.5, condition))
    answer.float().square().mean().backward()
    numbers = sum(one.nbytes for one in model.denoiser.parameters() if not one.requires_grad)
    counted = count_memory(model.denoiser, (scaled, told, condition))
    assert counted.frozen >= numbers and counted.flops > 0
