"""Laws of fetching: from a Hub on the loopback comes what is needed, once, whole, and nothing that runs."""

import json
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import sfumato
from sfumato import workflow
from sfumato.errors import Failed, Refused
from sfumato.models import hub_files
from sfumato.models.io import adapter_run
from sfumato.models.pretrained.pipeline_folder import find_model
from sfumato.recipe import Recipe

from .test_training import make_base, write_recipe


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The folder of a tiny Stable Diffusion 1.5."""
    return make_base("stable-diffusion-1.5", tmp_path_factory.mktemp("hub"))


@pytest.fixture
def tiny(hub, pipeline):
    """A Hub with acme/tiny: a pipeline as people upload them, with everything in several layouts."""
    hub.add("acme/tiny", pipeline)
    files = dict(hub.files("acme/tiny"))
    weights = next(name for name in files if name.startswith("unet/") and name.endswith(".safetensors"))
    files |= {
        "tiny-v1.safetensors": b"the same in its makers' layout",
        weights.replace(".safetensors", ".fp16.safetensors"): b"half",
        "unet/diffusion_pytorch_model.bin": b"a pickle",
        "unet/evil.py": b"raise SystemExit('it ran')",
        "text_encoder/flax_model.msgpack": b"of another library",
        "vae_1_0/diffusion_pytorch_model.safetensors": b"no component",
        "safety_checker/model.safetensors": b"not used",
        "README.md": b"---\nlicense: mit\n---\n# Tiny\n",
        "sample.png": b"a picture",
    }
    hub.commit = hub.add("acme/tiny", files)
    return hub


def test_of_a_pipeline_only_what_is_read_is_fetched_and_only_once(tiny, capsys):
    """Law: safetensors, one variant, its components; no code, no pickle, no other layout."""
    model = sfumato.load("acme/tiny")
    assert model.info["family"]
    fetched = set(tiny.fetched())
    assert "unet/diffusion_pytorch_model.safetensors" in fetched and "README.md" in fetched
    strange = ("fp16", ".bin", ".py", "msgpack", "vae_1_0", "safety_checker", "tiny-v1", ".png")
    assert not [name for name in fetched if any(word in name for word in strange)]
    assert "Fetching acme/tiny: " in capsys.readouterr().err
    before = len(tiny.requests)
    sfumato.load("acme/tiny")
    assert not [path for verb, path, _ in tiny.requests[before:] if verb == "GET" and "/resolve/" in path]
    before = len(tiny.requests)
    sfumato.load(f"acme/tiny@{tiny.commit}")
    assert len(tiny.requests) == before  # a commit that is here needs no Hub


def test_diffusers_finds_in_the_cache_what_was_fetched(tiny):
    """Law: the cache is everybody's."""
    from diffusers import StableDiffusionPipeline

    place = find_model("acme/tiny")
    assert place == find_model("acme/tiny@main")
    pipe = StableDiffusionPipeline.from_pretrained(place, local_files_only=True, safety_checker=None)
    ours = sfumato.load("acme/tiny")
    theirs = pipe.unet.state_dict()
    assert all(torch.equal(theirs[name], one) for name, one in ours.denoiser.backbone.state_dict().items())


def test_a_connection_that_breaks_is_taken_up_where_it_broke(tiny, monkeypatch):
    """Law: the second request asks for the rest alone, and the file is whole."""
    name = "unet/diffusion_pytorch_model.safetensors"
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    tiny.breaks[name] = 1
    place = find_model("acme/tiny")
    content = tiny.files("acme/tiny")[name]
    assert (place / name).read_bytes() == content
    asked = [one for verb, path, one in tiny.requests if verb == "GET" and path.endswith(name)]
    assert asked == ["", f"bytes={len(content) // 2 // 1000 * 1000}-"]


