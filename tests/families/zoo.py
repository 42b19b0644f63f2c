"""Tiny checkpoints of pretrained families, in the layout of their real folders, made offline.

Channels, statistics, schedulers, templates and pad tokens are the real models'. Sides differ.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers as D
import torch
import transformers as T

from .components import clip, drawn, gemma, qwen3, qwen_vl, seeded, t5, vae

PROMPT, NEGATIVE = "a red circle on a blue background", "blurry, low quality"
SIZE = {"height": 64, "width": 96}


@dataclass(frozen=True)
class Case:
    """One checkpoint: how it is made, and how its pipeline and our model are called.

    Args:
        make: key → the pipeline.
        call: arguments of the pipeline's call; guidance: which of them `generate(guidance=…)` means.
        options: arguments of `condition`, where pictures of the call go too; negative: whether the pipeline
            takes a negative prompt.
    """

    make: Callable[[str], Any]
    call: dict[str, Any] = field(default_factory=dict)
    guidance: str = "guidance_scale"
    options: dict[str, Any] = field(default_factory=dict)
    negative: bool = True
    prompt: bool = True


ZOO: dict[str, Case] = {}


def case(name: str, **known: Any) -> Callable[[Callable[[str], Any]], Callable[[str], Any]]:
    """Put what follows into the zoo."""

    def put(make: Callable[[str], Any]) -> Callable[[str], Any]:
        ZOO[name] = Case(make, **known)
        return make

    return put


FLUX_VAE = {"channels": 16, "factor": 0.3611, "shift": 0.1159, "quant": False}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BY_TOKENS = {
    "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
    "base_image_seq_len": 256, "max_image_seq_len": 4096,
}  # fmt: skip
flow = D.FlowMatchEulerDiscreteScheduler


# ---------------------------------------------------------------- UNets


@case("ddpm", prompt=False, negative=False)
def ddpm(key: str):
    network = D.UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    return D.DDPMPipeline(unet=seeded(network, key), scheduler=D.DDPMScheduler())


def unet(key: str, **known: Any):
    """The UNet of Stable Diffusion 1 and 2."""
    network = D.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16, 16, 16),
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, cross_attention_dim=32,
        **{"attention_head_dim": 2, **known},
    )  # fmt: skip
    return seeded(network, key)


def stable_diffusion(network: Any, scheduler: Any, key: str, **text: Any):
    """The pipeline without its checker."""
    encoder, tokenizer = clip(key + "/text", **text)
    return D.StableDiffusionPipeline(
        unet=network, vae=vae(key + "/vae"), tokenizer=tokenizer, text_encoder=encoder, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@case("stable-diffusion-1.5", call={**SIZE, "guidance_scale": 7.5})
def stable_diffusion_1(key: str):
    known = {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
    return stable_diffusion(unet(key), D.PNDMScheduler(**BETAS, **known), key)


@case("stable-diffusion-2-v", call={**SIZE, "guidance_scale": 7.5})
def stable_diffusion_2(key: str):
    scheduler = D.DDIMScheduler(
        **BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    network = unet(key, attention_head_dim=(1, 2, 2, 2), use_linear_projection=True, upcast_attention=True)
    return stable_diffusion(network, scheduler, key, pad="!", act="gelu")


@case("stable-diffusion-xl", call={**SIZE, "guidance_scale": 5.0})
def stable_diffusion_xl(key: str):
    first, first_words = clip(key + "/text", width=16)
    second, second_words = clip(key + "/text_2", pooled=True, pad="!", act="gelu")
    network = D.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), attention_head_dim=(1, 2, 2), cross_attention_dim=48,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip
    return D.StableDiffusionXLPipeline(
        unet=seeded(network, key), vae=vae(key + "/vae", factor=0.13025), tokenizer=first_words,
        text_encoder=first, tokenizer_2=second_words, text_encoder_2=second,
        scheduler=D.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
    )  # fmt: skip


# ---------------------------------------------------------------- transformers


@case("dit", call={"guidance_scale": 4.0}, prompt=False, negative=False)
def dit(key: str):
    network = D.DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
        out_channels=8, num_embeds_ada_norm=1000, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    return D.DiTPipeline(
        transformer=seeded(network, key), vae=vae(key + "/vae"), scheduler=D.DDIMScheduler(clip_sample=False),
        id2label={i: f"class{i}" for i in range(10)},
    )  # fmt: skip


@case(
    "pixart-sigma",
    call={**SIZE, "guidance_scale": 4.5, "use_resolution_binning": False},
    options={"max_sequence_length": 32, "clean_caption": False},
)
def pixart_sigma(key: str):
    encoder, tokenizer = t5(key + "/text")
    network = D.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
        out_channels=8, cross_attention_dim=32, caption_channels=32, interpolation_scale=2,
        use_additional_conditions=False,
    )  # fmt: skip
    return D.PixArtSigmaPipeline(
        transformer=seeded(network, key), vae=vae(key + "/vae", factor=0.13025), text_encoder=encoder,
        tokenizer=tokenizer, scheduler=D.DPMSolverMultistepScheduler(beta_schedule="linear"),
    )  # fmt: skip


@case("stable-diffusion-3.5", call={**SIZE, "guidance_scale": 5.0}, options={"max_sequence_length": 32})
def stable_diffusion_3(key: str):
    first, first_words = clip(key + "/text", pooled=True, width=16)
    second, second_words = clip(key + "/text_2", pooled=True, pad="!", act="gelu")
    third, third_words = t5(key + "/text_3", width=64)
    network = D.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=48,
        pos_embed_max_size=24, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return D.StableDiffusion3Pipeline(
        transformer=seeded(network, key), vae=vae(key + "/vae", 16, 1.5305, 0.0609, False),
        tokenizer=first_words, text_encoder=first, tokenizer_2=second_words, text_encoder_2=second,
        tokenizer_3=third_words, text_encoder_3=third, scheduler=flow(shift=3.0),
    )  # fmt: skip


def flux(key: str, guided: bool, scheduler: Any, pipeline: Any = None):
    """FLUX.1, and what shares its parts."""
    first, first_words = clip(key + "/text")
    second, second_words = t5(key + "/text_2")
    network = D.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
        guidance_embeds=guided,
    )  # fmt: skip
    return (pipeline or D.FluxPipeline)(
        transformer=seeded(network, key), vae=vae(key + "/vae", **FLUX_VAE), tokenizer=first_words,
        text_encoder=first, text_encoder_2=second, tokenizer_2=second_words, scheduler=scheduler,
    )  # fmt: skip


FLUX_OPTIONS = {"options": {"max_sequence_length": 32}, "negative": False}


@case("flux-dev", call={**SIZE, "guidance_scale": 2.5}, **FLUX_OPTIONS)
def flux_dev(key: str):
    return flux(key, True, flow(**BY_TOKENS))


@case("flux-schnell", call={**SIZE, "guidance_scale": 0.0}, **FLUX_OPTIONS)
def flux_schnell(key: str):
    return flux(key, False, flow(shift=1.0))


@case(
    "qwen-image",
    call={**SIZE, "true_cfg_scale": 4.0},
    guidance="true_cfg_scale",
    options={"max_sequence_length": 64},
)
def qwen_image(key: str):
    return D.QwenImagePipeline(**qwen_image_parts(key))


def qwen_image_parts(key: str) -> dict[str, Any]:
    """What Qwen-Image's pipelines share."""
    encoder, tokenizer = qwen_vl(key + "/text")
    network = D.QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = flow(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02,
        time_shift_type="exponential", shift=1.0,
    )  # fmt: skip
    coder = D.AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1, dim_mult=[1, 2, 2, 2])
    return {
        "transformer": seeded(network, key), "vae": seeded(coder, key + "/vae"), "text_encoder": encoder,
        "tokenizer": tokenizer, "scheduler": scheduler,
    }  # fmt: skip


