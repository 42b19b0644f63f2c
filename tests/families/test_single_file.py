"""Laws of single files: weights in their makers' layout, laid into the networks that a folder describes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.errors import Refused
from sfumato.workflow.export.compare import answers, example_inputs

from . import single_files
from .test_training import losses, write_recipe
from .zoo import ZOO

WAN_WORDS = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "scale_shift_table": "modulation", "proj_out": "head.head", "attn1.norm": "self_attn.norm",
    "attn2.norm": "cross_attn.norm", "attn1": "self_attn", "attn2": "cross_attn", "to_out.0": "o",
    "to_q": "q", "to_k": "k", "to_v": "v", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}  # fmt: skip


def in_wans_words(network: Any) -> dict[str, torch.Tensor]:
    """The weights under the names of Wan's own code: diffusers' converter, backwards."""
    out = {}
    for key, tensor in network.state_dict().items():
        name = f"head.{key}" if key == "scale_shift_table" else key
        for ours, theirs in WAN_WORDS.items():
            name = name.replace(ours, theirs)
        swapped = {"norm2": "norm3", "norm3": "norm2"}
        out[".".join(swapped.get(word, word) for word in name.split("."))] = tensor.contiguous()
    return out


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> tuple[Path, Path]:
    """(a file in Wan's own layout, the folder it was made from)."""
    home = tmp_path_factory.mktemp("wan")
    pipe = ZOO["wan-2.1"].make("wan-2.1")
    pipe.save_pretrained(home / "folder")
    save_file(in_wans_words(pipe.transformer), home / "wan.safetensors")
    return home / "wan.safetensors", home / "folder"


def test_a_file_in_its_makers_layout_answers_as_the_folder(wan, tmp_path):
    """Law: the converted weights are the folder's, wherever the folder has others or none of its own."""
    file, folder = wan
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    for weights in (bare / "transformer").glob("*.safetensors"):
        weights.unlink()
    one, other = sfumato.load(file, config=bare), sfumato.load(folder)
    x, condition = example_inputs(other)
    for mine, theirs in zip(answers(one, x, condition), answers(other, x, condition), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


HELD = {
    "stable-diffusion-1.5": ("unet", "vae", "text_encoder"),
    "stable-diffusion-xl": ("unet", "vae", "text_encoder", "text_encoder_2"),
    "stable-diffusion-3.5": ("transformer", "vae"),
    "flux-dev": ("transformer",),
}
"""Components that files of these makers hold; the others are the folder's."""


def one_file(name: str, home: Path) -> tuple[Path, Path, Path]:
    """(the pipeline as one file, a folder that lacks what the file holds, the whole folder)."""
    torch.manual_seed(0)
    pipe = ZOO[name].make(name)
    pipe.save_pretrained(home / "whole")
    save_file(single_files.whole(name, pipe), home / "model.safetensors")
    shutil.copytree(home / "whole", home / "model")
    for part in HELD[name]:
        for weights in (home / "model" / part).glob("*.safetensors"):
            weights.unlink()
    return home / "model.safetensors", home / "model", home / "whole"


@pytest.mark.parametrize("name", list(HELD))
def test_the_layouts_of_other_makers_are_read_too(name, tmp_path):
    """Law: what the file holds is laid into the networks of a folder that has none of it."""
    file, _, whole = one_file(name, tmp_path)
    one, other = sfumato.load(file), sfumato.load(whole)
    x, condition = example_inputs(other)
    again = example_inputs(one)[1]
    assert all(torch.allclose(again[word], condition[word], atol=1e-5) for word in condition)
    for mine, theirs in zip(answers(one, x, again), answers(other, x, condition), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    assert torch.allclose(one.decode(x), other.decode(x), atol=1e-5)


def test_a_file_is_drawn_with_and_trained_from(tmp_path):
    """Law: a run may go on from a file; it remembers where the file is."""
    file, _, _ = one_file("stable-diffusion-1.5", tmp_path)
    (picture,) = sfumato.load(file).generate(prompt=["a red circle"], steps=2, height=32, width=32)
    assert picture.size == (32, 32)
    shutil.copytree(tmp_path / "whole", tmp_path / "base")
    recipe = write_recipe("stable-diffusion-1.5", tmp_path, 'train = "lora"', "rank = 2")
    run = sfumato.train(recipe, [f"model.base={file}", "train.steps=1", "train.ema=0"])
    assert len(losses(run.path)) == 1
    x, condition = example_inputs(run.model())
    base = sfumato.load(file)
    before, after = (answers(one, x, condition)[0] for one in (base, run.model()))
    assert not torch.equal(before, after)


def test_a_part_that_nobody_has_is_named(tmp_path):
    """Law: what neither file nor folder holds is refused, with the place where it belongs."""
    file, folder, _ = one_file("stable-diffusion-3.5", tmp_path)
    (folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(Refused, match=r'has no "text_encoder".*Put the weights of .* there'):
        sfumato.load(file)


def test_a_network_without_a_converter_takes_its_own_names(tmp_path):
    """Law: where diffusers converts no other layout, its own names are read, and others refused."""
    pipe = ZOO["pixart-sigma"].make("own names")
    pipe.save_pretrained(tmp_path / "model")
    weights = {name: 1.01 * tensor for name, tensor in pipe.transformer.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    network = sfumato.load(tmp_path / "model.safetensors").denoiser.network
    assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())
    save_file({"x_embedder.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(Refused, match="converts no other layout of it"):
        sfumato.load(tmp_path / "other.safetensors", config=tmp_path / "model")


def test_a_folder_beside_the_file_describes_it(wan, tmp_path):
    """Law: model.safetensors beside model/ needs no word more."""
    file, folder = wan
    shutil.copy(file, tmp_path / "model.safetensors")
    (tmp_path / "model").symlink_to(folder)
    assert sfumato.load(tmp_path / "model.safetensors").info["family"] == "Wan"


def test_a_file_without_a_folder_says_what_to_give(wan, tmp_path):
    """Law: nothing is fetched; the sentence names the way out."""
    file, _ = wan
    with pytest.raises(Refused, match="give config="):
        sfumato.load(file)
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(Refused, match="is a pickle"):
        sfumato.load(tmp_path / "model.ckpt")


def test_a_file_of_another_family_is_refused(wan, tmp_path):
    """Law: a folder that describes something else is named, and so is what does not fit."""
    ZOO["flux-dev"].make("flux-dev").save_pretrained(tmp_path / "flux")
    with pytest.raises(Refused, match="does not fit"):
        sfumato.load(wan[0], config=tmp_path / "flux")


def test_diffusers_names_in_one_file_are_taken_too(tmp_path):
    """Law: a denoiser's file under diffusers' own names needs no conversion."""
    pipe = ZOO["stable-diffusion-1.5"].make("other")
    pipe.save_pretrained(tmp_path / "folder")
    (network,) = (tmp_path / "folder" / "unet").glob("*.safetensors")
    changed = {name: tensor * 1.01 for name, tensor in load_file(network).items()}
    save_file(changed, tmp_path / "unet.safetensors")
    model = sfumato.load(tmp_path / "unet.safetensors", config=tmp_path / "folder")
    assert all(torch.equal(changed[k], v) for k, v in model.denoiser.network.state_dict().items())
