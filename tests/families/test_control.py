"""Laws of ControlNets and IP-Adapters on pretrained families: their pipelines and we draw alike."""

import shutil
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.errors import Refused
from sfumato.models.control import ControlPlan, add_control_modules, attach, controlnet, ip_adapter
from sfumato.models.control.image_encoders import ImageConditionEncoder

from .components import seeded
from .test_parity import grid_of
from .zoo import NEGATIVE, PROMPT, ZOO

CLOSE, STEPS = 1e-4, 4
CONTROLLED = {
    "stable-diffusion-1.5": "StableDiffusionControlNetPipeline",
    "stable-diffusion-xl": "StableDiffusionXLControlNetPipeline",
    "stable-diffusion-3.5": "StableDiffusion3ControlNetPipeline",
    "flux-dev": "FluxControlNetPipeline",
    "qwen-image": "QwenImageControlNetPipeline",
}
LOOKING = ("stable-diffusion-1.5", "stable-diffusion-xl", "stable-diffusion-3.5", "flux-dev")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The zoo's folders of the families that take guides, made when first asked for."""
    home = tmp_path_factory.mktemp("zoo")

    def folder(name: str) -> Any:
        if not (home / name).exists():
            torch.manual_seed(0)
            ZOO[name].make(name).save_pretrained(home / name)
        return home / name

    return folder


def opened(folder: Any, kind: str | None = None, **parts: Any) -> Any:
    """A pipeline that steps as our euler does."""
    loader: Any = diffusers.DiffusionPipeline if kind is None else getattr(diffusers, kind)
    pipe = loader.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    if not type(pipe.scheduler).__name__.startswith("FlowMatch"):
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe


def called(name: str) -> dict[str, Any]:
    """How the family's pipeline is called."""
    case = ZOO[name]
    call = {
        **case.call,
        **case.options,
        "prompt": [PROMPT],
        "num_inference_steps": STEPS,
        "output_type": "np",
    }
    return call | ({"negative_prompt": [NEGATIVE]} if case.negative else {})


def pipeline_pixels(pipe: Any, **call: Any) -> torch.Tensor:
    """What the pipeline's decoder gives."""
    seen: list[torch.Tensor] = []
    decode = pipe.vae.decode

    def decoded(*given: Any, **named: Any) -> Any:
        out = decode(*given, **named)
        seen.append(out[0] if isinstance(out, tuple) else out.sample)
        return out

    pipe.vae.decode = decoded
    with torch.no_grad():
        pipe(**call, generator=torch.Generator().manual_seed(7))
    pipe.vae.decode = decode
    return seen[-1]


def our_pixels(model: Any, pipe: Any, name: str, **guides: Any) -> torch.Tensor:
    """What our decoder gives, from the pipeline's noise along its times."""
    case, seen = ZOO[name], []
    flow = type(pipe.scheduler).__name__.startswith("FlowMatch")
    shape = model.latent_shape(case.call["width"], case.call["height"])
    decode = model.decode
    model.decode = lambda x, *pieces: seen.append(decode(x, *pieces)) or seen[-1]
    model.generate(
        [PROMPT], [NEGATIVE] if case.negative else None, times=grid_of(pipe.scheduler, flow), solver="euler",
        latents=torch.randn(1, *shape, generator=torch.Generator().manual_seed(7)), steps=STEPS,
        guidance=case.call[case.guidance], width=case.call["width"], height=case.call["height"],
        **case.options, **guides,
    )  # fmt: skip
    model.decode = decode
    return seen[-1]


def drawing(shift: int = 0) -> Image.Image:
    """A picture with structure, of the size that is drawn."""
    picture = Image.new("RGB", (96, 64), "black")
    picture.paste((250, 180, 90), (20 + shift, 10, 60 + shift, 50))
    return picture


