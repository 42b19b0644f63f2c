"""Laws of checkpoints built otherwise than the zoo's: what real folders vary in, each beside its pipeline."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as D
import pytest
import torch
from torch import Tensor

import sfumato
from sfumato.errors import Refused
from sfumato.models.pretrained.families.stable_diffusion_xl import StableDiffusionXL

from . import clips, pictures
from .components import clip, seeded, t5, vae
from .zoo import BETAS, PROMPT, SIZE, ZOO, flow, stable_diffusion

CLOSE = 1e-4
STEPS = 4
Make = Callable[[str], Any]


def small_unet(key: str, **known: Any) -> Any:
    """A UNet of two levels."""
    network = D.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 12),
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, attention_head_dim=4,
        **known,
    )  # fmt: skip
    return seeded(network, key)


def sd(scheduler: Any, **known: Any) -> Make:
    return lambda key: stable_diffusion(small_unet(key, **known), scheduler, key)


def with_vae(key: str) -> Any:
    """An autoencoder whose config says more than this pipeline heeds."""
    pipe = sd(D.DDIMScheduler(**BETAS, clip_sample=False))(key)
    pipe.vae.register_to_config(shift_factor=0.3, latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    return pipe


def xl(key: str, network: Any = None, first: bool = True) -> Any:
    pipe = ZOO["stable-diffusion-xl"].make(key)
    if not first:
        encoder, words = clip(key + "/other", pooled=True, width=48, pad="!", act="gelu")
        network = D.UNet2DConditionModel.from_config(
            pipe.unet.config, projection_class_embeddings_input_dim=6 * 8 + 48
        )
        parts = {"text_encoder_2": encoder, "tokenizer_2": words}
        pipe.register_modules(text_encoder=None, tokenizer=None, unet=seeded(network, key + "/unet"), **parts)
    return pipe


def xl_with_statistics(key: str) -> Any:
    pipe = xl(key)
    pipe.vae.register_to_config(latents_mean=[0.4, -0.2, 0.1, 0.3], latents_std=[1.5, 0.7, 2.0, 1.1])
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    return pipe


def without_t5(key: str) -> Any:
    pipe = ZOO["stable-diffusion-3.5"].make(key)
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    return pipe


def grey(key: str) -> Any:
    network = D.UNet2DModel(
        sample_size=(16, 24), in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    scheduler = D.DDIMScheduler(prediction_type="v_prediction", num_train_timesteps=500)
    return D.DDIMPipeline(unet=seeded(network, key), scheduler=scheduler)


def schnell_like(key: str) -> Any:
    pipe = ZOO["flux-schnell"].make(key)
    pipe.vae = vae(key + "/vae", channels=16, factor=0.7, shift=-0.3, quant=False)
    pipe.register_modules(scheduler=flow(shift=1.0, use_exponential_sigmas=True), vae=pipe.vae)
    return pipe


ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
GUIDED = {**SIZE, "guidance_scale": 6.0}
VARIANTS: dict[str, tuple[Make, dict[str, Any], dict[str, Any]]] = {
    "fp16 files in shards, named so": (
        sd(D.EulerDiscreteScheduler(**BETAS)), GUIDED, {"variant": "fp16", "max_shard_size": "30KB"},
    ),
    "weights in half precision": (sd(D.EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True)), GUIDED, {}),
    "zero terminal signal, v": (sd(D.DDIMScheduler(**BETAS, **ZERO, clip_sample=False)), GUIDED, {}),
    "PNDM": (sd(D.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)), GUIDED, {}),
    "DPM++": (sd(D.DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True)), GUIDED, {}),
    "Heun": (sd(D.HeunDiscreteScheduler(**BETAS)), GUIDED, {}),
    "statistics not heeded": (with_vae, GUIDED, {}),
    "guidance heard by a UNet": (
        sd(D.DDIMScheduler(**BETAS, clip_sample=False), time_cond_proj_dim=16), GUIDED, {"alone": True},
    ),
    "XL's statistics, empty is not zero": (xl_with_statistics, GUIDED, {"alone": True}),
    "XL without its first encoder": (lambda key: xl(key, first=False), GUIDED, {}),
    "XL told of sizes": (
        xl,
        {
            **GUIDED, "original_size": (40, 60), "crops_coords_top_left": (3, 5),
            "negative_original_size": (20, 30), "negative_target_size": (64, 96),
        },
        {},
    ),
    "XL told of sizes to lean away from": (
        xl, {**GUIDED, "negative_original_size": (20, 30), "negative_target_size": (9, 7)}, {"alone": True},
    ),
    "SD 3 without T5": (without_t5, {**SIZE, "guidance_scale": 4.0}, {"max_shard_size": "40KB"}),
    "schnell, other statistics": (schnell_like, {**SIZE, "guidance_scale": 0.0}, {"alone": True}),
    "grey, clipped, of 500 steps": (grey, {}, {"alone": True}),
    "UniPC, two experts": (
        ZOO["wan-2.2-a14b"].make, {**clips.CLIP, "guidance_scale": 4.0, "guidance_scale_2": 2.0}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_folder_draws_what_its_pipeline_draws_by_its_own_scheduler(name, tmp_path, monkeypatch):
    """Law: with nothing but the folder, the same noise gives the pipeline's own picture."""
    make, call, how = VARIANTS[name]
    torch.manual_seed(0)
    pipe = make(name)
    if "half" in name:
        pipe.to(torch.float16)
    saving = {word: value for word, value in how.items() if word != "alone"}
    pipe.save_pretrained(tmp_path, **saving)
    pipe = opened(tmp_path, how.get("variant"))
    if "max_sequence_length" in known_by(pipe):
        call = call | {"max_sequence_length": 32}
    prompts = {"prompt": [PROMPT]} if hasattr(pipe, "encode_prompt") else {}
    if not how.get("alone"):
        prompts["negative_prompt"] = ["blurry"]
    with torch.no_grad():
        drawn = pipe(
            **call, **prompts, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(7),
            output_type="np",
        )  # fmt: skip
    theirs = torch.as_tensor(drawn.frames if hasattr(drawn, "frames") else drawn.images)
    mine = ours(tmp_path, call, how, monkeypatch)
    mine = mine.movedim(1, -1)[..., : theirs.shape[-1]]
    assert mine.shape == theirs.shape and (mine - theirs).abs().max() < CLOSE


