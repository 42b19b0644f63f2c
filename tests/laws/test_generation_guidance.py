"""Laws of guidance: every form of guidance acts or is refused, and a model can be asked under any theory."""

import math

import pytest
import torch

from sfumato.errors import Refused
from sfumato.generation import Pipeline
from sfumato.generation.guidance import GuidanceOptions
from sfumato.models import Condition, new_codec, new_model
from sfumato.models.guidance_policy import GuidancePolicy
from sfumato.models.interface import Conditioner
from sfumato.models.settings import ModelSettings
from sfumato.recipe import Recipe
from sfumato.theory import get, translate
from sfumato.workflow.checks import check_guidance

SETTINGS = ModelSettings(codec="pixels", text_encoder="none", width=32, depth=3, heads=4, patch=4)


class Letters(Conditioner):
    """A prompt is a row of numbers."""

    kind = "letters"
    width = 8

    def forward(self, prompt, **options):
        codes = [[float(ord(letter)) / 50 for letter in f"{text:<8}"[:8]] for text in prompt]
        return Condition({"tokens": torch.tensor(codes)[:, None], "pooled": torch.tensor(codes)})

    def encode_empty(self, count):
        return self([""] * count)

    def config(self):
        return {}


def painter(seed: int = 0, theory: str = "flow-matching", conditioner: Conditioner | None = None):
    """A model of lively random weights."""
    codec = new_codec(SETTINGS)
    model = new_model(
        ModelSettings(**{**vars(SETTINGS), "theory": theory}), codec, conditioner or Letters(), seed
    )
    generator = torch.Generator().manual_seed(seed)
    for weight in model.denoiser.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.15
    model.info |= {"resolution": 16, "steps": 6}
    return Pipeline(model.theory, codec, model.conditioner, model.denoiser.eval(), model.info)


@torch.no_grad()
def drawn(model, **said):
    codec, model.codec.decode = model.codec.decode, lambda x: x
    try:
        states = []
        model.decode = lambda x, *pieces: states.append(x) or torch.zeros(len(x), 3, 4, 4)
        model.generate(["cat", "dog"], seed=3, guidance=said.pop("guidance", 4.0), **said)
        return states[0]
    finally:
        model.codec.decode = codec
        del model.decode