@case("z-image", call={**SIZE, "guidance_scale": 3.0}, options={"max_sequence_length": 48})
def z_image(key: str):
    encoder, tokenizer = qwen3(key + "/text", T.Qwen3Model)
    network = D.ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
    )  # fmt: skip
    return D.ZImagePipeline(
        transformer=seeded(network, key), vae=vae(key + "/vae", **FLUX_VAE), text_encoder=encoder,
        tokenizer=tokenizer, scheduler=flow(shift=6.0),
    )  # fmt: skip


@case(
    "sana",
    call={"height": 128, "width": 192, "guidance_scale": 4.5, "use_resolution_binning": False},
    options={
        "max_sequence_length": 32,
        "clean_caption": False,
        "complex_human_instruction": ["Given a user prompt, generate an image prompt.", "User Prompt: "],
    },
)
def sana(key: str):
    encoder, tokenizer = gemma(key + "/text")
    blocks, widths = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3, (8, 8, 8, 16, 16, 32)
    scales = ((), (), (), (5,), (5,), (5,))
    coder = D.AutoencoderDC(
        latent_channels=32, attention_head_dim=8, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6, encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales, scaling_factor=0.41407,
    )  # fmt: skip
    network = D.SanaTransformer2DModel(
        in_channels=32, out_channels=32, num_attention_heads=4, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=32,
        sample_size=4,
    )  # fmt: skip
    scheduler = D.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    return D.SanaPipeline(
        transformer=seeded(network, key), vae=seeded(coder, key + "/vae"), text_encoder=encoder,
        tokenizer=tokenizer, scheduler=scheduler,
    )  # fmt: skip


