"""Laws of words that others learned: they are read as diffusers reads them, drawn with and gone on from."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import sfumato
from sfumato.cli import app
from sfumato.errors import Refused

from .test_text_encoder_training import kept, train
from .test_training import write_recipe
from .zoo import ZOO


def base(name, folder):
    """A tiny pipeline's folder."""
    if not folder.exists():
        ZOO[name].make(name).save_pretrained(folder)
    return folder


def drawn(*shape):
    """Numbers of the size of an embedding's."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_word_of_another_is_read_as_diffusers_reads_it(tmp_path):
    """Law: the words of diffusers and A1111 mean here what they mean there; they stack."""
    place, D = base("stable-diffusion-1.5", tmp_path / "base"), 32
    save_file({"<cat>": drawn(2, D)}, tmp_path / "a.safetensors")
    save_file({"emb_params": drawn(3, D).half()}, tmp_path / "My-Style.safetensors")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(place, safety_checker=None)
    pipe.load_textual_inversion(str(tmp_path / "a.safetensors"))
    pipe.load_textual_inversion(str(tmp_path / "My-Style.safetensors"), token="My-Style")
    model = sfumato.load(place)
    assert model.add_embedding(tmp_path / "a.safetensors") == "<cat>"
    assert model.add_embedding(tmp_path / "My-Style.safetensors") == "My-Style"
    prompt = "a <cat> in My-Style"
    theirs = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
    torch.testing.assert_close(model.condition([prompt])["tokens"], theirs, atol=1e-5, rtol=1e-5)
    model.save(tmp_path / "saved")
    again = sfumato.load(tmp_path / "saved").condition([prompt])["tokens"]
    torch.testing.assert_close(again, theirs, atol=1e-5, rtol=1e-5)


def test_a_word_of_two_encoders_is_drawn_with_and_gone_on_from(tmp_path):
    """Law: clip_l and clip_g go to their encoders; `--embedding` draws with them, a run begins there."""
    recipe = write_recipe(
        "stable-diffusion-xl", tmp_path, 'train = "tokens"', 'new_tokens = ["<cat>=cat.safetensors"]'
    )
    model, file = sfumato.load(tmp_path / "base"), tmp_path / "cat.safetensors"
    widths = [getattr(model.origin, home).config.hidden_size for home in ("text_encoder", "text_encoder_2")]
    rows = {"clip_l": drawn(2, widths[0]), "clip_g": drawn(2, widths[1])}
    save_file(rows, file)
    model.add_embedding(file, "<cat>")
    said = model.condition(["a <cat>"])
    run = train(recipe, ["data.trigger_words=<cat>", "train.steps=1", "train.learning_rate=0", "train.ema=0"])
    assert [one.shape[0] for one in kept(run).values()] == [2, 2]
    file.rename(tmp_path / "gone.safetensors")
    begun = run.model().condition(["a <cat>"])
    for name in ("tokens", "pooled"):
        torch.testing.assert_close(begun[name], said[name], atol=1e-5, rtol=1e-5)
    asked = [
        "generate",
        str(tmp_path / "base"),
        "-p",
        "a <cat>",
        "--embedding",
        f"<cat>={tmp_path}/gone.safetensors",
    ]
    size = ["--width", "16", "--height", "16", "--steps", "1", "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, [*asked, *size])
    assert done.exit_code == 0, done.output


def test_a_word_that_does_not_fit_is_refused_in_a_sentence(tmp_path):
    """Law: another width, no embedding, a pickle, a word known already, no new words at all."""
    place, D = base("stable-diffusion-1.5", tmp_path / "base"), 32
    model = sfumato.load(place)

    def refused(tensors, word="", name="odd.safetensors"):
        save_file(tensors, tmp_path / name)
        with pytest.raises(Refused) as refusal:
            model.add_embedding(tmp_path / name, word)
        return str(refusal.value)

    assert "numbers a token, but the text" in refused({"emb_params": drawn(2, D + 1)})
    assert "is of another base" in refused({"clip_l": drawn(2, D), "clip_g": drawn(2, D)})
    assert "given as --lora" in refused({"a.lora_up.weight": drawn(2, 2), "a.lora_down.weight": drawn(2, 2)})
    assert "no single word" in refused({"emb_params": drawn(2, D)}, "two words")
    known = next(iter(model.origin.tokenizer.get_vocab()))
    assert "knows the word" in refused({"emb_params": drawn(2, D)}, known)
    (tmp_path / "old.pt").write_bytes(b"PK")
    with pytest.raises(Refused, match="emb_params"):
        model.add_embedding(tmp_path / "old.pt")
    other = sfumato.load(base("pixart-sigma", tmp_path / "pixart"))
    with pytest.raises(Refused, match="no new words"):
        other.add_embedding(tmp_path / "odd.safetensors")
    assert load_file(tmp_path / "odd.safetensors")