def test_after_a_connection_that_stays_broken_only_the_rest_is_fetched(tiny):
    """Law: one sentence; whole files stay, nothing half is taken for whole."""
    name = "unet/diffusion_pytorch_model.safetensors"
    tiny.breaks[name] = 100
    with pytest.raises(Failed, match=r"connection to .* broke off .*only the others are fetched"):
        find_model("acme/tiny")
    tiny.breaks.clear()
    whole, before = set(tiny.fetched()) - {name}, len(tiny.requests)
    find_model("acme/tiny")
    again = [path for verb, path, _ in tiny.requests[before:] if verb == "GET" and "/resolve/" in path]
    assert whole and not [one for one in again if any(one.endswith(f"/{came}") for came in whole)]


def test_of_variants_alone_one_is_fetched(hub, pipeline):
    """Law: that of the type that is asked for, else the first by name; a shard list with its shards."""
    names = ["m/config.json", "m/model.bf16.safetensors", "m/model.fp16.safetensors", "m/pytorch_model.bin"]
    assert hub_files.component_files(names) == ["m/config.json", "m/model.bf16.safetensors"]
    assert hub_files.component_files(names, "fp16") == ["m/config.json", "m/model.fp16.safetensors"]
    shards = [f"m/model-0000{one}-of-00002.safetensors" for one in (1, 2)]
    listed = [*shards, "m/model.safetensors.index.json"]
    others = ["m/model.fp16-00001-of-00001.safetensors", "m/model.safetensors.index.fp16.json"]
    assert hub_files.component_files([*listed, *others]) == listed
    assert hub_files.component_files(others) == others
    assert hub_files.component_files([*listed, "m/model.safetensors"]) == ["m/model.safetensors"]


@pytest.mark.parametrize(
    ("given", "said", "sentence"),
    [
        (
            "acme/gated",
            {"gated": True},
            r"gated: accept its terms at http://127\.0\.0\.1:\d+/acme/gated, then",
        ),
        (
            "acme/private",
            {"private": True},
            r"not at http://.*/acme/private, or it is private.*hf auth login",
        ),
        ("acme/nowhere", None, r"acme/nowhere is no folder here, and not at"),
        ("acme/open@v9", {}, r'acme/open has no revision "v9"'),
    ],
)
def test_a_repository_that_does_not_open_ends_in_one_sentence(given, said, sentence, hub, pipeline):
    """Law: it says what is wrong and where to go."""
    if said is not None:
        hub.add(given.partition("@")[0], pipeline, **said)
    with pytest.raises(Refused, match=sentence):
        sfumato.load(given)


def test_a_token_opens_a_gated_repository(hub, pipeline, monkeypatch):
    """Law: the token that every tool of the Hub reads."""
    hub.add("acme/gated", pipeline, gated=True)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert sfumato.load("acme/gated").info["family"]


def test_pickles_alone_are_refused_before_any_of_them_is_fetched(hub):
    """Law: nothing that can run code comes here."""
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    files = {"model_index.json": json.dumps(index).encode(), "unet/config.json": b"{}"}
    hub.add("acme/pickled", {**files, "unet/diffusion_pytorch_model.bin": b"a pickle"})
    with pytest.raises(Refused, match=r"unet/ holds only .*\.bin, a pickle"):
        sfumato.load("acme/pickled")
    assert hub.fetched() == ["model_index.json"]


