"""Laws of what leaves: files load elsewhere and answer there as here, or they are not declared written."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.errors import Failed, Refused
from sfumato.models.io import adapter_run
from sfumato.models.lora import adapter, lora_file
from sfumato.models.lora.adapter import AdapterPlan
from sfumato.run_folder import checksum
from sfumato.workflow.export import export

from . import pictures
from .test_training import write_recipe
from .zoo import ZOO

COMFYUI = {
    "stable-diffusion-1.5": "lora_unet_", "stable-diffusion-xl": "lora_unet_", "flux-dev": "transformer.",
    "stable-diffusion-3.5": "transformer.", "auraflow": "transformer.", "pixart-sigma": "transformer.",
    "qwen-image": "diffusion_model.", "chroma": "diffusion_model.", "wan-2.1": "diffusion_model.",
    "wan-2.2-a14b": "diffusion_model.", "ltx-video": "diffusion_model.", "hunyuan-video": "diffusion_model.",
    "mochi": "diffusion_model.", "lumina-2": "diffusion_model.", "z-image": "diffusion_model.",
    "flux-2-klein": "diffusion_model.",
}  # fmt: skip
KOHYA = ("stable-diffusion-1.5", "stable-diffusion-xl", "flux-dev", "wan-2.1", "qwen-image")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs with a LoRA that has learned something, made without training: each base, plan and checkpoint."""
    home, made = tmp_path_factory.mktemp("runs"), {}

    def run(name: str, **known: Any) -> Path:
        key = f"{name}-{'-'.join(map(str, known.values()))}"
        if key in made:
            return made[key]
        base, place = home / f"base-{name}", home / key
        if not base.exists():
            with pictures.small():
                ZOO[name].make(name).save_pretrained(base)
        model, plan = sfumato.load(base), AdapterPlan(**{"rank": 2, "alpha": 3.0, **known})
        adapter_run.write_base(place / "model", base, {**model.info, **SIZES.get(name, {})})
        adapter_run.write_plan(place / "model", plan)
        adapter_run.attach(model.denoiser, plan)
        draw = torch.Generator().manual_seed(5)
        free = {k: p for k, p in model.denoiser.named_parameters() if p.requires_grad}
        tensors = {k: p.detach() + 0.3 * torch.randn(p.shape, generator=draw) for k, p in free.items()}
        write_checkpoint(place, tensors)
        made[key] = place
        return place

    return run


CONVERTED: dict[str, dict[str, Any]] = {
    "flux-dev": {"targets": (r"transformer_blocks\.\d+\.attn\..*",)},
    "wan-2.1": {"targets": (r"blocks\.\d+\.(attn[12]|ffn)\..*(to_[qkv]|to_out\.0|proj|net\.2)",)},
}
"""What diffusers' converters of kohya's names can take: real widths only, or whole blocks."""
QUICK = ("ddpm", "stable-diffusion-1.5", "flux-dev", "flux-2-klein", "wan-2.2-a14b")