@pytest.fixture
def modal(monkeypatch):
    """Pipelines that encode a control take the posterior's mode, as we do, not a sample."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


@pytest.mark.parametrize("name", CONTROLLED)
def test_a_new_controlnet_leaves_the_picture_as_it_is(name, folders):
    """Law: zero outputs add nothing, bit for bit."""
    model = sfumato.load(folders(name))
    options = {"steps": 2, "width": 96, "height": 64, **ZOO[name].options}
    before = model.generate([PROMPT], **options)[0].tobytes()
    add_control_modules(model, [ControlPlan("controlnet")])
    assert model.generate([PROMPT], control=drawing(), **options)[0].tobytes() == before
    learned = model.denoiser.trained_weights()
    assert learned and all(name.startswith("guides.") for name in learned)


@pytest.mark.parametrize("name", CONTROLLED)
def test_a_controlnet_draws_as_its_pipeline_does(name, folders, tmp_path, modal):
    """Law: what we train and export, diffusers' pipeline loads, and draws the same."""
    model = sfumato.load(folders(name))
    whole = hasattr(model.denoiser.backbone, "down_blocks")
    guided = add_control_modules(model, [ControlPlan("controlnet", layers=0 if whole else 2)])
    net: Any = guided.control_modules[0].net
    net.load_state_dict({k: v * 0.3 for k, v in seeded(net, name).state_dict().items()})
    controlnet.write(guided.control_modules[0], tmp_path / "controlnet")
    trained: Any = type(net).from_pretrained(tmp_path / "controlnet")
    pipe = opened(folders(name), CONTROLLED[name], controlnet=trained)
    image = "image" if type(net).__name__ == "ControlNetModel" else "control_image"
    call = {"controlnet_conditioning_scale": 0.8, "control_guidance_end": 0.6, image: drawing()}
    expected = pipeline_pixels(pipe, **called(name), **call)
    found = our_pixels(model, pipe, name, control=drawing(), control_weight=0.8, control_end=0.6)
    assert (found - expected).abs().max() < CLOSE
    plain = our_pixels(model, pipe, name)
    assert (plain - expected).abs().max() > 10 * CLOSE


@pytest.mark.parametrize("name", CONTROLLED)
def test_what_a_family_refuses_of_guidance_it_refuses_beside_a_controlnet(name, folders):
    """Law: a guide around a network changes nothing of how it is guided; Qwen-Image keeps its own form."""
    model = sfumato.load(folders(name))
    alone = model.denoiser.guidance
    options = {"steps": 1, "width": 96, "height": 64, "guidance": 4.0, **ZOO[name].options}
    options |= {"true_cfg_scale": 2.0} if "true_cfg_scale" in alone.options else {}

    def said(form: str) -> str:
        try:
            model.generate([PROMPT], [NEGATIVE], guidance_form=form, **options)
        except Refused as refusal:
            return str(refusal)
        return "drawn"

    before = [said(form) for form in ("cfg", "apg", "cfg-zero-star")]
    add_control_modules(model, [ControlPlan("controlnet")])
    assert model.denoiser.guidance is alone
    assert [said(form) for form in ("cfg", "apg", "cfg-zero-star")] == before
    assert before[0] == "drawn" and ("leans by itself" in before[1]) == alone.has_own_form


def test_several_controlnets_add_up_as_in_their_pipeline(folders, tmp_path):
    """Law: two ControlNets with weights of their own are the sum diffusers makes of them."""
    name = "stable-diffusion-1.5"
    model = sfumato.load(folders(name))
    nets = []
    for number in range(2):
        net = seeded(diffusers.ControlNetModel.from_unet(model.denoiser.backbone), f"net {number}")
        net.save_pretrained(tmp_path / str(number))
        nets.append(net)
    for number in range(2):
        attach(model, tmp_path / str(number))
    pipe = opened(folders(name), CONTROLLED[name], controlnet=nets)
    weights, starts = [0.5, 0.2], [0.0, 0.5]
    expected = pipeline_pixels(
        pipe, **called(name), image=[drawing(), drawing(20)], controlnet_conditioning_scale=weights,
        control_guidance_start=starts, control_guidance_end=[1.0, 1.0],
    )  # fmt: skip
    asked = {"control_weight": weights, "control_start": starts}
    found = our_pixels(model, pipe, name, control=[drawing(), drawing(20)], **asked)
    assert (found - expected).abs().max() < CLOSE


def test_a_controlnet_of_the_whole_picture_speaks_beside_the_prompt_alone(folders, tmp_path):
    """Law: one that pools its answers (shuffle) adds nothing beside the negative, as in its pipeline."""
    name = "stable-diffusion-1.5"
    model = sfumato.load(folders(name))
    net = diffusers.ControlNetModel.from_unet(model.denoiser.backbone)
    net.register_to_config(global_pool_conditions=True)
    seeded(net, name).save_pretrained(tmp_path / "shuffle")
    attach(model, tmp_path / "shuffle")
    pipe = opened(folders(name), CONTROLLED[name], controlnet=net)
    call = {"image": drawing(), "controlnet_conditioning_scale": 0.3}
    expected = pipeline_pixels(pipe, **called(name), **call)
    found = our_pixels(model, pipe, name, control=drawing(), control_weight=0.3)
    assert (found - expected).abs().max() < CLOSE


