"""Laws of pushing: what leaves is listed first, is nothing else, and is drawn from again by everybody."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import sfumato
from sfumato import cli
from sfumato.errors import Failed, Refused
from sfumato.run_folder import RunFolder
from sfumato.workflow.export import push as pushing

from .test_training import make_base, write_recipe

PROMPT = "a red circle"


@pytest.fixture
def trained(hub, tmp_path, monkeypatch):
    """(Hub, run): a LoRA on acme/tiny, of which pictures were drawn, by somebody who is known to the Hub."""
    base = make_base("stable-diffusion-1.5", tmp_path)
    (base / "README.md").write_text("---\nlicense: openrail\n---\n# Tiny\n")
    hub.commit = hub.add("acme/tiny", base)
    recipe = write_recipe("stable-diffusion-1.5", tmp_path, 'train = "lora"', "rank = 2")
    recipe.write_text(recipe.read_text().replace('base = "base"', 'base = "acme/tiny"'))
    said = [
        "train.sanity=false",
        "train.steps=2",
        "sample.every=2",
        "sample.steps=2",
        "train.learning_rate=1",
    ]
    run = sfumato.train(recipe, [*said, 'data.trigger_words="sks"'])
    with RunFolder.open(run.path).lock() as folder:
        folder.event("evaluation", step=2, metrics={"kernel_distance": {"value": 0.5, "error": 0.125}})
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.chdir(tmp_path)
    return hub, run


def command(*words):
    """The exit code of `sfumato export`."""
    try:
        cli.app(["export", *map(str, words)], standalone_mode=False)
    except SystemExit as done:
        return done.code
    return 0


@pytest.mark.slow
def test_a_lora_is_listed_then_sent_then_drawn_from_again(trained, tmp_path, capsys):
    """Law: nothing leaves without --yes; the card is the Hub's; sfumato and diffusers load what was sent."""
    from diffusers import StableDiffusionPipeline

    hub, run = trained
    assert command(run.path, "--push", "me/circles") == 0
    said = capsys.readouterr().out
    assert (
        "Nothing was sent" in said and "for everybody" in said and "models/me/circles" not in hub.repositories
    )
    assert not [path for verb, path, _ in hub.requests if verb in ("POST", "PUT")]
    assert command(run.path, "--push", "me/circles", "--private", "--yes", "--json") == 0
    found = json.loads(capsys.readouterr().out)["push"]
    assert hub.repositories["models/me/circles"].private
    files = hub.files("me/circles")
    assert {name: len(content) for name, content in files.items()} == found["files"]
    assert set(files) == {"README.md", "pytorch_lora_weights.safetensors", "images/00.png"}

    card = ModelCard(files["README.md"].decode())
    card.validate()
    assert (card.data.base_model, card.data.license) == ("acme/tiny", "openrail")
    assert card.data.instance_prompt == "sks" and card.data.to_dict()["base_model_relation"] == "adapter"
    assert card.data.widget == [{"text": PROMPT, "output": {"url": "images/00.png"}}]
    assert (
        "train.steps = 2" in card.text
        and hub.commit in card.text
        and "kernel distance | 0.5 ± 0.12 | 2" in card.text
    )
    assert "train.sanity" in card.text and "weight_decay" not in card.text  # what was said, no defaults
    for name, content in files.items():
        for secret in (tmp_path, Path.home(), "blurry", "pictures/"):  # places; a caption of the data
            assert str(secret).encode() not in content, (name, secret)

    ours = run.model().generate(prompt=[PROMPT], seed=3, steps=2, height=32, width=32)
    again = sfumato.load("me/circles").generate(prompt=[PROMPT], seed=3, steps=2, height=32, width=32)
    plain = sfumato.load("acme/tiny").generate(prompt=[PROMPT], seed=3, steps=2, height=32, width=32)
    assert _apart(ours, again) <= 1 < _apart(ours, plain)
    from sfumato.models.pretrained.pipeline_folder import find_model

    pipe = StableDiffusionPipeline.from_pretrained(find_model("acme/tiny"), safety_checker=None)
    pipe.load_lora_weights(find_model("me/circles").parent)
    assert pipe.get_active_adapters()


def _apart(one, other) -> int:
    """The largest difference of two pictures, of 255."""
    import numpy

    return int(abs(numpy.asarray(one[0], int) - numpy.asarray(other[0], int)).max())


def test_a_whole_model_is_sent_without_the_place_it_came_from(hub, tmp_path, monkeypatch):
    """Law: diffusers writes absolute paths into configs; none leaves."""
    base = make_base("dit", tmp_path)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.chdir(tmp_path)
    assert command(base, "--push", "me/dit", "--yes") == 0
    files = hub.files("me/dit")
    assert "model_index.json" in files and "README.md" in files
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    before = sfumato.load(base).denoiser.state_dict()
    after = sfumato.load("me/dit").denoiser.state_dict()
    assert all(torch.equal(one, after[name]) for name, one in before.items())


def test_what_cannot_be_sent_is_refused(hub, tmp_path, monkeypatch, capsys):
    """Law: options that do not fit, a name that is none, a token that may not write."""
    base = make_base("dit", tmp_path)
    monkeypatch.chdir(tmp_path)
    for words, sentence in {
        ("--yes",): "--yes belongs to --push",
        ("--push", "me/dit", "--to", "comfyui"): "--push sends what diffusers loads",
        ("--push", "dit"): "is no name of a repository",
        ("--push", "me/dit", "--yes"): "hf auth login",
    }.items():
        assert command(base, *words) == 2
        assert sentence in capsys.readouterr().err
    (tmp_path / "note.json").write_text(json.dumps({"from": str(tmp_path / "runs")}))
    with pytest.raises(Failed, match="a place on this machine; nothing was sent"):
        pushing._must_not_tell(tmp_path / "note.json", [tmp_path / "runs"])
    with pytest.raises(Refused, match="is a LoRA alone"):
        hub.add("me/orphan", {"a.safetensors": _empty_lora(tmp_path)})
        sfumato.load("me/orphan")


def _empty_lora(folder: Path) -> bytes:
    from safetensors.torch import save_file

    save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, folder / "a.safetensors")
    return (folder / "a.safetensors").read_bytes()
