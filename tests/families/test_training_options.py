"""Laws of what a recipe may ask of training: every option acts, or is refused in a sentence."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

import sfumato
from sfumato.errors import Refused
from sfumato.models.condition import Condition
from sfumato.models.lora import adapter
from sfumato.models.lora.adapter import AdapterPlan
from sfumato.models.networks import blocks, quantized
from sfumato.recipe import Recipe
from sfumato.theory import convert, get
from sfumato.training.estimate.memory import saved_bytes

from .test_training import asked, losses, make_base, write_recipe

PLAN = AdapterPlan(rank=2)


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    """A tiny PixArt with a LoRA that says something."""
    model = sfumato.load(make_base("pixart-sigma", tmp_path_factory.mktemp("base")))
    network = adapter.peft_target(model.denoiser)
    adapter.attach(network, PLAN, model.denoiser.lora_targets)
    for _, layer in adapter.adapted(network):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return model


def stored_bytes(network) -> int:
    """Bytes that weights and codes take."""
    return sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])


def loss_of(model) -> torch.Tensor:
    """The loss of one fixed batch, as a number that has a gradient."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=draw)
    tokens = torch.randn(2, 5, 32, generator=draw)
    told = Condition({"tokens": tokens, "mask": torch.ones(2, 5, dtype=torch.bool)})
    return model.predict(x, torch.tensor([0.3, 0.6]), told).square().mean()


def gradients(model) -> list[torch.Tensor]:
    model.denoiser.zero_grad()
    loss_of(model).backward()
    return [weight.grad for weight in model.denoiser.parameters() if weight.grad is not None]


@pytest.mark.parametrize(
    ("form", "share", "error"), [("int8", 0.5, 0.02), ("fp8", 0.5, 0.1), ("nf4", 0.4, 0.3)]
)
def test_a_narrow_base_is_smaller_and_nearly_the_same(form, share, error, pixart):
    """Law: stored in 8 or 4 bits the base answers nearly as before, and the adapter learns beside it."""
    model = copy.deepcopy(pixart)
    network = adapter.peft_target(model.denoiser)
    wide, before = stored_bytes(network), loss_of(model).item()
    quantized.quantize_frozen(network, form)
    assert stored_bytes(network) < (1 - share * 0.5) * wide
    assert 0 < abs(loss_of(model).item() / before - 1) < error
    found = gradients(model)
    assert len(found) == sum(weight.requires_grad for weight in network.parameters())
    assert all(bool(one.any()) for one in found)


@pytest.mark.parametrize("form", ["int8", "fp8", "nf4"])
def test_codes_stand_for_the_nearest_numbers(form):
    """Law: what was shrunk is off by less than a step; shrinking it again changes nothing."""
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    codes, scales = quantized.quantize(weight, form)
    wide = quantized.dequantize(codes, scales, (24, 40), torch.float32)
    largest = weight.abs().max()
    assert (wide - weight).abs().max() < {"int8": 0.005, "fp8": 0.07, "nf4": 0.16}[form] * largest
    again = quantized.dequantize(*quantized.quantize(wide, form), (24, 40), torch.float32)
    torch.testing.assert_close(again, wide, rtol=1e-5, atol=1e-6)


def test_bfloat16_base_keeps_trained_weights_wide(pixart):
    """Law: the frozen weights have 16 bits, the trained ones 32."""
    model = copy.deepcopy(pixart)
    before = loss_of(model).item()
    model.denoiser.compute_dtype = quantized.quantize_frozen(adapter.peft_target(model.denoiser), "bfloat16")
    kinds = {weight.requires_grad: weight.dtype for weight in model.denoiser.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16} and model.dtype == torch.float32
    assert 0 < abs(loss_of(model).item() / before - 1) < 0.05
    assert all(grad.dtype == torch.float32 for grad in gradients(model))


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_keeps_less_and_changes_nothing(every, pixart):
    """Law: what is computed again has the gradients it had, and less is saved."""
    model = copy.deepcopy(pixart)
    before, kept = gradients(model), saved_bytes(lambda: loss_of(model), model.denoiser)
    assert blocks.recompute(adapter.peft_target(model.denoiser), every) == 2 // every
    after, fewer = gradients(model), saved_bytes(lambda: loss_of(model), model.denoiser)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert fewer < kept * (0.4 if every == 1 else 0.75)


@pytest.mark.parametrize("form", ["bfloat16", "int8", "fp8", "nf4"])
def test_checkpointing_of_a_narrow_base_changes_nothing(form, pixart):
    """Law: blocks whose frozen weights are stored narrow are computed again as they were."""
    model = copy.deepcopy(pixart)
    network = adapter.peft_target(model.denoiser)
    model.denoiser.compute_dtype = quantized.quantize_frozen(network, form)
    before, kept = gradients(model), saved_bytes(lambda: loss_of(model), model.denoiser)
    blocks.recompute(network, 1)
    after, fewer = gradients(model), saved_bytes(lambda: loss_of(model), model.denoiser)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert fewer < 0.6 * kept


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("form", ["float32", "nf4"])
def test_offloaded_weights_give_the_same_gradients(form, every, pixart, monkeypatch):
    """Law: blocks whose weights come and go answer as before, with nothing to be read where they are away."""
    model = copy.deepcopy(pixart)
    network = adapter.peft_target(model.denoiser)
    quantized.quantize_frozen(network, form)
    before, there = gradients(model), []

    class Poisoned(blocks.OffloadedBlocks):
        def drop(self, place):
            super().drop(place)
            for weight, home in self.homes[place]:
                weight.data = torch.full_like(home, float("nan") if home.is_floating_point() else 77)

        def lend(self, place, following=None):
            super().lend(place, following)
            there.append(sum(one is not None for one in self.there))

    offloaded = Poisoned(blocks.blocks_of(network), torch.device("cpu"))
    blocks.recompute(network, every)
    for _ in range(2):
        after = gradients(model)
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert offloaded.copies >= 3 and max(there) == 2


