"""Laws of the three stages and of the model that binds them."""

import json
import shutil

import pytest
import torch

from sfumato.errors import Failed, Refused
from sfumato.generation import as_pipeline, load
from sfumato.models import Condition, Model, load_codec, new_codec, new_conditioner, new_model, save
from sfumato.models.networks.dit import DiT
from sfumato.models.settings import ModelSettings
from sfumato.theory import names
from sfumato.trust import trusting

TINY = {"width": 32, "depth": 2, "heads": 4, "latent_channels": 4, "codec_width": 8}
DENOISERS = {"dit": {"patch": 2}, "unet": {"depth": 2}}


def tiny(**changes) -> ModelSettings:
    return ModelSettings(**{**TINY, **changes})


@pytest.fixture
def pixels():
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def words(lengths: list[int], width: int = 24) -> Condition:
    """A condition of prompts with these numbers of tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        {"tokens": torch.randn(n, width, generator=generator), "pooled": torch.randn(width)} for n in lengths
    ]
    return Condition.stack(rows)


def lively(network: torch.nn.Module) -> torch.nn.Module:
    """The network with every weight drawn anew, so that nothing stays at zero."""
    generator = torch.Generator().manual_seed(2)
    for weight in network.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    return network


def test_a_condition_survives_being_taken_apart_and_stacked_again():
    condition = words([3, 1, 5])
    again = Condition.stack([condition.row(i) for i in range(3)])
    assert again.size == 3
    for name in condition:
        torch.testing.assert_close(again[name], condition[name])


def test_a_condition_of_uneven_tensors_is_refused():
    with pytest.raises(Refused, match="one batch size"):
        Condition({"pooled": torch.zeros(2, 3), "labels": torch.zeros(3)})


def test_an_unconditional_batch_still_has_a_length():
    assert Condition.join(Condition({}, size=2), Condition({}, size=3)).size == 5


def test_an_answer_does_not_depend_on_the_batch_it_is_given_in():
    network = lively(DiT(4, 32, 2, 4, patch=2, text_width=24))
    x, clock, condition = torch.randn(3, 4, 8, 8), torch.tensor([10.0, 500.0, 900.0]), words([3, 1, 5])
    together = network(x, clock, condition)
    for i in range(3):
        alone = network(x[i : i + 1], clock[i : i + 1], Condition.stack([condition.row(i)]))
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["tokens", "pooled"])
def test_the_dit_listens_to_every_part_of_its_condition(part):
    network = lively(DiT(4, 32, 2, 4, patch=2, text_width=24))
    x, clock, condition = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), words([4])
    other = Condition({**condition, part: condition[part].flip(-1)})
    assert (network(x, clock, condition) - network(x, clock, other)).abs().max() > 1e-3


def test_the_dit_knows_where_a_token_lies():
    """Latents that are the same everywhere get different answers in different places."""
    network = lively(DiT(4, 32, 2, 4, patch=1, text_width=0))
    out = network(torch.ones(1, 4, 4, 4), torch.tensor([500.0]), Condition({}, size=1))
    assert out.flatten(2).std(-1).min() > 1e-3


def test_a_new_dit_answers_zero():
    network = DiT(4, 32, 2, 4, text_width=24)
    assert network(torch.randn(2, 4, 4, 6), torch.tensor([1.0, 2.0]), words([2, 3])).abs().max() == 0


@pytest.mark.parametrize("theory", names())
@pytest.mark.parametrize("denoiser", DENOISERS)
def test_every_network_draws_under_every_theory(denoiser, theory, pixels):
    settings = tiny(denoiser=denoiser, theory=theory, text_encoder="none", **DENOISERS[denoiser])
    codec = new_codec(settings)
    codec.fit_normalization(pixels)
    model = as_pipeline(new_model(settings, codec, new_conditioner(settings)))
    lively(model.denoiser)
    try:
        (picture,) = model.generate(steps=2, width=32, height=32)
    except Refused as refusal:
        assert "singular" in str(refusal) or "t =" in str(refusal)
    else:
        assert picture.size == (32, 32)


@pytest.mark.parametrize("codec", ["auto", "kl", "tiny"])
def test_latents_of_a_settled_codec_are_normalized(codec, pixels):
    made = new_codec(tiny(codec=codec))
    made.prepare(pixels)
    made.fit_normalization(pixels)
    latents = made.encode(pixels)
    assert latents.shape == (6, 4, 4, 4)
    assert abs(latents.mean()) < 1e-4 and abs(latents.std() - 1) < 0.15
    assert made.decode(latents).shape == pixels.shape


def test_the_residual_codec_starts_at_the_principal_components(pixels):
    """With as many channels as a patch has numbers, nothing is lost before any training."""
    codec = new_codec(tiny(codec_stride=2, latent_channels=12))
    codec.prepare(pixels)
    codec.fit_normalization(pixels)
    torch.testing.assert_close(codec.decode(codec.encode(pixels)), pixels, atol=1e-3, rtol=0)


def test_a_sample_of_the_posterior_lies_around_its_mode(pixels):
    codec = new_codec(tiny())
    codec.prepare(pixels)
    noise = torch.randn(6, 4, 4, 4)
    mode, sample = codec.encode(pixels), codec.encode(pixels, noise)
    expected = mode + (codec.log_variance / 2).exp() * noise / codec.scale
    torch.testing.assert_close(sample, expected)


def test_a_size_the_codec_cannot_take_is_refused_with_one_that_it_can():
    with pytest.raises(Refused, match=r"multiples of 8.*Choose 32×24"):
        new_codec(tiny()).check_size(33, 30)


@pytest.mark.parametrize("codec", ["auto", "kl", "tiny", "pixels"])
def test_a_saved_model_draws_the_same_picture(codec, tmp_path, pixels):
    settings = tiny(codec=codec, text_encoder="none", denoiser="dit", patch=2)
    made = new_codec(settings)
    if codec != "pixels":
        made.fit_normalization(pixels)
    model = as_pipeline(new_model(settings, made, new_conditioner(settings)))
    lively(model.denoiser)
    model.info["resolution"] = 16
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.generate(seed=3, steps=2)[0].tobytes() == model.generate(seed=3, steps=2)[0].tobytes()
    if codec != "pixels":
        assert load_codec(tmp_path / "model").fingerprint() == made.fingerprint()


def test_a_fingerprint_sees_every_weight(pixels):
    one, other = new_codec(tiny(), seed=0), new_codec(tiny(), seed=0)
    assert one.fingerprint() == other.fingerprint()
    other.scale[0] += 1e-6
    assert one.fingerprint() != other.fingerprint()


def test_a_damaged_model_is_named(tmp_path):
    settings = tiny(codec="pixels", text_encoder="none")
    save(new_model(settings, new_codec(settings), new_conditioner(settings)), tmp_path / "model")
    file = tmp_path / "model" / "denoiser" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(Failed, match=r"weights\.safetensors is damaged"):
        load(tmp_path / "model")


def test_weights_of_another_shape_are_refused(tmp_path):
    settings = tiny(codec="pixels", text_encoder="none")
    save(new_model(settings, new_codec(settings), new_conditioner(settings)), tmp_path / "model")
    described = tmp_path / "model" / "denoiser" / "stage.json"
    plain = json.loads(described.read_text())
    plain["config"]["width"] = 64
    described.write_text(json.dumps(plain))
    with pytest.raises(Refused, match="does not fit a dit"):
        load(tmp_path / "model")


def test_what_holds_no_model_is_refused_with_the_way_out(tmp_path):
    for folder, rule in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path, "holds no model.json"),
        ("someone/model", "nothing is fetched"),
    ):
        with pytest.raises(Refused, match=rule):
            load(folder)


def test_an_unprompted_model_refuses_a_prompt():
    settings = tiny(codec="pixels", text_encoder="none")
    model = as_pipeline(new_model(settings, new_codec(settings), new_conditioner(settings)))
    with pytest.raises(Refused, match="trained without conditions"):
        model.generate("a red apple", steps=1, width=8, height=8)


def test_lists_of_different_lengths_are_refused():
    settings = tiny(codec="pixels", text_encoder="none")
    model = as_pipeline(new_model(settings, new_codec(settings), new_conditioner(settings)))
    with pytest.raises(Refused, match="prompt: 2, seed: 3"):
        model.generate(["", ""], seed=[1, 2, 3])


OWN = """
import torch
from sfumato.models import Condition, Conditioner, Denoiser

class Average(Denoiser):
    kind = "average"
    def __init__(self, channels, **rest):
        super().__init__()
        self.channels = channels
        self.weight = torch.nn.Parameter(torch.ones(channels, 1, 1))
    def config(self):
        return {"channels": self.channels}
    def forward(self, x, clock, condition):
        return x * self.weight
"""


def test_a_network_of_ones_own_is_built_saved_and_loaded(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    settings = tiny(codec="pixels", text_encoder="none", denoiser=f"{tmp_path / 'mine.py'}:Average")
    with trusting():
        model = as_pipeline(new_model(settings, new_codec(settings), new_conditioner(settings)))
        model.save(tmp_path / "model")
        again = load(tmp_path / "model")
    arguments = {"seed": 1, "steps": 2, "width": 8, "height": 8}
    assert again.generate(**arguments)[0].tobytes() == model.generate(**arguments)[0].tobytes()


def test_saving_replaces_an_older_model_whole(tmp_path):
    settings = tiny(codec="pixels", text_encoder="none")
    model = new_model(settings, new_codec(settings), new_conditioner(settings))
    save(model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "codec")
    save(model, tmp_path / "model")
    assert isinstance(load(tmp_path / "model"), Model)