def some(names: Any) -> list[Any]:
    """A few quickly, the others among the slow tests."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


KLEIN = {"prompt_options": {"text_encoder_out_layers": (1, 2, 3)}}
SIZES: dict[str, dict[str, Any]] = {"flux-2-klein": KLEIN, "flux-2-klein-edit": KLEIN}


def write_checkpoint(run: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The newest checkpoint, with these weights alone."""
    (run / "recipe.toml").write_text("")
    place = run / "checkpoints" / "step-000002"
    place.mkdir(parents=True, exist_ok=True)
    save_file(tensors, place / "model.safetensors")
    files = {"model.safetensors": {"sha256": checksum(place / "model.safetensors")}}
    (place / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def raw(model: Any) -> torch.Tensor:
    """One answer."""
    from sfumato.workflow.export.compare import answers, example_inputs

    return answers(model, *example_inputs(model))[0]


@pytest.mark.parametrize("name", some(ZOO))
def test_a_lora_goes_to_diffusers_and_answers_there_as_here(name, runs, tmp_path):
    """Law: diffusers' own load_lora_weights gives the run's answer; without a loader, peft does."""
    with pictures.small():
        done = export(runs(name), "diffusers", tmp_path / "out", ["sks"])
    assert done.difference < 1e-4 and done.effect > 1e-3
    if (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists():
        with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "pt") as opened:
            said = opened.metadata()
        assert said["base"] == f"base-{name}" and said["rank"] == "2" and said["trigger_words"] == "sks"
        assert said["theory"] and said["modelspec.trigger_phrase"] == "sks"


@pytest.mark.parametrize("name", some(COMFYUI))
def test_a_lora_goes_to_comfyui_under_its_names(name, runs, tmp_path):
    """Law: no key is unmatched, every layer has its alpha, and the answer is the run's."""
    done = export(runs(name), "comfyui", tmp_path / "out")
    assert done.difference < 1e-4
    keys = [key for file in done.files for key in load_file(file)]
    assert all(key.startswith(COMFYUI[name]) for key in keys)
    assert sum(key.endswith(".alpha") for key in keys) * 3 == len(keys)


@pytest.mark.parametrize("name", some(KOHYA))
def test_a_lora_goes_to_kohya_and_diffusers_reads_it_alike(name, runs, tmp_path):
    """Law: kohya's names, read by diffusers' own converter, give the run's answer."""
    run = runs(name, **CONVERTED.get(name, {}))
    done = export(run, "kohya", tmp_path / "out")
    assert done.difference < 1e-4
    fresh, mine = sfumato.load(adapter_run.read_base(run / "model")[0]), sfumato.load(run)
    fresh.info = mine.info
    fresh.origin.load_lora_weights(done.files[0])
    assert torch.allclose(raw(fresh), raw(mine), atol=1e-4)


@pytest.mark.parametrize("to", ["diffusers", "comfyui", "kohya"])
@pytest.mark.parametrize("known", [{"dora": True}, {"rslora": True, "alpha": 2.0}], ids=["dora", "rslora"])
def test_variants_of_lora_keep_their_meaning(to, known, runs, tmp_path):
    """Law: learned lengths and other scales survive the way out."""
    assert export(runs("stable-diffusion-1.5", **known), to, tmp_path / "out").difference < 1e-4


def test_loras_stack_with_weights(runs, tmp_path):
    """Law: added twice by halves is added once; by 1 it is the run; by 0 it is the base."""
    run = runs("stable-diffusion-xl")
    file = export(run, "comfyui", tmp_path / "out").files[0]
    base, twice = (sfumato.load(adapter_run.read_base(run / "model")[0]) for _ in range(2))
    before = raw(base)
    twice.add_lora(file, 0.5)
    twice.add_lora(file, 0.5)
    assert torch.allclose(raw(twice), raw(sfumato.load(run)), atol=1e-4)
    base.add_lora(file, 0.0)
    assert torch.equal(raw(base), before)


def test_stacked_files_draw_what_diffusers_draws_with_its_adapters(runs, tmp_path):
    """Law: several files with weights are diffusers' set_adapters."""
    first, second = runs("stable-diffusion-1.5"), runs("stable-diffusion-1.5", alpha=1.0)
    files = [
        export(run, "diffusers", tmp_path / name).files[0] for run, name in ((first, "a"), (second, "b"))
    ]
    base = adapter_run.read_base(first / "model")[0]
    mine, theirs = sfumato.load(base), sfumato.load(base)
    before = raw(mine)
    for name, file, weight in zip("ab", files, (0.7, -0.4), strict=True):
        mine.add_lora(file, weight)
        theirs.origin.load_lora_weights(file, adapter_name=name)
    theirs.origin.set_adapters(["a", "b"], [0.7, -0.4])
    assert torch.allclose(raw(mine), raw(theirs), atol=1e-4) and not torch.allclose(raw(mine), before)


def test_a_file_that_does_not_match_is_not_declared_written(runs, tmp_path, monkeypatch):
    """Law: a layer that finds no place, there or here, is named, and nothing is left behind."""
    from sfumato.models.lora import key_conversion

    written = key_conversion.to_target_keys

    def without_one(*given: Any) -> dict[str, torch.Tensor]:
        keyed = written(*given)
        lost = next(iter(keyed)).partition(".")[0]
        return {key: tensor for key, tensor in keyed.items() if not key.startswith(f"{lost}.")}

    monkeypatch.setattr(key_conversion, "to_target_keys", without_one)
    with pytest.raises(Failed, match=r"1 layers were not matched.*attn"):
        export(runs("stable-diffusion-1.5"), "kohya", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["comfyui", "diffusers"])
def test_a_weight_that_comes_back_otherwise_is_not_declared_written(to, runs, tmp_path, monkeypatch):
    """Law: one matrix that is a hundredth too strong is found, named, and nothing is left behind."""
    from sfumato.workflow.export import lora

    def too_strong(tensors: Any, file: Path, *given: Any) -> None:
        worst = next(key for key in tensors if "mid_block" in key and ("up" in key or "lora_B" in key))
        save_sealed({**tensors, worst: 1.01 * tensors[worst]}, file, *given)

    save_sealed = lora.save_sealed
    monkeypatch.setattr(lora, "save_sealed", too_strong)
    with pytest.raises(Failed, match=r"other weights.*mid_block.*Nothing was kept"):
        export(runs("stable-diffusion-1.5"), to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_whole_run_draws_in_diffusers_what_it_draws_here(tmp_path):
    """Law: the exported folder, opened by diffusers alone, gives the run's picture from the same noise."""
    run = sfumato.train(write_recipe("stable-diffusion-1.5", tmp_path), ["train.steps=1", "train.ema=0"])
    export(run.path, "diffusers", tmp_path / "out")
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        theirs = pipe(
            "a red circle", negative_prompt="blurry", height=32, width=32, num_inference_steps=3,
            guidance_scale=4.0, generator=draw,
        ).images[0]  # fmt: skip
    start = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    (mine,) = run.model().generate(
        ["a red circle"], "blurry", steps=3, guidance=4.0, height=32, width=32, latents=start
    )
    assert np.abs(np.asarray(mine, int) - np.asarray(theirs, int)).max() <= 1


def test_an_adapter_without_effect_is_not_written(runs, tmp_path):
    """Law: what changes nothing is refused by name, and nothing is left behind."""
    run = runs("stable-diffusion-1.5", seed=9)
    place = run / "checkpoints" / "step-000002"
    tensors = {k: v * ("lora_B" not in k) for k, v in load_file(place / "model.safetensors").items()}
    write_checkpoint(run, tensors)
    with pytest.raises(Failed, match=r'changes nothing.*"down_blocks'):
        export(run, "diffusers", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lora_of_another_base_is_refused_by_name(runs, tmp_path):
    """Law: layers that are not there, or of another size, are named."""
    file = export(runs("flux-dev"), "comfyui", tmp_path / "out").files[0]
    other = sfumato.load(adapter_run.read_base(runs("stable-diffusion-1.5") / "model")[0])
    with pytest.raises(Refused, match=r'another base.*"transformer\.'):
        other.add_lora(file)


def test_a_pickle_is_no_lora(tmp_path):
    """Law: only safetensors are read."""
    (tmp_path / "lora.pt").write_bytes(b"x")
    with pytest.raises(Refused, match="Convert it"):
        lora_file.read(tmp_path / "lora.pt")


@pytest.mark.parametrize("to", ["diffusers", "comfyui", "kohya"])
def test_an_earlier_checkpoints_lora_goes_out_as_a_lora(to, runs, tmp_path):
    """Law: a checkpoint that is named is exported as its run is: an adapter, with that step's weights."""
    run = tmp_path / "run"
    shutil.copytree(runs("stable-diffusion-1.5"), run)
    early = run / "checkpoints" / "step-000001"
    shutil.copytree(run / "checkpoints" / "step-000002", early)
    late = {k: -2 * v for k, v in load_file(early / "model.safetensors").items()}
    write_checkpoint(run, late)
    done = export(early, to, tmp_path / "out")
    assert done.difference < 1e-4 and done.metadata["steps"] == "1" and done.metadata["rank"] == "2"
    assert done.metadata["modelspec.title"] == "run-step-000001"
    (file,) = done.files
    base = sfumato.load(adapter_run.read_base(run / "model")[0])
    base.add_lora(file)
    assert torch.allclose(raw(base), raw(sfumato.load(early)), atol=1e-4)
    assert not torch.allclose(raw(base), raw(sfumato.load(run)), atol=1e-2)


def test_a_whole_model_goes_to_diffusers(runs, tmp_path):
    """Law: the folder is diffusers' own, with the merged weights."""
    run = runs("stable-diffusion-1.5")
    sfumato.load(run).save(tmp_path / "merged")
    done = export(tmp_path / "merged", "diffusers", tmp_path / "out")
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    network = adapter.peft_target(sfumato.load(tmp_path / "merged").denoiser)
    assert done.difference < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), network.parameters(), strict=True))
    assert export(tmp_path / "merged", "comfyui", tmp_path / "comfy").files[0].exists()
    with pytest.raises(Refused, match="no whole"):
        export(tmp_path / "merged", "kohya", tmp_path / "kohya")
