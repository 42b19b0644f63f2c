"""Laws of what others make of our LoRA and we of theirs: their names and arithmetic judge."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.errors import Refused
from sfumato.models.io import adapter_run
from sfumato.models.lora import adapter, lora_file
from sfumato.models.lora.adapter import AdapterPlan
from sfumato.models.lora.layer_names import layer_names_of
from sfumato.workflow.export import export, text_encoders
from sfumato.workflow.export.lora import write_lora

from . import client_judge as judge
from . import clips, pictures, single_files
from .components import seeded
from .zoo import ZOO

__all__ = ["clips", "pictures"]
QUICK = ("stable-diffusion-xl", "flux-dev", "mochi")
COMFYUI = sorted(file.stem for file in (judge.TABLES / "comfyui").glob("*.json"))
CLOSE = 2e-5
DOCS = Path(__file__).parents[2] / "docs" / "families.md"


def some(names: Any) -> list[Any]:
    """A few quickly, the others among the slow tests."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folders of the zoo, at the widths of the tables."""
    home, made = tmp_path_factory.mktemp("bases"), {}

    def folder(name: str) -> Path:
        if name not in made:
            with pictures.small():
                pipe = ZOO[name].make(name)
            if name == "stable-diffusion-3.5":  # ComfyUI's heads are 64 wide, as many as blocks
                kind: Any = type(pipe.transformer)
                config = {**pipe.transformer.config, "attention_head_dim": 64, "num_attention_heads": 3}
                config["caption_projection_dim"] = 192
                pipe.register_modules(transformer=seeded(kind.from_config(config), "wide sd3"))
            pipe.save_pretrained(home / name)
            made[name] = home / name
        return made[name]

    return folder


def network_of(model: Any) -> Any:
    """The diffusers network of a model."""
    return adapter.peft_target(model.denoiser)


def a_lora(weights: judge.Weights, used: set[str], flat: bool = False, rank: int = 2) -> judge.Weights:
    """A LoRA of every matrix and convolution of a network of ComfyUI's, under its own names."""
    draw, out = torch.Generator().manual_seed(3), {}
    for key, weight in weights.items():
        if key not in used or not key.endswith(".weight") or weight.ndim < 2:
            continue
        layer = key.removesuffix(".weight")
        name = "lora_unet_" + layer.replace(".", "_") if flat else "diffusion_model." + layer
        down, up = ("lora_down", "lora_up") if flat else ("lora_A", "lora_B")
        out[f"{name}.{down}.weight"] = 0.3 * torch.randn(rank, *weight.shape[1:], generator=draw)
        up_shape = (len(weight), rank, *[1] * (weight.ndim - 2))
        out[f"{name}.{up}.weight"] = 0.3 * torch.randn(up_shape, generator=draw)
        out[f"{name}.alpha"] = torch.tensor(3.0)
    return out


@pytest.mark.parametrize("flat", [False, True], ids=["dots", "flat"])
@pytest.mark.parametrize("name", some(COMFYUI))
def test_a_lora_of_every_layer_under_its_makers_names_is_read_whole(name, flat, base, tmp_path):
    """Law: ComfyUI's own names of all layers, as it saves and kohya's trainers write, change as there."""
    model = sfumato.load(base(name))
    network = network_of(model)
    weights, used = judge.in_makers_layout(name, network)
    file = a_lora(weights, used, flat)
    save_file(file, tmp_path / "lora.safetensors")
    theirs, left = judge.read_as_comfyui(name, file, weights)
    assert not left
    model.add_lora(tmp_path / "lora.safetensors")
    assert judge.difference(name, theirs, network)[0] < CLOSE
    assert judge.difference(name, weights, network)[0] > 0.1


KINDS: dict[str, dict[str, Any]] = {
    "lora": {}, "rslora": {"rslora": True, "rank": 4}, "dora": {"dora": True},
    "loha": {"kind": "loha"}, "lokr": {"kind": "lokr"},
}  # fmt: skip


