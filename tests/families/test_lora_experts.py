"""Laws of LoRA files for two experts: each reaches the network it is for, whoever wrote it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.errors import Refused
from sfumato.models.io import adapter_run
from sfumato.models.lora import adapter, init_from_file
from sfumato.models.lora.experts import expert_of
from sfumato.workflow.export import export

from . import pictures
from .test_export import raw, runs

__all__ = ["runs"]


@pytest.fixture(scope="module")
def pair(runs, tmp_path_factory):
    """(run, {form: its two files as they are exported})."""
    run, out = runs("wan-2.2-a14b"), tmp_path_factory.mktemp("out")
    with pictures.small():
        return run, {to: export(run, to, out / to).files for to in ("diffusers", "comfyui", "kohya")}


def base_of(run: Path):
    model = sfumato.load(adapter_run.read_base(run / "model")[0])
    return model, {k: v.clone() for k, v in adapter.peft_target(model.denoiser).state_dict().items()}


def changed(model, before) -> set[str]:
    """The networks whose weights are not as they were."""
    after = adapter.peft_target(model.denoiser).state_dict()
    return {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("to", ["diffusers", "comfyui", "kohya"])
def test_our_own_pair_comes_back_as_it_left(to, pair):
    """Law: each file of an export changes its own network alone, and both together are the run."""
    run, files = pair
    one, two = sorted(files[to])
    for file, name in ((one, "noisy"), (two, "clean")):
        model, before = base_of(run)
        model.add_lora(file)
        assert changed(model, before) == {name}
    model, _ = base_of(run)
    model.add_lora(one), model.add_lora(two)
    trained = sfumato.load(run)
    trained.info = model.info
    torch.testing.assert_close(raw(model), raw(trained), atol=1e-4, rtol=1e-3)


def test_a_folder_with_both_files_is_a_pair(pair, tmp_path):
    """Law: a beginning is one key of a recipe, and may be of both networks; so may a file to draw with."""
    run, files = pair
    folder = files["comfyui"][0].parent
    model, before = base_of(run)
    start = init_from_file.read(model, folder)
    assert {name.partition(".")[0] for name in start.changes[""]} == {"noisy", "clean"}
    model.add_lora(folder)
    assert changed(model, before) == {"noisy", "clean"}
    shutil.copy(files["comfyui"][0], tmp_path / "a.safetensors")
    shutil.copy(files["comfyui"][0], tmp_path / "b.safetensors")
    with pytest.raises(Refused, match="two files for one network"):
        model.add_lora(tmp_path)


COMMUNITY = {
    "Wan2.2_T2V_A14B_HIGH_noise_style": "high", "wan22-style-low-noise": "low", "styleLowNoise_v2": "low",
    "STYLE-HighNoise": "high", "wan2.2_style_e20_low": "low", "HIGH_style": "high", "style.low.v3": "low",
    "low_rank_style": "high", "slow_motion": "high", "highlight": "high", "lowres_fix": "high",
    "style": "high",
    "style_v1_2": "high", "pytorch_lora_weights_2": "low", "lowpoly_style_high_noise": "high",
}  # fmt: skip


@pytest.mark.parametrize("stem", list(COMMUNITY))
def test_names_of_the_community_say_which_network(stem, tmp_path):
    """Law: high and low are heard as of noise, and as nothing else; what says nothing is the first's."""
    assert expert_of(tmp_path / f"{stem}.safetensors", {}, {}) == COMMUNITY[stem]


def test_a_file_is_said_to_be_of_a_network(pair, tmp_path):
    """Law: @high, @low and @both win over what the file says of itself, wherever they are written."""
    run, files = pair
    plain = tmp_path / "style_low.safetensors"
    save_file(load_file(files["comfyui"][0]), plain)
    for word, names in (
        ("high", {"noisy"}),
        ("low", {"clean"}),
        ("both", {"noisy", "clean"}),
        ("", {"clean"}),
    ):
        model, before = base_of(run)
        model.add_lora(plain, expert=word)
        assert changed(model, before) == names
        model, before = base_of(run)
        model.add_lora(f"{plain}@{word}" if word else plain)
        assert changed(model, before) == names
    with pytest.raises(Refused, match="The expert of a LoRA"):
        model.add_lora(plain, expert="middle")
    plain.rename(tmp_path / "high_and_low.safetensors")
    with pytest.raises(Refused, match="says both high and low"):
        model.add_lora(tmp_path / "high_and_low.safetensors")


def test_keys_of_the_second_network_are_heard(pair, tmp_path):
    """Law: a file with keys of transformer_2 says itself what is whose."""
    run, files = pair
    one, two = (load_file(file) for file in sorted(files["diffusers"]))
    both = one | {key.replace("transformer.", "transformer_2.", 1): tensor for key, tensor in two.items()}
    save_file(both, tmp_path / "low.safetensors")
    model, before = base_of(run)
    model.add_lora(tmp_path / "low.safetensors")
    assert changed(model, before) == {"noisy", "clean"}


def test_a_model_of_one_network_has_no_experts(runs, tmp_path):
    """Law: a name with high or low in it means nothing there, and @low is refused."""
    run = runs("stable-diffusion-1.5")
    file = export(run, "comfyui", tmp_path / "out").files[0]
    there = tmp_path / "style_low_2.safetensors"
    shutil.copy(file, there)
    model, _ = base_of(run)
    with pytest.raises(Refused, match="has one network"):
        model.add_lora(f"{there}@low")
    model.add_lora(there)
    assert torch.allclose(raw(model), raw(sfumato.load(run)), atol=1e-4)
