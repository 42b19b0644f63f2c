"""Law: what a config asks for is compared with its file of weights before memory or minutes are spent."""

import json
import shutil

import pytest
import torch

import sfumato
from sfumato import models
from sfumato.errors import Refused
from sfumato.models.codecs.load import load_codec
from sfumato.models.lora import adapter
from sfumato.models.settings import ModelSettings
from sfumato.models.size_limits import WeightCounts, check_network_size
from sfumato.models.text.encoder import text_encoder
from upgrade.material import make_base

OURS = {
    "denoiser of a DiT": ("denoiser", {"denoiser": "dit"}),
    "denoiser of a UNet": ("denoiser", {"denoiser": "unet", "width": 32}),
    "codec": ("codec", {"codec": "auto", "codec_stride": 4, "latent_channels": 4, "codec_width": 8}),
    "codec of diffusers": (
        "codec",
        {"codec": "kl", "codec_stride": 4, "latent_channels": 4, "codec_width": 8},
    ),
}
ABSURD = {
    "denoiser of a DiT": [
        {"width": 2**19}, {"depth": 10**6}, {"depth": 10**400}, {"channels": 2**40}, {"text_width": 10**9},
        {"classes": 10**9}, {"heads": -2}, {"clock_range": [0.0] * 70_000},
    ],
    "denoiser of a UNet": [{"width": 2**19}, {"depth": 10**6}, {"depth": 500}, {"heads": -1}],
    "codec": [{"stride": 2**19}, {"width": 2**20}, {"deep": 10**9}],
    "codec of diffusers": [
        {"block_out_channels": [2**19] * 3}, {"layers_per_block": 10**6}, {"latent_channels": 10**9},
    ],
    "unet/config.json": [
        {"block_out_channels": [2**19] * 2}, {"layers_per_block": 10**6}, {"in_channels": 10**9},
        {"cross_attention_dim": 10**9}, {"num_class_embeds": 10**9}, {"time_embedding_dim": 10**6},
        {"block_out_channels": [4] * 70_000}, {"transformer_layers_per_block": 10**6},
    ],
    "vae/config.json": [
        {"block_out_channels": [2**19]}, {"layers_per_block": 10**6}, {"latent_channels": 10**9},
        {"latents_mean": [0.0] * 70_000},
    ],
    "text_encoder/config.json": [
        {"vocab_size": 10**9}, {"num_hidden_layers": 10**6}, {"hidden_size": 2**19},
        {"num_attention_heads": -4}, {"max_position_embeddings": 10**10}, {"intermediate_size": 10**9},
    ],
    "scheduler/scheduler_config.json": [
        {"num_train_timesteps": 10**10}, {"num_train_timesteps": 10**400}, {"trained_betas": [0.1] * 2**21},
    ],
}  # fmt: skip
SAID = r"was not built|more than|heads are counted|entries; no network"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_base(folder)
    return folder


def read_with(file, change, read):
    """What `read` refuses once the JSON in `file` says something else."""
    whole = file.read_text()
    described = json.loads(whole)
    described.get("config", described).update(change)
    file.write_text(json.dumps(described))
    try:
        with pytest.raises(Refused, match=SAID) as found:
            read()
    finally:
        file.write_text(whole)
    return str(found.value)


@pytest.mark.parametrize("name", OURS)
def test_a_stage_larger_than_its_weights_is_refused_before_it_is_built(name, tmp_path):
    role, how = OURS[name]
    usual = {"text_encoder": "none", "width": 16, "depth": 1, "heads": 2, "codec": "pixels"}
    settings = ModelSettings(**{**usual, **how})
    made = models.new_model(settings, models.new_codec(settings), models.new_conditioner(settings))
    models.save(made, tmp_path / "model")
    (tmp_path / "model" / "checksums.json").unlink()
    file = tmp_path / "model" / role / "stage.json"
    for change in ABSURD[name]:
        assert "stage.json" in read_with(file, change, lambda: sfumato.load(tmp_path / "model"))


@pytest.mark.parametrize("name", [name for name in ABSURD if name.endswith(".json")])
def test_a_network_of_others_larger_than_its_weights_is_refused_before_it_is_built(name, pipeline):
    for change in ABSURD[name]:
        assert name in read_with(pipeline / name, change, lambda: sfumato.load(pipeline))


def test_a_codec_and_a_text_encoder_alone_are_bounded_too(pipeline):
    for change in ABSURD["vae/config.json"]:
        read_with(pipeline / "vae/config.json", change, lambda: load_codec(pipeline / "vae"))
    for change in ABSURD["text_encoder/config.json"]:
        read_with(
            pipeline / "text_encoder/config.json", change, lambda: text_encoder(pipeline / "text_encoder")
        )


def test_a_single_file_is_the_bound_of_the_networks_its_folder_describes(pipeline, tmp_path):
    folder = tmp_path / "config"
    shutil.copytree(pipeline, folder)
    file = tmp_path / "unet.safetensors"
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(file)
    read_with(folder / "unet/config.json", {"in_channels": 10**9}, lambda: sfumato.load(file, config=folder))


def test_what_is_counted_is_what_torch_counts():
    """A network as large as its weights passes, one that is beyond every allowance does not."""
    network = torch.nn.Linear(3, 5)
    counts = WeightCounts.of_tensors(network.state_dict())
    assert (counts.numbers, counts.tensors) == (20, 2)
    check_network_size(lambda: torch.nn.Linear(3, 5), counts, {}, "a file")
    with pytest.raises(Refused, match="a file asks for a network of more than"):
        check_network_size(lambda: torch.nn.Linear(1 << 13, 1 << 12), counts, {}, "a file")


def test_counting_draws_no_random_numbers():
    state = torch.get_rng_state()
    check_network_size(lambda: torch.nn.Linear(3, 5), WeightCounts(20, 2), {}, "a file")
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("target", ["(x+x+)+y", "(x|x)*y", "(.*)*y", "((x{9}){9}){9}y"])
def test_a_regular_expression_among_the_targets_ends(target):
    """Law: those of a recipe or of a stranger's adapter.json have a bounded time."""
    network = torch.nn.Module()
    network.add_module("x" * 60, torch.nn.Linear(4, 4))
    with pytest.raises(Refused, match=r"model\.targets.*(takes too long|no regular expression|matches no)"):
        adapter.chosen(network, adapter.AdapterPlan("lora", 2, targets=(target,)))
    found = adapter.chosen(network, adapter.AdapterPlan("lora", 2, targets=("x+",)))
    assert found == ["x" * 60]