def written(name: str, to: str, base: Any, folder: Path, **known: Any) -> tuple[Any, Any, judge.Weights]:
    """(the network before, the same with its random adapter merged, the file's tensors)."""
    model = sfumato.load(base(name))
    network = network_of(model)
    before = copy.deepcopy(network)
    plan = AdapterPlan(**{"rank": 2, "alpha": 3.0, **known})
    adapter_run.attach(model.denoiser, plan)
    draw = torch.Generator().manual_seed(5)
    for part in network.parameters():
        if part.requires_grad:
            part.data += 0.3 * torch.randn(part.shape, generator=draw)
    tensors = {"": text_encoders.state_of(network, torch.float32)}
    folder.mkdir(exist_ok=True)
    write_lora(model, plan, tensors, to, folder, {"modelspec.title": "run"})
    adapter.merge(network)
    (file,) = folder.glob("*.safetensors")
    return before, network, load_file(file)


def refused(name: str, kind: str, targets: str) -> bool:
    """What ComfyUI has no way to say: parts of joined layers apart, where it knows no names of them."""
    joined = ("hunyuan-video", "lumina-2", "mochi")
    return kind in ("dora", "loha", "lokr") and name in joined


@pytest.mark.parametrize("targets", ["auto", "all"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", some(COMFYUI))
def test_what_leaves_for_comfyui_changes_there_what_it_changed_here(name, kind, targets, base, tmp_path):
    """Law: no key is left over, and every weight is what the merged run has, for every kind of adapter."""
    known = {**KINDS[kind], "targets": (targets,)}
    if refused(name, kind, targets):
        with pytest.raises(Refused, match="are one layer there"):
            written(name, "comfyui", base, tmp_path, **known)
        return
    before, network, file = written(name, "comfyui", base, tmp_path, **known)
    theirs, left = judge.read_as_comfyui(name, file, judge.in_makers_layout(name, before)[0])
    assert not left
    worst, where = judge.difference(name, theirs, network)
    assert worst < CLOSE, where
    assert judge.difference(name, theirs, before)[0] > 0.1


def test_the_judge_reckons_as_comfyui_does():
    """Law: weights that ComfyUI computed, of every kind of adapter it reads, are the judge's."""
    golden = load_file(judge.TABLES / "golden.safetensors")
    names = {key.partition(".")[0] for key in golden}
    assert len(names) > 10
    for name in sorted(names):
        own = {key.removeprefix(f"{name}."): one for key, one in golden.items() if key.startswith(f"{name}.")}
        parts = {
            judge.ENDS[f".{key.removeprefix('part.')}"]: one for key, one in own.items() if "part." in key
        }
        offset = own["offset"].tolist() if "offset" in own else None
        after = judge.patched(own["before"].clone(), parts, offset, "swaps" in own)
        torch.testing.assert_close(after, own["after"], msg=lambda text, name=name: f"{name}: {text}")


ROOM = {
    "flux-dev": "norm_out.linear", "stable-diffusion-3.5": "", "lumina-2": "",
    "chroma": "distilled_guidance_layer.in_proj", "wan-2.1-i2v": "condition_embedder",
    "hunyuan-video": "x_embedder.proj", "qwen-image": "img_in", "z-image": "all_x_embedder.2-1",
    "flux-2-klein": "time_guidance_embed", "stable-diffusion-1.5": "conv_in",
}  # fmt: skip
"""The first layer that kohya's networks have no room for."""


@pytest.mark.parametrize("name", some(ROOM))
def test_what_leaves_for_kohya_finds_room_in_its_networks(name, base, tmp_path):
    """Law: every layer that is written is one of the network's, and one that it has no room for is named."""
    network = network_of(sfumato.load(base(name)))
    holds = layer_names_of(sfumato.load(base(name)).denoiser.family).kohya_holds
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    layers = [n for n, one in network.named_modules() if isinstance(one, kinds) and re.fullmatch(holds, n)]
    _, _, file = written(name, "kohya", base, tmp_path, targets=tuple(rf"{re.escape(n)}()" for n in layers))
    made = {key.partition(".")[0] for key in file}
    assert len(made) > 4 and made <= judge.kohya(name)
    if ROOM[name]:
        with pytest.raises(Refused, match=re.escape(ROOM[name])):
            written(name, "kohya", base, tmp_path / "all", targets=("all",))
    else:
        written(name, "kohya", base, tmp_path, targets=("all",))


def test_a_dora_for_kohya_says_which_module_reads_it(base, tmp_path):
    """Law: kohya's own networks have no DoRA, so the metadata names the module of LyCORIS, which has."""
    written("stable-diffusion-1.5", "kohya", base, tmp_path, dora=True)
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as opened:
        assert opened.metadata()["ss_network_module"] == "lycoris.kohya"


@pytest.mark.parametrize("to", ["comfyui", "kohya", "diffusers"])
def test_a_dora_comes_back_whoever_it_was_written_for(to, base, tmp_path):
    """Law: lengths of either reckoning are read as what they mean."""
    _, network, _ = written("stable-diffusion-1.5", to, base, tmp_path, dora=True)
    model = sfumato.load(base("stable-diffusion-1.5"))
    model.add_lora(next(tmp_path.glob("*.safetensors")))
    for key, one in network_of(model).state_dict().items():
        torch.testing.assert_close(one, network.state_dict()[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("known", [{}, {"rslora": True, "rank": 4}, {"dora": True}], ids=str)
def test_what_leaves_for_diffusers_needs_no_metadata(known, base, tmp_path):
    """Law: a reader of the keys alone, for whom alpha is the rank, finds the whole change."""
    _, network, file = written("flux-dev", "diffusers", base, tmp_path, **known)
    assert not any(key.endswith(".alpha") for key in file)
    plain = {key.replace("lora_magnitude_vector", "dora_scale"): one for key, one in file.items()}
    save_file(plain if known.get("dora") else file, tmp_path / "plain.safetensors")
    model = sfumato.load(base("flux-dev"))
    model.add_lora(tmp_path / "plain.safetensors")
    for key, one in network_of(model).state_dict().items():
        torch.testing.assert_close(one, network.state_dict()[key], atol=1e-5, rtol=1e-4)


def pair(layer: str, rows: int, columns: int, down: str = "lora_A", up: str = "lora_B") -> judge.Weights:
    """A LoRA of rank 2 of one layer."""
    draw = torch.Generator().manual_seed(len(layer))
    return {
        f"{layer}.{down}.weight": 0.3 * torch.randn(2, columns, generator=draw),
        f"{layer}.{up}.weight": 0.3 * torch.randn(rows, 2, generator=draw),
    }


XLABS = {
    **pair("double_blocks.0.processor.qkv_lora1", 96, 32, "down", "up"),
    **pair("double_blocks.1.processor.qkv_lora2", 96, 32, "down", "up"),
    **pair("double_blocks.0.processor.proj_lora1", 32, 32, "down", "up"),
    **pair("double_blocks.1.processor.proj_lora2", 32, 32, "down", "up"),
    **pair("single_blocks.1.processor.qkv_lora", 96, 32, "down", "up"),
    **pair("single_blocks.0.processor.proj_lora", 32, 160, "down", "up"),
}
HOME = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
PROCESSORS = {
    **pair(f"{HOME}.processor.to_q_lora", 8, 8, "down", "up"),
    **pair(f"{HOME}.processor.to_out_lora", 8, 8, "down", "up"),
}
BIAS = {**pair("transformer.x_embedder", 32, 64), "transformer.x_embedder.lora_B.bias": torch.ones(32)}


@pytest.mark.parametrize(
    ("name", "file"),
    [("flux-dev", XLABS), ("stable-diffusion-1.5", PROCESSORS), ("flux-dev", BIAS)],
    ids=["XLabs", "processors", "bias"],
)
def test_older_spellings_are_read_as_diffusers_reads_them(name, file, base, tmp_path):
    """Law: XLabs, attention processors of old and biases of peft change what they change in diffusers."""
    save_file(file, tmp_path / "lora.safetensors")
    mine, theirs = sfumato.load(base(name)), sfumato.load(base(name))
    before = {key: one.clone() for key, one in network_of(mine).state_dict().items()}
    assert mine.add_lora(tmp_path / "lora.safetensors")
    theirs.origin.load_lora_weights(file if "processor" in next(iter(file)) else dict(file))
    adapter.merge(network_of(theirs))
    after = network_of(theirs).state_dict()
    for key, one in network_of(mine).state_dict().items():
        torch.testing.assert_close(one, after[key], atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(one, after[key]) for key, one in before.items())


DIFFSYNTH = {
    "blocks.0.attn.a_to_qkv": "double_blocks_0_img_attn_qkv",
    "blocks.1.attn.b_to_qkv": "double_blocks_1_txt_attn_qkv",
    "blocks.0.attn.a_to_out": "double_blocks_0_img_attn_proj",
    "blocks.0.ff_a.0": "double_blocks_0_img_mlp_0",
    "blocks.0.norm1_b.linear": "double_blocks_0_txt_mod_lin",
    "single_blocks.1.to_qkv_mlp": "single_blocks_1_linear1",
    "single_blocks.0.proj_out": "single_blocks_0_linear2",
    "single_blocks.0.norm.linear": "single_blocks_0_modulation_lin",
}  # fmt: skip
"""DiffSynth-Studio's names of FLUX and kohya's, as diffsynth/utils/lora/flux.py (fed7b18) pairs them."""


def test_diffsynths_names_of_flux_are_read_as_kohyas(base, tmp_path):
    """Law: the same matrices under either name change the same."""
    shapes = judge.comfyui("flux-dev")["shapes"]
    inner = {key.removesuffix(".weight").replace(".", "_"): shape for key, shape in shapes.items()}
    states = []
    for own in (True, False):
        file, ends = {}, ("lora_A.default", "lora_B.default") if own else ("lora_down", "lora_up")
        for theirs, kohyas in DIFFSYNTH.items():
            rows, columns = inner[kohyas]
            both, layer = pair("x", rows, columns, *ends), theirs if own else f"lora_unet_{kohyas}"
            file |= {key.replace("x.", f"{layer}."): one for key, one in both.items()}
        save_file(file, tmp_path / "lora.safetensors")
        model = sfumato.load(base("flux-dev"))
        model.add_lora(tmp_path / "lora.safetensors")
        states.append(network_of(model).state_dict())
    assert all(torch.equal(one, states[1][key]) for key, one in states[0].items())


def test_text_encoders_as_comfyui_calls_them_are_read(base, tmp_path):
    """Law: clip_l is the first CLIP, t5xxl the T5, whichever place it has."""
    q, t5 = "encoder.layers.0.self_attn.q_proj", "encoder.block.0.layer.0.SelfAttention.q"
    model = sfumato.load(base("flux-dev"))
    width = model.origin.text_encoder_2.get_submodule(t5).weight.shape
    file = pair(f"text_encoders.clip_l.transformer.text_model.{q}", 32, 32)
    file |= pair(f"text_encoders.t5xxl.transformer.{t5}", *width)
    save_file(file, tmp_path / "lora.safetensors")
    found = {name.replace("text_model.", "") for name in model.add_lora(tmp_path / "lora.safetensors")}
    assert found == {f"text_encoder.{q}", f"text_encoder_2.{t5}"}


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        ("bundle_emb.word.clip_l", (1, 4), "holds a new word beside its LoRA"),
        ("lora_unet_a.oft_blocks", (2, 2, 2, 2), "holds BOFT"),
        ("lora_unet_a.oft_blocks", (2, 2, 2), "holds OFT"),
        ("diffusion_model.blocks.0.diff_m", (1, 6, 4), "differences of modulation tables"),
    ],
)
def test_what_is_not_read_is_refused_by_its_right_name(key, shape, said, tmp_path):
    """Law: the sentence names what the file holds, and a way out."""
    save_file({**pair("lora_unet_b", 4, 4), key: torch.ones(shape)}, tmp_path / "odd.safetensors")
    with pytest.raises(Refused, match=said):
        lora_file.read(tmp_path / "odd.safetensors")


PREFIX = {"hunyuan-video": "model.model."}
"""What ComfyUI saves before a denoiser's names, where it is not `model.diffusion_model.`."""


@pytest.mark.parametrize("bare", [False, True], ids=["saved", "bare"])
@pytest.mark.parametrize("name", some(name for name in COMFYUI if name != "pixart-sigma"))
def test_a_single_file_as_comfyui_saves_it_is_read(name, bare, base, tmp_path):
    """Law: ComfyUI's names of a denoiser, with and without what it saves before them, give its weights."""
    folder = base(name)
    network = network_of(sfumato.load(folder))
    with torch.no_grad():
        for one in network.parameters():
            one += 0.01 * torch.randn(one.shape, generator=torch.Generator().manual_seed(1))
    if name.startswith("stable-diffusion-") and name != "stable-diffusion-3.5":
        file = {
            key.removeprefix("model.diffusion_model."): one for key, one in single_files.unet(network).items()
        }
    else:
        weights, used = judge.in_makers_layout(name, network)
        file = {key: one for key, one in weights.items() if key in used}
    before = "" if bare else PREFIX.get(name, "model.diffusion_model.")
    save_file({before + key: one.contiguous() for key, one in file.items()}, tmp_path / "one.safetensors")
    loaded = network_of(sfumato.load(tmp_path / "one.safetensors", config=folder)).state_dict()
    for key, one in network.state_dict().items():
        torch.testing.assert_close(
            loaded[key], one, atol=1e-6, rtol=0, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", some(["qwen-image", "z-image"]))
def test_a_whole_denoiser_leaves_under_names_that_comfyui_has(name, base, tmp_path):
    """Law: every weight of the file is one of ComfyUI's network, or a part of one by its own table."""
    sfumato.load(base(name)).save(tmp_path / "merged")
    done = export(tmp_path / "merged", "comfyui", tmp_path / "out")
    table, file = judge.comfyui(name), load_file(done.files[0])
    known = {key: shape for key, shape in table["shapes"].items() if key not in table["names"]}
    for key, one in file.items():
        layer, _, end = key.rpartition(".")
        if end == "weight" and f"diffusion_model.{layer}" in table["names"]:
            there, offset, _ = table["names"][f"diffusion_model.{layer}"]
            assert table["shapes"][there][0] == len(one) if offset is None else offset[2] == len(one)
        elif end == "weight":
            assert len(known[key]) == one.ndim
    assert sum(key.endswith(".weight") for key in file) > 20


def test_hunyuan_video_leaves_for_kohya_with_the_targets_that_the_documentation_says(base, tmp_path):
    """Law: its blocks have room, its token refiner, a usual target, has none and is named."""
    said = re.search(
        r"model\.targets = \['(\(single_\)\?transformer_blocks[^']*)'\]", DOCS.read_text("utf-8")
    )
    assert said is not None
    _, _, file = written("hunyuan-video", "kohya", base, tmp_path / "blocks", targets=(said[1],))
    assert {key.partition(".")[0] for key in file} <= judge.kohya("hunyuan-video")
    with pytest.raises(Refused, match="token_refiner"):
        written("hunyuan-video", "kohya", base, tmp_path / "usual")