@case("lumina-2", call={**SIZE, "guidance_scale": 4.0}, options={"max_sequence_length": 64})
def lumina_2(key: str):
    encoder, tokenizer = gemma(key + "/text")
    network = D.Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, hidden_size=48, num_layers=2, num_refiner_layers=1,
        num_attention_heads=4, num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 64, 64), cap_feat_dim=32,
    )  # fmt: skip
    return D.Lumina2Pipeline(
        transformer=seeded(network, key), vae=vae(key + "/vae", **FLUX_VAE), text_encoder=encoder,
        tokenizer=tokenizer, scheduler=flow(shift=6.0),
    )  # fmt: skip


@case("auraflow", call={**SIZE, "guidance_scale": 3.5}, options={"max_sequence_length": 32})
def auraflow(key: str):
    encoder, tokenizer = t5(key + "/text", many=True)
    network = D.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=2, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip
    return D.AuraFlowPipeline(
        transformer=seeded(network, key), vae=vae(key + "/vae", factor=0.13025), text_encoder=encoder,
        tokenizer=tokenizer, scheduler=flow(shift=1.73),
    )  # fmt: skip


@case("chroma", call={**SIZE, "guidance_scale": 5.0}, options={"max_sequence_length": 32})
def chroma(key: str):
    encoder, tokenizer = t5(key + "/text")
    network = D.ChromaTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_num_channels=16,
        approximator_hidden_dim=32, approximator_layers=2,
    )  # fmt: skip
    return D.ChromaPipeline(
        transformer=seeded(network, key), vae=vae(key + "/vae", **FLUX_VAE), text_encoder=encoder,
        tokenizer=tokenizer, scheduler=flow(**BY_TOKENS),
    )  # fmt: skip


@case(
    "flux-2-klein",
    call={**SIZE, "guidance_scale": 4.0, "text_encoder_out_layers": (1, 2, 3)},
    options={"max_sequence_length": 32, "text_encoder_out_layers": (1, 2, 3)},
    negative=False,
)
def flux_2_klein(key: str):
    encoder, tokenizer = qwen3(key + "/text", T.Qwen3ForCausalLM, width=16)
    coder = D.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=32, norm_num_groups=4,
        sample_size=64,
    )  # fmt: skip
    coder = seeded(coder, key + "/vae")
    coder.bn.running_mean.copy_(0.3 * torch.randn(128, generator=drawn(key, "mean")))
    coder.bn.running_var.copy_(1 + torch.rand(128, generator=drawn(key, "variance")))
    network = D.Flux2Transformer2DModel(
        in_channels=128, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )  # fmt: skip
    return D.Flux2KleinPipeline(
        transformer=seeded(network, key), vae=coder, text_encoder=encoder, tokenizer=tokenizer,
        scheduler=flow(shift=3.0, use_dynamic_shifting=True), is_distilled=False,
    )  # fmt: skip
