"""Laws of text encoders that learn: adapters and new words are trained, kept, drawn and exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import sfumato
from sfumato.errors import Refused
from sfumato.models.lora import adapter
from sfumato.run_folder import RunFolder
from sfumato.workflow.export import export

from . import pictures
from .test_training import losses, write_recipe

LORA = ('train = "lora"', 'train_text_encoder = "lora"', "rank = 4", "alpha = 6.0")
WORDS = ('train = "tokens"', 'new_tokens = ["<cat>=red circle", "<dog>"]')
SAYING = "data.trigger_words=<cat> <dog>"


def train(recipe: Path, keys: Any = ()) -> Any:
    """Without the ladder, which has laws of its own."""
    return sfumato.train(recipe, [*keys, "train.sanity=false"])


def kept(run: Any, group: str = "model") -> dict[str, torch.Tensor]:
    """What the newest checkpoint holds."""
    return load_file(RunFolder.open(run.path).checkpoint_folders()[-1] / f"{group}.safetensors")


def read(model: Any, prompt: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.condition([prompt]).items() if v.is_floating_point()}


def moved(one: Any, other: Any, prompt: str) -> list[str]:
    """The tensors of the condition that differ."""
    mine, theirs = read(one, prompt), read(other, prompt)
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]


def some(*names: str) -> list[Any]:
    """The first quickly, the others among the slow tests."""
    return [name if name == names[0] else pytest.param(name, marks=pytest.mark.slow) for name in names]


LEARNED = {
    "stable-diffusion-1.5": (("text_encoder",), ("tokens",)),
    "stable-diffusion-xl": (("text_encoder", "text_encoder_2"), ("tokens", "pooled")),
    "stable-diffusion-3.5": (("text_encoder", "text_encoder_2"), ("tokens", "pooled")),
    "flux-dev": (("text_encoder",), ("pooled",)),
}


@pytest.mark.parametrize(
    "name", some("stable-diffusion-1.5", "stable-diffusion-xl", "stable-diffusion-3.5", "flux-dev")
)
def test_text_encoders_learn_beside_the_denoiser_and_leave_with_it(name, tmp_path):
    """Law: their adapters are trained and kept; the run reads as it learned, and so does what it exports."""
    recipe = write_recipe(name, tmp_path, *LORA)
    with pictures.small():
        run = train(recipe, ["train.text_learning_rate=2e-2"])
        encoders, tensors = LEARNED[name]
        weights = kept(run)
        assert {key.partition(".")[0] for key in weights} == {"network", *encoders}
        assert kept(run, "ema").keys() == weights.keys()
        assert all(bool(one.any()) for key, one in weights.items() if key.startswith("text"))
        model, base = run.model(), sfumato.load(tmp_path / "base")
        base.info = model.info
        assert tuple(moved(model, base, "a red circle")) == tensors
        for part in encoders:
            adapter.scale(getattr(model.origin, part), 0.0)
        assert moved(model, base, "a red circle") == []
        for to in ("diffusers", "kohya", "comfyui"):
            done = export(run.path, to, tmp_path / to)
            assert done.difference < 1e-4, to
        ours = list(load_file(tmp_path / "diffusers" / "pytorch_lora_weights.safetensors"))
        for part in encoders:
            assert any(key.startswith(f"{part}.text_model.encoder.layers.0.") for key in ours)
        flat = [key for file in (tmp_path / "kohya").iterdir() for key in load_file(file)]
        assert any(key.startswith(("lora_te_text_model_", "lora_te1_text_model_")) for key in flat)
        mine = read(run.model(), "a red circle")
        for to in ("diffusers", "kohya"):
            fresh = sfumato.load(tmp_path / "base")
            fresh.info = model.info
            (file,) = (tmp_path / to).iterdir()
            fresh.add_lora(file)
            torch.testing.assert_close(read(fresh, "a red circle"), mine, atol=1e-4, rtol=1e-4)
        still = [
            f"model.init_adapter={file}",
            "train.learning_rate=0",
            "train.steps=1",
            f"output={tmp_path}/on",
        ]
        further = train(recipe, still).model()
        torch.testing.assert_close(read(further, "a red circle"), mine, atol=1e-4, rtol=1e-4)


def test_a_text_encoder_goes_on_bit_for_bit_and_at_a_rate_of_its_own(tmp_path, capsys):
    """Law: one step, resume, one step end with the bits of two; without a rate its adapter stands still.

    An encoder whose LoRA nobody could read is named.
    """
    recipe = write_recipe("flux-dev", tmp_path, *LORA, "dropout = 0.3")
    once = train(recipe, ["train.text_learning_rate=1e-3"])
    assert "text_encoder_2 (T5EncoderModel) stays as it is" in capsys.readouterr().err
    train(recipe, ["train.text_learning_rate=1e-3", f"output={tmp_path}/twice", "train.steps=1"])
    twice = train(recipe, ["train.text_learning_rate=1e-3", f"output={tmp_path}/twice"])
    for group in ("model", "ema", "optimizer"):
        first, second = kept(once, group), kept(twice, group)
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first), group
    slow = train(recipe, [f"output={tmp_path}/slow", "train.text_learning_rate=1e-9"])
    up = [one for key, one in kept(slow).items() if key.startswith("text") and "lora_B" in key]
    assert up and all(float(one.abs().max()) < 1e-7 for one in up)


@pytest.mark.parametrize("name", some("stable-diffusion-xl", "stable-diffusion-1.5", "flux-dev"))
def test_new_words_are_learned_and_nothing_else_is(name, tmp_path):
    """Law: only the embeddings of new words are trained; the run says them, others read them from files."""
    recipe = write_recipe(name, tmp_path, *WORDS)
    run = train(recipe, [SAYING])
    weights = kept(run)
    assert all(key.endswith(".new") for key in weights)
    assert {len(one) for one in weights.values()} >= {3} or name == "flux-dev"
    model, base = run.model(), sfumato.load(tmp_path / "base")
    base.info = model.info
    assert moved(model, base, "a red circle") == []
    assert "<cat>" in model.origin.tokenizer.get_vocab()
    for encoder in ("text_encoder", "text_encoder_2"):
        if hasattr(model.origin, encoder):
            rows = getattr(model.origin, encoder).get_input_embeddings().rows()
            assert list(rows) == ["<cat>", "<dog>"] and rows["<dog>"].shape[0] == 1
    for to in ("diffusers", "kohya", "comfyui"):
        done = export(run.path, to, tmp_path / to)
        assert done.difference < 1e-4 and done.effect > 0
        assert [file.name for file in done.files] == ["cat.safetensors", "dog.safetensors"]
    with safe_open(tmp_path / "diffusers" / "cat.safetensors", "pt") as opened:
        known = {"stable-diffusion-1.5": {"<cat>"}, "flux-dev": {"clip_l", "t5xxl"}}
        assert set(opened.keys()) == known.get(name, {"clip_l", "clip_g"})
        assert opened.metadata()["trigger_words"] == "<cat>, <dog>"
    model.save(tmp_path / "whole")
    saved = sfumato.load(tmp_path / "whole")
    saved.info = model.info
    torch.testing.assert_close(read(saved, "a <cat>"), read(model, "a <cat>"), atol=1e-6, rtol=1e-5)
    assert len(losses(run.path)) == 2


@pytest.mark.slow
def test_words_and_adapters_learn_together_and_a_run_goes_on_from_them(tmp_path):
    """Law: all three kinds train at once; a run is a base for another, with its words and adapters in it."""
    recipe = write_recipe("stable-diffusion-1.5", tmp_path, *LORA, 'new_tokens = ["<cat>=a circle"]')
    run = train(recipe, ["data.trigger_words=<cat>"])
    assert {key.partition(".")[0] for key in kept(run)} == {"network", "text_encoder"}
    assert export(run.path, "diffusers", tmp_path / "out").difference < 1e-4
    second = train(
        recipe,
        [
            "data.trigger_words=<cat>",
            "model.new_tokens=[]",
            f"model.base={run.path}",
            f"output={tmp_path}/second",
        ],
    )
    model = second.model()
    assert "<cat>" in model.origin.tokenizer.get_vocab()
    assert model.generate(prompt=["a <cat>"], steps=1, height=32, width=32)[0].size == (32, 32)


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        (
            "pixart-sigma",
            ["model.train=lora", "model.train_text_encoder=lora"],
            "loads no LoRA of its text encoders",
        ),
        ("pixart-sigma", ["model.train=tokens", "model.new_tokens=['<cat>']"], "loads no new words"),
        ("stable-diffusion-1.5", ["model.train=tokens"], "model.new_tokens names none"),
        (
            "stable-diffusion-1.5",
            ["model.train=tokens", "model.new_tokens=['<cat>']"],
            'no caption says "<cat>"',
        ),
        (
            "stable-diffusion-1.5",
            ["model.train=tokens", "model.new_tokens=['a']"],
            'knows the word "a" already',
        ),
        ("stable-diffusion-1.5", ["model.train=tokens", "model.new_tokens=['a b']"], "is no single word"),
        (
            "stable-diffusion-1.5",
            ["model.base=scratch", "model.new_tokens=['<a>']"],
            "is for a pretrained base",
        ),
        ("stable-diffusion-1.5", ["model.train=lora", "train.text_learning_rate=1e-4"], "that are trained"),
        (
            "stable-diffusion-1.5",
            ["model.train=lora", "model.train_text_encoder=lora", "model.rank=64"],
            "at most",
        ),
        (
            "stable-diffusion-1.5",
            ["model.train=lora", "model.train_text_encoder=lora", "train.parallel=fsdp"],
            "divides the denoiser alone",
        ),
    ],
)
def test_what_no_text_encoder_can_learn_is_refused(name, keys, words, tmp_path):
    with pytest.raises(Refused, match=words):
        train(write_recipe(name, tmp_path), keys)
    assert not Path(tmp_path / "run").exists()
