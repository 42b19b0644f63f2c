"""Laws of files of weights: scaled fp8 is what it was before, no weight is random, no key is ignored."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.errors import Refused
from sfumato.models.scaled_weights import dequantize

from . import single_files
from .test_single_file import in_wans_words
from .zoo import ZOO

FP8 = torch.float8_e4m3fn


def blocks(weight: torch.Tensor) -> torch.Tensor:
    """The greatest number of each quarter of each row, [rows, 4, 1]."""
    return weight.view(len(weight), 4, -1).abs().amax(-1, keepdim=True)


AMAX = {
    "one": lambda w: w.abs().max(),
    "one in a row": lambda w: w.abs().max()[None],
    "rows": lambda w: w.abs().amax(1),
    "a column": lambda w: w.abs().amax(1, keepdim=True),
    "blocks": blocks,
}
"""Shapes in which scales occur, each as the greatest number it stands for."""


def narrowed(
    weights: dict[str, torch.Tensor], end: str = "scale_weight", shape: str = "one"
) -> dict[str, torch.Tensor]:
    """The matrices stored as fp8 with a scale beside each, as ComfyUI and musubi-tuner write them."""
    out: dict[str, torch.Tensor] = {}
    for key, tensor in weights.items():
        if not key.endswith(".weight") or tensor.ndim != 2 or tensor.shape[1] % 4:
            out[key] = tensor.contiguous()
            continue
        scale = AMAX[shape](tensor) / 448
        wide = scale.repeat_interleave(tensor.shape[1] // 4, 1)[..., 0] if shape == "blocks" else scale
        wide = wide[:, None] if shape == "rows" else wide
        out[key] = (tensor / wide).to(FP8)
        out[f"{key.removesuffix('weight')}{end}"] = scale.float().contiguous()
    return out


def distance(one: Any, other: Any) -> float:
    """The relative difference of all weights of two networks; fp8 alone makes 0.03."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    apart = sum(float((mine[key].float() - theirs[key].float()).square().sum()) for key in mine)
    return (apart / sum(float(one.float().square().sum()) for one in theirs.values())) ** 0.5


@pytest.mark.parametrize("shape", list(AMAX))
@pytest.mark.parametrize("end", ["scale_weight", "weight_scale"])
def test_a_scaled_weight_is_what_it_was(shape, end):
    """Law: weight · scale gives the numbers back to fp8's own rounding, whatever a scale stands for."""
    weight = (
        torch.randn(24, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 24)[:, None]
    )
    stored = narrowed({"a.weight": weight}, end, shape) | {
        "scaled_fp8": torch.zeros(2),
        "a.scale_input": torch.ones(1),
    }
    (name,) = (back := dequantize(stored, torch.float32, "here"))
    assert name == "a.weight"
    assert (back[name] - weight).norm() / weight.norm() < 0.04


def test_blocks_of_128_are_scaled_by_their_own():
    """Law: weight_scale_inv is a factor of each block of 128×128, the last ones cut off."""
    weight, scale = torch.ones(130, 200).to(FP8), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    back = dequantize({"a.weight": weight, "a.weight_scale_inv": scale}, torch.float32, "here")["a.weight"]
    assert back[0, 0] == 1 and back[0, 199] == 2 and back[129, 127] == 3 and back[128, 128] == 4


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ({"a.weight_scale": torch.ones(5)}, "is of shape"),
        ({"a.weight_scale": torch.tensor(float("nan"))}, "a.weight_scale is not finite"),
        (
            {"a.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)},
            'stored as "nvfp4"',
        ),
        ({"a.comfy_quant": torch.tensor(list(b"[["), dtype=torch.uint8)}, "only float8"),
        ({"a.weight": torch.ones(8, 8, dtype=torch.uint8), "a.weight_scale": torch.ones(1)}, "packed bytes"),
    ],
)
def test_a_scale_of_another_kind_is_refused(beside, words):
    """Law: what is not understood is named, not left away."""
    with pytest.raises(Refused, match=words):
        dequantize({"a.weight": torch.ones(8, 8).to(FP8)} | beside, torch.float32, "here")


SINGLE = {
    "flux-dev": lambda pipe: single_files.flux(pipe.transformer),
    "stable-diffusion-3.5": lambda pipe: single_files.sd3(pipe.transformer),
    "wan-2.1": lambda pipe: in_wans_words(pipe.transformer),
    "pixart-sigma": lambda pipe: pipe.transformer.state_dict(),
}


@pytest.mark.parametrize("name", list(SINGLE))
def test_a_scaled_file_is_the_model_it_was_made_from(name, tmp_path):
    """Law: in each layout (converted, joined layers, diffusers' own) the weights are the unscaled file's."""
    pipe = ZOO[name].make(name)
    pipe.save_pretrained(tmp_path / "folder")
    save_file(
        narrowed(SINGLE[name](pipe)) | {"scaled_fp8": torch.zeros(2).to(FP8)}, tmp_path / "narrow.safetensors"
    )
    one = sfumato.load(tmp_path / "narrow.safetensors", config=tmp_path / "folder")
    assert distance(one.denoiser.network, pipe.transformer) < 0.04