def test_without_a_network_what_was_fetched_is_loaded(tiny, monkeypatch):
    """Law: HF_HUB_OFFLINE, and a Hub that cannot be reached."""
    sfumato.load("acme/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert find_model("acme/tiny").name == tiny.commit
    with pytest.raises(Failed, match=r"cannot be reached|broke off"):
        sfumato.load("acme/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model("acme/tiny").name == tiny.commit
    with pytest.raises(Refused, match="unset HF_HUB_OFFLINE"):
        sfumato.load("acme/other")


def test_a_lora_is_fetched_by_its_id_and_acts_as_its_file(tiny, tmp_path):
    """Law: the only file of a repository, or the one that is named; several are refused with their names."""
    model = sfumato.load("acme/tiny")
    layer = next(name for name, one in model.denoiser.backbone.named_modules() if name.endswith("attn1.to_q"))
    weight = model.denoiser.backbone.get_submodule(layer).weight
    file = tmp_path / "style.safetensors"
    torch.manual_seed(1)
    down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    save_file({f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}, file)
    content = file.read_bytes()
    tiny.add("acme/style", {"style.safetensors": content, "README.md": b"# Style"})
    tiny.add("acme/styles", {"a.safetensors": content, "b.safetensors": content})
    expected = weight + up @ down
    for given in ("acme/style", "acme/style/style.safetensors", "acme/styles/b.safetensors"):
        other = sfumato.load("acme/tiny")
        other.add_lora(given)
        torch.testing.assert_close(other.denoiser.backbone.get_submodule(layer).weight, expected)
    with pytest.raises(Refused, match=r"holds 2 files of weights: name one, as acme/styles/a\.safetensors"):
        model.add_lora("acme/styles")
    assert not [name for name in tiny.fetched() if name == "a.safetensors"]


def test_a_plan_says_what_would_be_fetched_and_fetches_no_weights(tiny, tmp_path):
    """Law: files, bytes and the commit; the cache then holds descriptions alone."""
    recipe = write_recipe("stable-diffusion-1.5", tmp_path, 'train = "lora"', "rank = 2")
    recipe.write_text(recipe.read_text().replace('base = "base"', 'base = "acme/tiny"'))
    found = workflow.plan(Recipe.read(recipe))
    said = found["fetch"]["acme/tiny"]
    assert said["commit"] == tiny.commit
    files = tiny.files("acme/tiny")
    assert not [name for name in tiny.fetched() if name.endswith(".safetensors")]
    find_model("acme/tiny")
    assert said["bytes"] == sum(len(files[name]) for name in tiny.fetched() if name != "model_index.json")


def test_a_run_remembers_the_commit_it_took_and_fetches_it_again(tiny, tmp_path):
    """Law: by name and commit, so that the run is the same where the Hub has gone on, and elsewhere."""
    recipe = write_recipe("stable-diffusion-1.5", tmp_path, 'train = "lora"', "rank = 2")
    recipe.write_text(recipe.read_text().replace('base = "base"', 'base = "acme/tiny"'))
    run = sfumato.train(recipe, ["train.sanity=false", "train.steps=1"])
    kept = json.loads((run.path / "model" / adapter_run.BASE).read_text())
    assert (kept["hub"], kept["commit"]) == ("acme/tiny", tiny.commit)
    tiny.add("acme/tiny", {"README.md": b"all gone"})
    (tmp_path / "hf").rename(tmp_path / "elsewhere")
    assert run.model().info["family"]


def test_a_model_scope_id_is_fetched_by_its_own_library(pipeline, monkeypatch):
    """Law: the package's `snapshot_download` is asked for what is read; without it the extra is named."""
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(Refused, match=r"pip install 'sfumato\[modelscope\]'"):
        sfumato.load("modelscope:acme/tiny@v1")
    asked = []

    def snapshot_download(model_id, revision=None, allow_patterns=None, ignore_patterns=None, **more):
        asked.append((model_id, revision, allow_patterns))
        return str(pipeline)

    stand_in = ModuleType("modelscope")
    stand_in.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "modelscope", stand_in)
    assert sfumato.load("modelscope:acme/tiny@v1").info["family"]
    assert {one[:2] for one in asked} == {("acme/tiny", "v1")}
    assert "unet/*.safetensors" in asked[-1][2] and not [one for one in asked[-1][2] if one.endswith(".py")]


@pytest.mark.slow
def test_the_command_reads_the_environment_as_every_tool_of_the_hub(tiny, tmp_path):
    """Law: HF_ENDPOINT and HF_HOME, in a process of its own."""
    known = {"HF_ENDPOINT": tiny.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    known["HF_HUB_OFFLINE"] = "0"
    recipe = write_recipe("stable-diffusion-1.5", tmp_path, 'train = "lora"')
    recipe.write_text(recipe.read_text().replace('base = "base"', 'base = "acme/tiny"'))
    command = [sys.executable, "-m", "sfumato", "plan", str(recipe), "--json"]
    done = subprocess.run(command, env={**os.environ, **known}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fetch"]["acme/tiny"]["commit"] == tiny.commit