STRANGE = {
    "another base": ("stable-diffusion-xl", "ControlNetModel", {"block_out_channels": (8, 8, 16)}),
    "grey": ("stable-diffusion-1.5", "ControlNetModel", {"conditioning_channels": 1}),
    "inpainting": ("stable-diffusion-3.5", "SD3ControlNetModel", {"extra_conditioning_channels": 1}),
    "union": ("flux-dev", "FluxControlNetModel", {"num_mode": 3}),
    "other guidance": ("flux-dev", "FluxControlNetModel", {"guidance_embeds": False}),
    "qwen inpainting": ("qwen-image", "QwenImageControlNetModel", {"extra_condition_channels": 4}),
}


@pytest.mark.parametrize("which", STRANGE)
def test_a_controlnet_that_does_not_fit_is_refused_when_it_is_added(which, folders, tmp_path):
    """Law: one of another base, or that reads more than a picture, is named with what differs."""
    name, kind, changed = STRANGE[which]
    model = sfumato.load(folders(name))
    fresh = add_control_modules(model, [ControlPlan("controlnet")]).control_modules[0]
    config = {**fresh.net.config, **changed, "_use_default_values": []}  # type: ignore[union-attr]
    getattr(diffusers, kind).from_config(config).save_pretrained(tmp_path / "net")
    with pytest.raises(Refused, match=next(iter(changed))):
        attach(sfumato.load(folders(name)), tmp_path / "net")


def looking(model: Any, width: int, rows: int) -> Any:
    """A new IP-Adapter whose image encoder is one fixed answer."""
    features = torch.randn(1, rows, width, generator=torch.Generator().manual_seed(3))

    class Fixed(torch.nn.Module):
        def config(self):
            return {"source": "fixed"}

        def encoder(self, model):
            return ImageConditionEncoder(lambda pixels: features, "fixed", (8, 8))

    adapter = ip_adapter.IPAdapter(model.denoiser, Fixed(), width)  # type: ignore[arg-type]
    from sfumato.models.control import ControlledDenoiser

    model.denoiser = ControlledDenoiser(model.denoiser, [adapter])
    return adapter, features


def seer(hidden: int = 16, layers: int = 1) -> Any:
    """A tiny image encoder of CLIP's kind; FLUX's loader asks for one."""
    config = transformers.CLIPVisionConfig(
        hidden_size=hidden, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=24,
    )  # fmt: skip
    return transformers.CLIPVisionModelWithProjection(config)


@pytest.mark.parametrize("name", LOOKING)
def test_an_ip_adapter_draws_as_its_pipeline_does(name, folders, tmp_path):
    """Law: a new adapter changes nothing; one with weights loads into diffusers and draws the same.

    SD3's processors also look at the picture once more, so there it is scale 0 that changes nothing.
    """
    model = sfumato.load(folders(name))
    rows = 5 if name.startswith("stable-diffusion-3") else 1
    options = {"steps": 2, "width": 96, "height": 64, **ZOO[name].options}
    before = model.generate([PROMPT], **options)[0].tobytes()
    adapter, features = looking(model, 24, rows)
    gentle = {"reference_scale": 0.0} if name.startswith("stable-diffusion-3") else {}
    assert model.generate([PROMPT], reference=drawing(), **gentle, **options)[0].tobytes() == before
    network = model.denoiser.backbone
    for number, part in enumerate(adapter.parts(network)):
        seeded(part, f"{name} {number}")
    ip_adapter.write(adapter, model.denoiser.base, tmp_path / "ip-adapter.safetensors")
    pipe = opened(folders(name))
    word = (
        "image_encoder_pretrained_model_name_or_path" if name.startswith("flux") else "image_encoder_folder"
    )
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name="ip-adapter.safetensors", **{word: None})
    pipe.set_ip_adapter_scale(0.7)
    silent = torch.zeros_like(features)
    call: dict[str, Any] = {"ip_adapter_image_embeds": [torch.cat([silent, features])]}
    if name.startswith("stable-diffusion-3"):
        call = {"ip_adapter_image_embeds": torch.cat([silent, features])}
    if name.startswith("flux"):
        call = {"ip_adapter_image_embeds": [features], "negative_ip_adapter_image_embeds": [silent]}
    expected = pipeline_pixels(pipe, **called(name), **call)
    found = our_pixels(model, pipe, name, reference=drawing(), reference_scale=0.7)
    assert (found - expected).abs().max() < CLOSE
    plain = our_pixels(model, pipe, name)
    assert (plain - expected).abs().max() > 10 * CLOSE