@pytest.mark.parametrize(("part", "end"), [("unet", "scale_weight"), ("text_encoder", "weight_scale")])
def test_a_scaled_folder_is_the_model_it_was_made_from(part, end, tmp_path):
    """Law: a component of diffusers or of transformers, which may change names, has its scales."""
    pipe = ZOO["stable-diffusion-1.5"].make("scaled")
    pipe.save_pretrained(tmp_path / "base")
    (file,) = (tmp_path / "base" / part).glob("*.safetensors")
    save_file(narrowed(load_file(file), end), file, metadata={"format": "pt"})
    model = sfumato.load(tmp_path / "base")
    assert distance(model.origin.components[part], pipe.components[part]) < 0.04


def changed(folder: Path, part: str, change) -> Path:
    """A copy of a base whose component's file is changed."""
    there = folder.parent / f"changed-{part}"
    shutil.copytree(folder, there)
    (file,) = (there / part).glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return there


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("base") / "base"
    ZOO["stable-diffusion-1.5"].make("weights").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_weight_that_no_file_gives_is_named(part, base, tmp_path):
    """Law: no weight is random: the folder is refused with the key."""
    name = next(
        key for key in sorted(load_file(next((base / part).glob("*.safetensors")))) if "weight" in key
    )
    folder = changed(base, part, lambda weights: {key: one for key, one in weights.items() if key != name})
    with pytest.raises(Refused, match="needs: the weight would be random"):
        sfumato.load(folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_key_that_no_layer_has_is_named(part, base):
    """Law: a layer more than config.json says is not cut away silently."""
    odd = {"text_encoder": "encoder.layers.7.mlp.fc1.weight", "unet": "mid_block.attentions.9.norm.weight"}
    key = odd.get(part, "decoder.extra.weight")
    (file,) = (base / part).glob("*.safetensors")
    home = "text_model." if any(name.startswith("text_model.") for name in load_file(file)) else ""
    key = f"{home}{key}" if part == "text_encoder" else key
    folder = changed(base, part, lambda weights: weights | {key: torch.zeros(4, 4)})
    with pytest.raises(Refused, match="which no layer of the network has"):
        sfumato.load(folder)
    shutil.rmtree(folder)


def test_what_a_class_does_without_may_be_there_or_not(base, tmp_path):
    """Law: position_ids, tied weights and heads that a text encoder has not are no faults."""
    folder = changed(
        base,
        "text_encoder",
        lambda weights: (
            weights
            | {"text_model.embeddings.position_ids": torch.arange(8), "lm_head.weight": torch.zeros(2, 2)}
        ),
    )
    assert torch.equal(
        sfumato.load(folder).conditioner(["a"])["tokens"], sfumato.load(base).conditioner(["a"])["tokens"]
    )
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["stable-diffusion-1.5", "stable-diffusion-3.5", "pixart-sigma"])
def test_a_key_of_a_single_file_that_nobody_uses_is_named(name, tmp_path):
    """Law: also inside a part that a converter takes; averages, tables of noise and markers are excused."""
    pipe = ZOO[name].make(name)
    pipe.save_pretrained(tmp_path / "folder")
    weights = pipe.transformer.state_dict() if name == "pixart-sigma" else single_files.whole(name, pipe)
    weights = {key: one.contiguous() for key, one in weights.items()}
    harmless = {
        "model_ema.decay": torch.zeros(1),
        "alphas_cumprod": torch.ones(3),
        "sqrt_alphas_cumprod": torch.ones(3),
    }
    save_file(weights | harmless, tmp_path / "good.safetensors")
    sfumato.load(tmp_path / "good.safetensors", config=tmp_path / "folder")
    some = next(key for key in weights if key.endswith("weight"))
    for odd in (
        some.removesuffix("weight") + "scale_b",
        "control_model.x.weight",
        "model.diffusion_model.strange.weight",
    ):
        save_file(weights | {odd: torch.zeros(3)}, tmp_path / "odd.safetensors")
        with pytest.raises(Refused, match=r"which no network of the config's folder uses|does not fit"):
            sfumato.load(tmp_path / "odd.safetensors", config=tmp_path / "folder")


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("stable-diffusion-1.5", "cond_stage_model"),
        ("stable-diffusion-xl", "conditioner.embedders.0"),
        ("stable-diffusion-xl", "conditioner.embedders.1"),
    ],
)
def test_a_text_encoder_of_a_file_that_lacks_a_weight_is_not_the_folders(name, home, tmp_path):
    """Law: what a file has of a text encoder is used or named; the folder's own does not stand in."""
    pipe = ZOO[name].make("text")
    pipe.save_pretrained(tmp_path / "folder")
    weights = single_files.whole(name, pipe)
    lost = next(
        key for key in weights if key.startswith(home) and key.endswith(("fc1.weight", "c_fc.weight"))
    )
    del weights[lost]
    save_file(weights, tmp_path / "odd.safetensors")
    with pytest.raises(Refused, match=r"text_encoder(_2)?: it has no .*fc1.weight"):
        sfumato.load(tmp_path / "odd.safetensors", config=tmp_path / "folder")


def test_a_config_that_says_less_than_the_file_is_refused(base, tmp_path):
    """Law: a network of fewer layers than its file is another one."""
    folder = tmp_path / "short"
    shutil.copytree(base, folder)
    said = json.loads((folder / "text_encoder" / "config.json").read_text())
    said["num_hidden_layers"] -= 1
    (folder / "text_encoder" / "config.json").write_text(json.dumps(said))
    with pytest.raises(Refused, match="which no layer of the network has"):
        sfumato.load(folder)