def test_an_attention_backend_is_used_by_this_network_alone(tmp_path):
    """Law: the layers obey, the answer stays, and the default of all other networks is untouched."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    model = sfumato.load(make_base("flux-dev", tmp_path))
    usual, before = registry.get_active_backend()[0], asked(model, "flux-dev")
    assert blocks.set_attention_backend(model.denoiser.network, "_native_math") >= 3
    assert registry.get_active_backend()[0] == usual
    torch.testing.assert_close(asked(model, "flux-dev"), before, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiled_blocks_answer_as_before(pixart):
    """Law: torch.compile sees each repeated block; gradients are the same up to rounding."""
    from torch._dynamo.utils import counters

    model = copy.deepcopy(pixart)
    before = gradients(model)
    counters.clear()
    assert blocks.compile_blocks(adapter.peft_target(model.denoiser), torch.device("cpu")) == 2
    torch.testing.assert_close(gradients(model), before, atol=1e-5, rtol=1e-3)
    assert counters["stats"]["unique_graphs"] >= 1


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["train.offload=true"], ["train.offload", "on the cpu"]),
        (["model.attention_backend=_native_math"], ["asks for no backend"]),
        (["model.attention_backend=nativ"], ['Did you mean "native"']),
        (["model.attention_backend=flash"], ["does not work on this machine"]),
        (["model.base_quantization=fp4"], ['"fp4"', "Did you mean"]),
        (["model.merge_loras=none.safetensors"], ["none.safetensors does not exist"]),
    ],
)
def test_what_cannot_act_here_is_refused(keys, words, tmp_path):
    """Law: an option this machine or this network cannot follow is one sentence."""
    recipe = write_recipe("pixart-sigma", tmp_path, 'train = "lora"', "rank = 2")
    with pytest.raises(Refused) as refusal:
        sfumato.train(recipe, keys)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(
    ("name", "theory"),
    [
        ("stable-diffusion-1.5", "trigflow"),
        ("pixart-sigma", "flow-matching"),
        ("pixart-sigma", "ddpm-velocity"),
    ],
)
def test_under_another_theory_the_first_loss_is_the_base_s_converted(name, theory, tmp_path):
    """Law: continuing an ε base in another theory loses nothing: the answers are the base's, translated."""
    recipe = write_recipe(name, tmp_path, 'train = "lora"', "rank = 2", f'theory = "{theory}"')
    run = sfumato.train(recipe, ["train.steps=1", "train.log_every=1", "train.warmup_steps=1"])
    base = sfumato.load(tmp_path / "base")
    ready = sfumato.encode(recipe)
    to, objective = ready.model.theory, _objective(Recipe.read(recipe), ready)
    _, x_0, drawn, _ = objective.prepare(0, 0, 1)
    condition = Condition.stack(
        objective.apply_dropout(objective.rows(ready.train.read(objective.order.at(0)[0])), drawn)
    )
    answer = convert.translate(lambda x, t: base.predict(x, t, condition), base.theory, to)
    x_t = to.mix(x_0, drawn.x_T, drawn.t)
    with torch.no_grad():
        error = (answer(x_t, drawn.t) - to.target(x_0, drawn.x_T, drawn.t)).square().mean()
    assert losses(run.path)[0] == pytest.approx(error.item(), rel=1e-5)
    assert to.name == theory and float(drawn.t.max()) <= to.t_noise
    model = run.model()
    (picture,) = model.generate(prompt=["a red circle"], steps=2)
    assert model.theory.name == theory and picture.size == (32, 32)


def _objective(recipe, ready):
    from sfumato.training.objective.diffusion import DiffusionObjective
    from sfumato.workflow.encode_samples import batch_sampler_of

    return DiffusionObjective(
        ready.model, ready.train, batch_sampler_of(recipe, ready.train), recipe.train, recipe.seed, 0.1
    )


def test_a_theory_without_common_times_is_refused(tmp_path):
    """Law: a theory that is singular where it would be asked is refused before training."""
    model = sfumato.load(make_base("stable-diffusion-1.5", tmp_path))
    model.retarget(get("flow-matching"))
    assert model.theory.check().ok and model.theory.t_noise < 1


def test_what_is_trained_against_a_preset_is_the_difference_to_it(tmp_path, pixart):
    """Law: a LoRA file becomes part of the base, and a run that began with it loads with it."""
    recipe = write_recipe("pixart-sigma", tmp_path, 'train = "lora"', "rank = 2")
    network = adapter.peft_target(pixart.denoiser)
    tensors = {f"transformer.{name}": tensor for name, tensor in adapter.state(network).items()}
    told = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 2})}
    save_file(tensors, tmp_path / "style.safetensors", metadata=told)
    run = sfumato.train(recipe, [f"model.merge_loras={tmp_path}/style.safetensors", "train.learning_rate=0"])
    model, base = run.model(), sfumato.load(tmp_path / "base")
    base.info = model.info
    base.add_lora(tmp_path / "style.safetensors", 1.0)
    torch.testing.assert_close(
        asked(model, "pixart-sigma"), asked(base, "pixart-sigma"), atol=1e-6, rtol=1e-5
    )
    plain = sfumato.load(tmp_path / "base")
    plain.info = model.info
    assert not torch.allclose(asked(plain, "pixart-sigma"), asked(base, "pixart-sigma"), atol=1e-4)