def resampler(width: int, into: int, wide: int = 32) -> dict[str, torch.Tensor]:
    """The projection of an IP-Adapter Plus, by the names of its file."""
    shapes = {
        "latents": (1, 4, wide), "proj_in.weight": (wide, width), "proj_in.bias": (wide,),
        "proj_out.weight": (into, wide), "proj_out.bias": (into,), "norm_out.weight": (into,),
        "norm_out.bias": (into,),
    }  # fmt: skip
    for layer in range(4):
        attention = {f"0.norm{i}.{part}": (wide,) for i in (1, 2) for part in ("weight", "bias")}
        attention |= {
            "0.to_q.weight": (64, wide),
            "0.to_kv.weight": (128, wide),
            "0.to_out.weight": (wide, 64),
        }
        further = {"1.0.weight": (wide,), "1.0.bias": (wide,), "1.1.weight": (4 * wide, wide)}
        further |= {"1.3.weight": (wide, 4 * wide)}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in (attention | further).items()}
    chance = torch.Generator().manual_seed(5)
    return {
        f"image_proj.{name}": 0.2 * torch.randn(shape, generator=chance) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("name", ["stable-diffusion-1.5", "stable-diffusion-3.5", "flux-dev", "plus"])
def test_an_added_ip_adapter_sees_as_its_pipeline_does(name, folders, tmp_path):
    """Law: through the image encoder beside its file, with what that answers beside a negative; the pipeline
    given the picture draws the same. Without an encoder it is refused a picture."""
    plus, name = name == "plus", name.replace("plus", "stable-diffusion-1.5")
    torch.manual_seed(3)
    eye = seer(hidden=24 if name.startswith("stable-diffusion-3") else 16, layers=2)
    eye.save_pretrained(tmp_path / "image_encoder")
    looks = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    looks.save_pretrained(tmp_path / "image_encoder")
    model = sfumato.load(folders(name))
    adapter, _ = looking(model, 24, 1)
    for number, part in enumerate(adapter.parts(model.denoiser.backbone)):
        seeded(part, f"{name} {number}")
    file = tmp_path / "ip-adapter.safetensors"
    ip_adapter.write(adapter, model.denoiser.base, file)
    if plus:
        kept = {n: one for n, one in load_file(file).items() if not n.startswith("image_proj")}
        save_file(kept | resampler(16, model.denoiser.backbone.config.cross_attention_dim), file)
    pipe = opened(folders(name), image_encoder=eye, feature_extractor=looks)
    word = (
        "image_encoder_pretrained_model_name_or_path" if name.startswith("flux") else "image_encoder_folder"
    )
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=file.name, **{word: None})
    pipe.set_ip_adapter_scale(0.7)
    picture = drawing().crop((30, 10, 46, 26))  # of the encoder's size: nothing is resampled
    expected = pipeline_pixels(pipe, **called(name), ip_adapter_image=picture)
    model = sfumato.load(folders(name))
    attach(model, file)
    found = our_pixels(model, pipe, name, reference=picture, reference_scale=0.7)
    assert (found - expected).abs().max() < CLOSE
    shutil.move(tmp_path / "image_encoder", tmp_path / "elsewhere")
    blind = sfumato.load(folders(name))
    attach(blind, file)
    with pytest.raises(Refused, match="without an image encoder"):
        blind.generate([PROMPT], reference=picture)
    attach(sfumato.load(folders(name)), file, image_encoder=tmp_path / "elsewhere")


def test_a_model_without_a_control_module_refuses_its_picture(folders):
    """Law: every option acts or refuses."""
    model = sfumato.load(folders("stable-diffusion-1.5"))
    for word in ("control", "reference"):
        with pytest.raises(Refused, match=word):
            model.generate([PROMPT], **{word: drawing()})
    with pytest.raises(Refused, match="init"):
        model.generate([PROMPT], mask=drawing())