WAYS = {
    "zero star": {"guidance_form": "cfg-zero-star"},
    "projected": {"guidance_form": "apg"},
    "rescaled": {"guidance_rescale": 0.7},
    "interval": {"guidance_interval": (0.3, 3.0)},
    "perturbed": {"pag_scale": 2.0},
    "perturbed alone": {"pag_scale": 2.0, "guidance": 1.0},
    "autoguided": {"autoguidance_model": painter(1)},
    "autoguided by another theory": {"autoguidance_model": painter(1, "ddpm-velocity")},
    "all": {
        "guidance_form": "apg",
        "guidance_rescale": 0.5,
        "guidance_interval": (0.1, 9.0),
        "pag_scale": 1.0,
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_lean_changes_the_picture_and_keeps_it_finite(way):
    model = painter()
    plain, other = drawn(model), drawn(model, **dict(WAYS[way]))
    assert bool(other.isfinite().all())
    assert float((plain - other).abs().max()) > 1e-3


def test_what_does_nothing_gives_the_plain_picture():
    """Law: a share of 0, an interval of everything and oneself as the weaker model are no change."""
    model = painter()
    plain = drawn(model)
    for same in (
        {"guidance_interval": (0.0, math.inf)},
        {"pag_scale": 0.0},
        {"guidance_rescale": 0.0},
    ):
        torch.testing.assert_close(drawn(model, **same), plain)
    own = drawn(model, autoguidance_model=model)
    torch.testing.assert_close(own, drawn(model, guidance=1.0), rtol=1e-3, atol=1e-3)


def test_the_answers_of_one_time_come_from_one_call():
    model, sizes = painter(), []
    hook = model.denoiser.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    drawn(model, pag_scale=1.0)
    assert set(sizes) == {6}  # two pictures: prompted, unprompted, disturbed
    sizes.clear()
    drawn(model, guidance_interval=(0.3, 3.0))
    assert set(sizes) == {2, 4}  # outside the interval, the prompted ones alone
    hook.remove()


@torch.no_grad()
def test_disturbed_attention_is_a_matter_of_the_sample():
    network = painter().denoiser
    x, clock, told = torch.randn(2, 3, 16, 16), torch.full((2,), 500.0), Letters()(["cat", "dog"])
    mixed = network(x, clock, Condition({**told, "perturbed": torch.tensor([False, True])}))
    torch.testing.assert_close(mixed[0], network(x, clock, told)[0], rtol=1e-4, atol=1e-4)
    assert float((mixed[1] - network(x, clock, told)[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "said, words",
    [
        ({"guidance_form": "apq"}, 'mean "apg"'),
        ({"guidance_rescale": 1.5}, "between 0 and 1"),
        ({"guidance_interval": (3.0, 0.3)}, "the lower first"),
        ({"pag_scale": -1.0}, "0 or above"),
        ({"guidance_rescale": 0.5, "guidance": 1.0}, "guidance other than 1"),
        ({"autoguidance_model": painter(1), "negative": "dog"}, "one of them"),
    ],
)
def test_what_would_not_act_is_refused(said, words):
    with pytest.raises(Refused, match=words):
        drawn(painter(), **said)


def test_a_network_that_cannot_be_disturbed_says_so():
    model = painter()
    model.denoiser.guidance = GuidancePolicy()
    with pytest.raises(Refused, match="our DiT does"):
        drawn(model, pag_scale=1.0)
    with pytest.raises(Refused, match="how this model leans by itself"):
        model.denoiser.guidance = GuidancePolicy(has_own_form=True)
        GuidanceOptions(form="apg").validate(model.denoiser, True, False)


# ---------------------------------------------------------------- a model under another theory


@pytest.mark.parametrize("name", ["ddpm-velocity", "edm", "trigflow", "gvp"])
def test_a_model_under_another_theory_is_its_translation_with_gradients(name):
    """Law: predict of model.under(B) = translate(predict, A → B), down to the gradient of the weights."""
    model, theory = painter(), get(name)
    under, told = model.with_theory(theory), Letters()(["cat", "dog"])
    x_t, t = torch.randn(2, 3, 16, 16), theory.time_at(torch.tensor([1.0, -2.0])).float()
    wanted = translate(lambda x, s: model.predict(x, s, told), model.theory, theory)(x_t, t)
    found = under.predict(x_t, t, told)
    torch.testing.assert_close(found, wanted)
    weight = model.denoiser.leave.weight
    for answer in (found, wanted):
        answer.square().mean().backward()
    assert weight.grad is not None and float(weight.grad.abs().max()) > 0


def test_a_model_draws_the_same_picture_under_every_theory_of_the_same_ends():
    model = painter()
    plain = drawn(model)
    for name in ("trigflow", "gvp", "ddpm-velocity"):
        theory = get(name, zero_terminal_snr=True) if name.startswith("ddpm") else get(name)
        moved = drawn(model.with_theory(theory))
        assert float((moved - plain).abs().max()) < 2e-3 * float(plain.abs().max())
    back = model.with_theory(get("trigflow")).with_theory(model.theory)
    torch.testing.assert_close(drawn(back), plain, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- what a recipe says


def test_a_model_draws_as_its_recipe_said_unless_told_otherwise():
    """Law: info["guidance_options"] stands for the same arguments; what is said at a call goes before it."""
    model, said = painter(), {"form": "apg", "rescale": 0.5, "interval": [0.1, 9.0]}
    wanted = drawn(model, guidance_form="apg", guidance_rescale=0.5, guidance_interval=(0.1, 9.0))
    plain, unguided = drawn(model), drawn(model, guidance=1.0)
    model.info["guidance_options"] = said
    assert torch.equal(drawn(model), wanted) and not torch.equal(wanted, plain)
    assert torch.equal(drawn(model, guidance=1.0), unguided)  # nothing to shape: left out, not refused
    back = {"guidance_form": "cfg", "guidance_rescale": 0.0, "guidance_interval": (0.0, math.inf)}
    torch.testing.assert_close(drawn(model, **back), plain)
    with pytest.raises(Refused, match="guidance_form shapes guidance"):
        drawn(model, guidance=1.0, guidance_form="apg")


def test_a_weaker_model_may_be_named_by_its_folder_and_is_read_once(monkeypatch):
    model, weaker, read = painter(), painter(1), []
    monkeypatch.setattr(
        "sfumato.generation.pipeline.load", lambda place, device: read.append(place) or weaker
    )
    wanted = drawn(model, autoguidance_model=weaker)
    torch.testing.assert_close(drawn(model, autoguidance_model="runs/weak"), wanted)
    model.info["guidance_options"] = {"autoguidance_model": "runs/weak"}
    torch.testing.assert_close(drawn(model), wanted)
    assert read == ["runs/weak"]


@pytest.mark.parametrize(
    "keys, words",
    [
        (["sample.guidance=1", "sample.guidance_form=apg"], "guidance_form shapes guidance"),
        (["sample.guidance_form=agp"], 'mean "apg"'),
        (["sample.guidance_rescale=2"], "at most 1"),
        (["sample.guidance_interval=[3.0, 1.0]"], "the lower first"),
        (["model.denoiser=unet", "sample.pag_scale=1"], "attention can be disturbed"),
        (["sample.autoguidance_model=nowhere"], "nowhere"),
        (["sample.guidance_resale=1"], 'mean "sample.guidance_rescale"'),
    ],
)
def test_a_recipe_whose_guidance_would_not_act_is_refused(tmp_path, keys, words):
    file = tmp_path / "recipe.toml"
    file.write_text('[data]\ntrain = "shapes"\n')
    with pytest.raises(Refused, match=words):
        recipe = Recipe.read(file, keys)
        check_guidance(recipe, new_codec(SETTINGS), Letters(), None)


def test_a_recipe_whose_guidance_acts_is_taken(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text("[sample]\nguidance_form = 'apg'\nguidance_interval = [0.2, 5]\nguidance_perturbed = 1\n")
    recipe = Recipe.read(file)
    check_guidance(recipe, new_codec(SETTINGS), Letters(), None)
    assert recipe.sample.guidance_options == {"form": "apg", "interval": [0.2, 5.0], "pag_scale": 1.0}
