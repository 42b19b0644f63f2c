"""Laws of NaN and infinity: they are never drawn silently; the argument or the weight is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import sfumato
from sfumato.cli import app
from sfumato.errors import Failed, Refused
from sfumato.generation import finite

from .test_training import losses, make_base, write_recipe

NAN, INF = float("nan"), float("inf")
SMALL = {"steps": 2, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_base("stable-diffusion-1.5", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(folder):
    return sfumato.load(folder)


NUMBERS = ("guidance", "pag_scale", "guidance_rescale", "strength")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in NUMBERS for value in (NAN, INF, -INF)),
        *(("guidance_interval", value) for value in (NAN, -INF)),  # a range may have no upper end
    ],
)
def test_an_argument_that_is_no_number_is_refused_by_its_name(name, value, model):
    """Law: whatever takes a number takes a finite one."""
    given = (0.0, value) if name == "guidance_interval" else value
    with pytest.raises(Refused, match=f"^{name}"):
        model.generate("a", **SMALL, **{name: given})


def test_latents_and_times_are_finite(model):
    """Law: also numbers in tensors and lists."""
    with pytest.raises(Refused, match="latents holds what is no finite number"):
        model.generate("a", **SMALL, latents=torch.full((1, *model.latent_shape(16, 16)), NAN))
    with pytest.raises(Refused, match="times holds"):
        model.generate("a", **SMALL, times=[1.0, NAN, 0.0])


@pytest.mark.parametrize("words", [["--guidance", "nan"], ["--guidance", "inf"], ["--guidance", "1e30"]])
def test_the_command_refuses_what_cannot_be_drawn(words, folder, tmp_path):
    """Law: exit code 2, one sentence, no picture."""
    out = tmp_path / "out"
    command = ["generate", str(folder), "-p", "a", "--steps", "2", "--width", "16", "--height", "16"]
    answer = CliRunner().invoke(app, [*command, *words, "--out", str(out)])
    assert answer.exit_code == 2 and "guidance" in answer.stderr
    assert not list(out.glob("*.png"))


PARTS = {
    "denoiser": ("unet", "conv_out.weight"),
    "codec": ("vae", "decoder.conv_out.weight"),
    "conditioner": ("text_encoder", ""),
}


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("stage", list(PARTS))
def test_a_base_with_one_number_that_is_none_is_named(stage, value, folder, tmp_path):
    """Law: the sentence says which weight of which stage."""
    import shutil

    shutil.copytree(folder, tmp_path / "base")
    part, name = PARTS[stage]
    (file,) = (tmp_path / "base" / part).glob("*.safetensors")
    tensors = load_file(file)
    name = name or next(key for key in sorted(tensors) if key.endswith("final_layer_norm.weight"))
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Refused, match=rf"The model's weight {stage}\..*{name.rpartition('.')[0]}"):
        sfumato.load(tmp_path / "base").generate("a red circle", **SMALL)


def test_an_overflow_without_a_culprit_is_a_failure(model, monkeypatch):
    """Law: where all weights are numbers the sentence says what to try."""
    monkeypatch.setattr(type(model), "decode", lambda self, x, *known: torch.full((len(x), 3, 16, 16), INF))
    with pytest.raises(Failed, match="Load the model in float32"):
        model.generate("a", **SMALL)
    heard: list[str] = []
    with finite.said_instead(heard.append):
        assert len(model.generate("a", **SMALL)) == 1
    assert len(heard) == 1


def test_a_preview_that_is_no_number_is_said_and_training_goes_on(tmp_path, monkeypatch, capsys):
    """Law: previews stop no run."""
    recipe = write_recipe("stable-diffusion-1.5", tmp_path, 'train = "lora"', "rank = 2")
    words = ["sample.every=1", "train.sanity=false", 'sample.prompts=["a red circle"]']
    from sfumato.generation import Pipeline

    usual = Pipeline.decode
    monkeypatch.setattr(Pipeline, "decode", lambda self, x, *known: usual(self, x, *known) * NAN)
    run = sfumato.train(recipe, words)
    assert len(losses(run.path)) == 2
    assert "is no finite number" in capsys.readouterr().err
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert any(event["kind"] == "pictures" for event in events)
