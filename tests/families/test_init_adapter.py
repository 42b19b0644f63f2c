"""Laws of LoRA files of others as a beginning: training goes on where the file ends, presets stack."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.errors import Refused
from sfumato.models.io import adapter_run
from sfumato.models.lora import adapter
from sfumato.models.pretrained import train_text_encoders
from sfumato.workflow.export import export

from .test_export import CONVERTED, raw, runs
from .test_training import write_recipe

__all__ = ["runs"]
STILL = ["train.learning_rate=0", "train.steps=1", "train.sanity=false", "train.ema=0"]


def begun(name, folder, run, keys):
    """A run on the base of another one that has not moved from where it began."""
    recipe = write_recipe(name, folder, 'train = "lora"')
    base = adapter_run.read_base(run / "model")[0]
    return sfumato.train(recipe, [*STILL, f"model.base={base}", *keys])


@pytest.mark.parametrize(
    ("name", "to", "keys"),
    [
        ("flux-dev", "kohya", ["model.rank=7"]),
        ("pixart-sigma", "comfyui", ["model.alpha=11"]),
        ("pixart-sigma", "diffusers", ["model.rslora=true"]),
        pytest.param("stable-diffusion-1.5", "kohya", ["model.dora=true"], marks=pytest.mark.slow),
        pytest.param("wan-2.1", "comfyui", [], marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_where_a_file_ends(name, to, keys, runs, tmp_path):
    """Law: diffusers', ComfyUI's, kohya's and peft's files, at any rank and scale, begin as they answer."""
    known = {"dora": True} if "model.dora=true" in keys else {}
    run = runs(name, **known, **(CONVERTED.get(name, {}) if to == "kohya" else {}))
    files = export(run, to, tmp_path / "out").files
    file = next(file for file in files if file.suffix == ".safetensors")
    model = begun(name, tmp_path, run, [f"model.init_adapter={file}", *keys]).model()
    there = sfumato.load(run)
    there.info = model.info
    torch.testing.assert_close(raw(model), raw(there), atol=1e-4, rtol=1e-3)
    parts = adapter.state(adapter.peft_target(model.denoiser))
    ranks = {len(one) for key, one in parts.items() if "lora_A" in key}
    assert ranks == {7} if "model.rank=7" in keys else max(ranks) >= 2


def test_presets_of_others_stack_with_weights(runs, tmp_path):
    """Law: a preset half and half again is the file once, and generate's reader reads the same."""
    run = runs("flux-dev")
    file = export(run, "comfyui", tmp_path / "out").files[0]
    both = begun("flux-dev", tmp_path, run, [f"model.merge_loras=['{file}:0.5', '{file}:0.5']"]).model()
    there = sfumato.load(run)
    there.info = both.info
    torch.testing.assert_close(raw(both), raw(there), atol=1e-4, rtol=1e-3)


def test_a_file_that_does_not_fit_is_refused_in_a_sentence(runs, tmp_path):
    """Law: another base, another shape, too small a rank, an encoder nobody trains."""
    run = runs("flux-dev")
    file = export(run, "diffusers", tmp_path / "out").files[0]
    tensors = load_file(file)

    def refused(tensors, *keys):
        save_file(tensors, tmp_path / "odd.safetensors")
        with pytest.raises(Refused) as refusal:
            begun("flux-dev", tmp_path, run, [f"model.init_adapter={tmp_path}/odd.safetensors", *keys])
        assert not (tmp_path / "run").exists()
        return str(refusal.value)

    assert "choose at least that" in refused(tensors, "model.rank=1")
    assert "model.targets does not name" in refused(tensors, "model.targets=['norm1.linear']")
    assert 'say model.train = "lora"' in refused(tensors, "model.train=lokr")
    wide = {key: one.repeat(1, 2) if "lora_A" in key else one for key, one in tensors.items()}
    assert "is a LoRA of another base" in refused(wide) and "64" in refused(wide)
    named = {key.replace("single_transformer_blocks", "layers"): one for key, one in tensors.items()}
    assert "of its" in refused(named) and "FluxPipeline" in refused(named)
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    more = {f"{text}.lora_A.weight": torch.ones(2, 32), f"{text}.lora_B.weight": torch.ones(32, 2)}
    assert 'model.train_text_encoder = "lora"' in refused({**tensors, **more})


def text_lora(model, ends):
    """kohya's LoRA of a denoiser's attention and of its text encoder's layers with these ends."""
    draw, tensors = torch.Generator().manual_seed(4), {}
    parts = {"lora_unet_": adapter.peft_target(model.denoiser), "lora_te_": model.origin.text_encoder}
    for prefix, network in parts.items():
        for name, layer in network.named_modules():
            if not isinstance(layer, torch.nn.Linear | torch.nn.Embedding) or not name.endswith(ends):
                continue
            plain = prefix == "lora_unet_" or name.startswith("text_model.")
            key = prefix + (name if plain else f"text_model.{name}").replace(".", "_")
            rows, columns = layer.weight.shape
            tensors[f"{key}.lora_down.weight"] = 0.3 * torch.randn(2, columns, generator=draw)
            tensors[f"{key}.lora_up.weight"] = 0.3 * torch.randn(rows, 2, generator=draw)
            tensors[f"{key}.alpha"] = torch.tensor(1.0)
    return tensors


def test_all_layers_of_a_text_encoder_that_a_file_changes_go_on(runs, tmp_path):
    """Law: kohya's usual LoRA changes an encoder's MLPs too; the run begins with them, and is loaded so."""
    run, name = runs("stable-diffusion-1.5"), "stable-diffusion-1.5"
    base = adapter_run.read_base(run / "model")[0]
    there = sfumato.load(base)
    usual = ("to_q", "to_k", "to_v", "to_out.0", *train_text_encoders.TARGETS, "fc1", "fc2")
    save_file(text_lora(there, usual), tmp_path / "kohya.safetensors")
    keys = [f"model.init_adapter={tmp_path}/kohya.safetensors", "model.train_text_encoder=lora"]
    model = begun(name, tmp_path, run, keys).model()
    before = there.condition(["a red circle"])["tokens"]
    there.add_lora(tmp_path / "kohya.safetensors")
    theirs = there.condition(["a red circle"])["tokens"]
    torch.testing.assert_close(model.condition(["a red circle"])["tokens"], theirs, atol=1e-4, rtol=1e-3)
    assert (theirs - before).abs().max() > 0.1
    there.info = model.info
    torch.testing.assert_close(raw(model), raw(there), atol=1e-4, rtol=1e-3)
    save_file(text_lora(there, (*usual, "token_embedding")), tmp_path / "odd.safetensors")
    keys[0] = f"model.init_adapter={tmp_path}/odd.safetensors"
    with pytest.raises(Refused, match=r"token_embedding.*no room"):
        begun(name, tmp_path / "odd", run, keys)
