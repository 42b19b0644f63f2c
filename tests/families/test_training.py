"""Laws of training on pretrained families: each is trained whole and through adapters, by a recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sfumato
from sfumato.errors import Refused
from sfumato.models.lora import adapter
from sfumato.run_folder import RunFolder
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.training.settings import TrainSettings

from .zoo import ZOO

RECIPE = """
output = "run"
[model]
base = "base"
{model}
[data]
train = "pictures"
captions = "{captions}"
resolution = {side}
held_out = 0.0
cache_dir = "store"
[train]
steps = 2
batch = 2
warmup_steps = 1
learning_rate = 1e-2
log_every = 1
save_every = 1
validate_every = 0
ema = 0.5
threads = 1
device = "cpu"
precision = "fp32"
[sample]
every = 0
prompts = {prompts}
steps = 2
"""
KLEIN = ["max_sequence_length=16", "text_encoder_out_layers=[1, 2, 3]"]
OPTIONS = {"flux-2-klein": KLEIN, "flux-2-klein-edit": KLEIN}
SHOWN = (
    "qwen-image-edit", "qwen-image-edit-plus", "wan-2.1-i2v", "wan-2.1-flf", "wan-2.2-i2v", "wan-2.2-ti2v",
)  # fmt: skip
SIBLINGS = (
    "stable-diffusion-2-v",
    "flux-schnell",
    "flux-kontext",
    "wan-2.2-5b",
    "chroma",
    "auraflow",
    "stable-diffusion-xl",
)
"""Families whose network another of these tests trains: among the slow tests."""


def make_base(name: str, folder: Path) -> Path:
    """The family's tiny pipeline."""
    torch.manual_seed(0)
    ZOO[name].make(name).save_pretrained(folder / "base")
    return folder / "base"


def write_recipe(name: str, folder: Path, *model: str) -> Path:
    """A recipe on the family's base, with four pictures of two captions."""
    if not (folder / "base").is_dir():
        make_base(name, folder)
    words = ("a red circle", "blurry") if name != "dit" else ("3", "4")
    for index in range(4):
        place = folder / "pictures" / words[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (40 * index, 90, 200 - 40 * index)).save(place / f"{index}.png")
    side = {"ddpm": 16, "sana": 64, "wan-2.2-5b": 64}.get(name, 32)
    lines = [*model, f"prompt_options = {json.dumps(OPTIONS[name])}" if name in OPTIONS else ""]
    known = {"captions": "folder", "prompts": json.dumps([words[0]])}
    if name == "ddpm":
        known = {"captions": "none", "prompts": "[]"}
    file = folder / "recipe.toml"
    file.write_text(RECIPE.format(model="\n".join(lines), side=side, **known))
    return file


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in RunFolder.open(folder).events() if event["kind"] == "step"]


def asked(model: Any, name: str) -> Any:
    """One raw answer of the denoiser."""
    if name == "ddpm":
        condition = model.condition()
    else:
        condition = model.condition(["3"] if name == "dit" else ["a red circle"])
    x = torch.randn(1, *model.latent_shape(), generator=torch.Generator().manual_seed(3))
    if x.ndim == 5:
        x = x[:, :, :1]
    with torch.no_grad():
        return model.predict(x, 0.6, condition)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SIBLINGS)) for name in ZOO if name not in SHOWN],
)
def test_a_family_learns_through_an_adapter_and_whole(name, tmp_path):
    """Law: a recipe trains every family; the adapter alone is kept, and at scale 0 the base is unchanged."""
    recipe = write_recipe(name, tmp_path, 'train = "lora"', "rank = 4")
    run = sfumato.train(recipe)
    assert len(losses(run.path)) == 2
    last = RunFolder.open(run.path).checkpoint_folders()[-1]
    from safetensors.torch import load_file

    kept = load_file(last / "model.safetensors")
    assert kept and all("lora_" in key for key in kept)
    model, base = run.model(), sfumato.load(tmp_path / "base")
    base.info, base.conditioner = model.info, model.conditioner
    network = adapter.peft_target(model.denoiser)
    before, after = asked(base, name), asked(model, name)
    assert not torch.equal(before, after)
    adapter.scale(network, 0.0)
    assert torch.equal(asked(model, name), before)
    adapter.scale(network, 1.0)
    assert torch.equal(asked(model, name), after)

    recipe = write_recipe(name, tmp_path)
    whole = sfumato.train(recipe, [f"output={tmp_path}/whole", "train.steps=1", "train.sanity=false"])
    assert not torch.equal(asked(whole.model(), name), before)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name != "wan-2.1"))
        for name in ZOO
        if name not in (*SHOWN, "flux-dev")  # diffusers tells it its guidance in bf16: 3504 for 3500
    ],
)
def test_a_family_learns_in_bf16_what_it_learns_in_fp32(name, tmp_path):
    """Law: the losses of its first steps are the same up to the eight bits of bfloat16."""
    recipe = write_recipe(name, tmp_path, 'train = "lora"', "rank = 4")
    found = [
        losses(
            sfumato.train(
                recipe,
                [f"output={tmp_path}/{one}", f"train.precision={one}", "train.sanity=false"],
            ).path
        )
        for one in ("fp32", "bf16")
    ]
    assert found[0] != found[1] and found[1] == pytest.approx(found[0], rel=0.05)