def known_by(pipe: Any) -> Any:
    """The names of the call's arguments."""
    return type(pipe).__call__.__code__.co_varnames


def opened(folder: Path, variant: str | None) -> Any:
    """The pipeline by diffusers alone, in float32."""
    index = json.loads((folder / "model_index.json").read_text())
    missing = {name: None for name, entry in index.items() if isinstance(entry, list) and entry[0] is None}
    pipe: Any = D.DiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, variant=variant, **missing
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(folder: Path, call: dict[str, Any], how: dict[str, Any], monkeypatch: Any) -> Tensor:
    """Our picture of the folder in [0, 1], [B, 3, (F,) H, W], unrounded."""
    model = sfumato.load(folder)
    shape = model.latent_shape(call.get("width"), call.get("height"), call.get("num_frames"))
    start = torch.randn(1, *shape, generator=torch.Generator().manual_seed(7))
    seen: list[Tensor] = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda x, *pieces: seen.append(decode(x, *pieces)) or seen[-1])
    known = ("guidance_scale_2", "max_sequence_length", *StableDiffusionXL.micro_conditioning_arguments)
    options = {word: call[word] for word in known if word in call}
    model.generate(
        prompt=[PROMPT] if call else None,
        negative=None if how.get("alone") else "blurry",
        steps=STEPS,
        guidance=call.get("guidance_scale"),
        height=call.get("height"),
        width=call.get("width"),
        frames=call.get("num_frames"),
        latents=start,
        **options,
    )
    return (seen[0] / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (lambda key: vae(key, channels=16), "takes latents of 4 channels, but its vae makes 16"),
        (lambda key: ZOO["stable-diffusion-xl"].make(key).unet, "reads text_time beside the words"),
        (lambda key: clip(key, width=48)[0], "gives words of 48 numbers, its unet reads 32"),
    ],
    ids=["vae", "unet", "text_encoder"],
)
def test_parts_of_different_models_are_refused_as_such(part, words, request, tmp_path):
    """Law: a component of another family is named before anything is drawn."""
    pipe = sd(D.DDIMScheduler(**BETAS))("mixed")
    name = request.node.callspec.id
    pipe.register_modules(**{name: part("other")})
    pipe.save_pretrained(tmp_path)
    with pytest.raises(Refused, match=f"put together from different models: .*{words}"):
        sfumato.load(tmp_path)


@pytest.mark.parametrize(
    ("part", "words"),
    [("vae", "64 channels, but its vae makes 4"), ("text_encoder_2", "its transformer reads 32")],
)
def test_parts_that_a_flux_does_not_fit_are_refused_as_such(part, words, tmp_path):
    """Law: latents that are packed are counted too, and the words of a T5."""
    pipe, other = ZOO["flux-dev"].make("mixed"), ZOO["stable-diffusion-1.5"].make("other")
    found = {"vae": other.vae, "text_encoder_2": t5("wide", width=40)[0]}[part]
    pipe.register_modules(**{part: found})
    pipe.save_pretrained(tmp_path)
    with pytest.raises(Refused, match=words):
        sfumato.load(tmp_path)


def test_an_editor_whose_index_names_transformers_own_processor_loads_and_is_saved(tmp_path):
    """Law: real folders name Qwen2VLProcessor, which is composed here; what is saved loads again."""
    pictures.qwen_edit("editor", D.QwenImageEditPipeline).save_pretrained(tmp_path / "made")
    sfumato.load(tmp_path / "made").save(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["processor"] == ["transformers", "Qwen2VLProcessor"]
    again = sfumato.load(tmp_path / "saved")
    with pictures.small():
        condition = again.condition([PROMPT], image=[pictures.picture()])
    assert condition["reference"].isfinite().all()


def test_a_negative_that_a_unet_would_not_read_is_refused(tmp_path):
    """Law: where guidance is heard, there is nothing to lean away from."""
    make = sd(D.DDIMScheduler(**BETAS, clip_sample=False), time_cond_proj_dim=16)
    make("heard").save_pretrained(tmp_path)
    with pytest.raises(Refused, match="leave it out"):
        sfumato.load(tmp_path).generate([PROMPT], "blurry", steps=1, height=32, width=32)


@pytest.mark.parametrize("file", ["unet", "text_encoder", "tokenizer", "scheduler", "vae"])
def test_a_missing_component_is_named_with_the_way_out(file, tmp_path):
    """Law: a folder that lacks what its index lists is refused in a sentence."""
    sd(D.DDIMScheduler(**BETAS))("missing").save_pretrained(tmp_path)
    (tmp_path / file).rename(tmp_path / "elsewhere")
    with pytest.raises(Refused, match=rf'lists a component "{file}".*has no folder {file}/'):
        sfumato.load(tmp_path)
