"""Laws of runs that are laid over a base: it is the base they were trained on, or the run says so."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.errors import Refused
from sfumato.models.io import base_fingerprint
from sfumato.models.io.base_fingerprint import file_fingerprint
from sfumato.workflow.export import export

from .test_training import losses, write_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A recipe whose run has a LoRA on a base."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe("stable-diffusion-1.5", folder, 'train = "lora"', "rank = 2")
    sfumato.train(recipe, ["train.sanity=false"])
    return folder


def moved(trained, folder):
    """A copy of recipe, base and run, with the run's words about where its base is."""
    shutil.copytree(trained, folder)
    file = folder / "run" / "model" / "base.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base": str(folder / "base")}))
    return folder, file


def weights_of(folder, part):
    return next((folder / "base" / part).glob("*.safetensors"))


CHANGES = {
    "a layer": lambda folder: change(weights_of(folder, "unet"), "conv_in.weight"),
    "one number": lambda folder: change(weights_of(folder, "vae"), "decoder.conv_out.bias", 1),
    "another text encoder": lambda folder: change(weights_of(folder, "text_encoder"), ""),
    "the schedule": lambda folder: said(folder / "base/scheduler/scheduler_config.json", "beta_end", 0.02),
    "a file is gone": lambda folder: (folder / "base/unet/config.json").unlink(),
}


def change(file, name, count=None):
    """Other numbers in a file of weights."""
    tensors = load_file(file)
    name = name or next(key for key in sorted(tensors) if key.endswith("q_proj.weight"))
    tensors[name].view(-1)[:count] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})


def said(file, key, value):
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))


@pytest.mark.parametrize("how", list(CHANGES))
def test_a_base_that_was_changed_is_refused_wherever_it_is_used(how, trained, tmp_path):
    """Law: drawing, going on and exporting name the file, and change nothing of the run."""
    folder, _ = moved(trained, tmp_path / "world")
    CHANGES[how](folder)
    before = sorted((file, file.stat().st_mtime_ns) for file in (folder / "run" / "checkpoints").rglob("*"))
    with pytest.raises(Refused, match=r"was trained on .*base, but .* since: its answers would be others"):
        sfumato.load(folder / "run")
    with pytest.raises(Refused, match=r"its answers would be others|config\.json"):
        export(folder / "run", "kohya", tmp_path / "out")
    with pytest.raises(Refused):
        sfumato.train(folder / "recipe.toml", ["train.steps=4", "train.sanity=false"])
    after = sorted((file, file.stat().st_mtime_ns) for file in (folder / "run" / "checkpoints").rglob("*"))
    assert before == after


def test_a_base_may_move_and_have_other_things_beside_it(trained, tmp_path):
    """Law: neither the place of a base nor what is no part of the model belongs to the fingerprint."""
    folder, _ = moved(trained, tmp_path / "world")
    sfumato.load(folder / "run")
    (folder / "base" / "README.md").write_text("words")
    (folder / "base" / "unet" / "notes.md").write_text("words")
    sfumato.load(folder / "run")


def test_whoever_means_the_base_that_is_there_deletes_the_fingerprint(tmp_path):
    """Law: without one, as in runs of older versions, the base is taken as it is; going on keeps it anew."""
    recipe = write_recipe("stable-diffusion-1.5", tmp_path, 'train = "lora"', "rank = 2")
    run = sfumato.train(recipe, ["train.sanity=false"])
    CHANGES["a layer"](tmp_path)
    file = run.path / "model" / "base.json"
    described = json.loads(file.read_text())
    assert described.pop("fingerprint")
    file.write_text(json.dumps(described))
    run.model()
    assert len(losses(sfumato.train(recipe, ["train.steps=3", "train.sanity=false"]).path)) == 3
    CHANGES["one number"](tmp_path)
    with pytest.raises(Refused, match="its answers would be others"):
        run.model()


def test_a_lora_that_is_part_of_the_base_is_of_it(trained, tmp_path):
    """Law: a file that was merged into the base and is another one now is named."""
    folder, _ = moved(trained, tmp_path / "world")
    (file,) = export(folder / "run", "comfyui", tmp_path / "style").files
    words = [
        f"model.merge_loras={file}:0.5",
        "train.steps=1",
        "train.sanity=false",
        f"output={folder}/second",
    ]
    run = sfumato.train(folder / "recipe.toml", words)
    run.model()
    tensors = load_file(file)
    save_file({key: 2 * one for key, one in tensors.items()}, file)
    with pytest.raises(Refused, match=r"style/.*safetensors of it was changed"):
        run.model()


def test_a_large_file_is_sampled_in_every_tensor(tmp_path, monkeypatch):
    """Law: size, header and some bytes of each tensor tell; as many reads as tensors, not the whole file."""
    monkeypatch.setattr(base_fingerprint, "WHOLE", 1000)
    file = tmp_path / "large.safetensors"
    tensors = {f"layer{i}": torch.randn(64, 64, generator=torch.Generator().manual_seed(i)) for i in range(8)}
    save_file(tensors, file)
    before = file_fingerprint(file)
    assert before == file_fingerprint(file)
    for name in tensors:
        save_file({**tensors, name: 1.5 * tensors[name]}, file)
        assert file_fingerprint(file) != before
    save_file({**tensors, "layer8": torch.zeros(1)}, file)
    assert file_fingerprint(file) != before
    for damage in (b"", b"\xff" * 5000, (1 << 40).to_bytes(8, "little") + b"[" * 5000):
        file.write_bytes(damage)
        assert len(file_fingerprint(file)) == 16