@pytest.mark.precisions("fp32", "bf16")
def test_interrupted_equals_uninterrupted_for_an_adapter(tmp_path):
    """Law: one step, resume, one step end with the bits of two; dropout and the average included."""
    recipe = write_recipe("pixart-sigma", tmp_path, 'train = "lora"', "rank = 2", "dropout = 0.3")
    once = sfumato.train(recipe)
    sfumato.train(recipe, [f"output={tmp_path}/twice", "train.steps=1"])
    twice = sfumato.train(recipe, [f"output={tmp_path}/twice"])
    ends = [RunFolder.open(run.path).checkpoint_folders()[-1] for run in (once, twice)]
    for name in ("model", "ema", "optimizer"):
        first, second = ((end / f"{name}.safetensors").read_bytes() for end in ends)
        assert first == second, name
    files = [file.name for file in (once.path / "model").rglob("*")]
    assert "base.json" in files and not any(name.endswith(".safetensors") for name in files)


@pytest.mark.parametrize(
    "keys",
    [
        ["train=lora", "dora=true"],
        ["train=lora", "rslora=true", "alpha=8"],
        ["train=lora", "targets=['.*attn1.to_[qv]']"],
        ["train=lokr"],
        ["train=loha"],
    ],
    ids=" ".join,
)
def test_every_kind_of_adapter_trains_and_merges_into_its_base(keys, tmp_path):
    """Law: what an adapter learned can become part of the weights."""
    recipe = write_recipe("pixart-sigma", tmp_path, 'train = "lora"', "rank = 2")
    run = sfumato.train(recipe, ["train.ema=0", *(f"model.{key}" for key in keys)])
    model, base = run.model(), sfumato.load(tmp_path / "base")
    base.info = model.info
    after = asked(model, "pixart-sigma")
    assert not torch.equal(after, asked(base, "pixart-sigma"))
    places = [name for name, _ in adapter.adapted(model.denoiser.network)]
    assert len(places) == (4 if any("targets" in key for key in keys) else 16)
    model.save(tmp_path / "merged")
    merged = sfumato.load(tmp_path / "merged")
    merged.info = model.info
    assert not adapter.names(merged.denoiser.network)
    torch.testing.assert_close(asked(merged, "pixart-sigma"), after, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(asked(model, "pixart-sigma"), after, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["model.targets=['to_qq']"], ['"to_qq" matches no layer', 'Did you mean "to_q"']),
        (["model.targets=['blocks.9.*']"], ['"blocks.9.*" matches no layer of PixArtTransformer2DModel']),
        (["model.targets=['*bad']"], ['"*bad" is no regular expression']),
        (["model.rank=4096"], ["model.rank is 4096", "choose at most 32"]),
        (["model.rank=0"], ["model.rank is 0", "at least 1"]),
        (["model.train=full"], ["model.rank belongs to adapters"]),
        (["model.base=scratch"], ["Name one as model.base"]),
        (["model.train=lokr", "model.dora=true"], ["model.dora is of LoRA alone"]),
        (["model.prompt_options=['max_length=3']"], ['there is no "max_length"', "max_sequence_length"]),
        (["data.resolution=30"], ["30×30", "multiples of 16"]),
    ],
)
def test_what_matches_nothing_is_refused_by_name(keys, words, tmp_path):
    """Law: a rank, target or option that could not act is one sentence, before anything is written."""
    recipe = write_recipe("pixart-sigma", tmp_path, 'train = "lora"', "rank = 2")
    with pytest.raises(Refused) as refusal:
        sfumato.train(recipe, keys)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert not (tmp_path / "run").exists()


def test_a_picture_is_told_how_it_was_cut(tmp_path):
    """Law: Stable Diffusion XL hears the size and the cut of each picture while it trains."""
    recipe = write_recipe("stable-diffusion-xl", tmp_path, 'train = "lora"', "rank = 2")
    ready = sfumato.encode(recipe)
    objective = DiffusionObjective(ready.model, ready.train, None, TrainSettings(), 0)  # type: ignore[arg-type]
    row = objective.rows(ready.train.read([0]))[0]
    assert row["time_ids"].tolist() == [64, 64, 0, 0, 32, 32]
