"""Tiny checkpoints of the families that draw clips; importing this puts them into the zoo."""

from typing import Any

import diffusers as D
import torch
import transformers as T

from . import tokenizers
from .components import clip, drawn, seeded, t5
from .zoo import BETAS, case, flow

CLIP = {"height": 32, "width": 48, "num_frames": 9}
SHORT = {"max_sequence_length": 32}


def wan_network(**known: Any):
    """Wan's transformer."""
    return D.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32,
        ffn_dim=48, num_layers=2, rope_max_seq_len=64, **known,
    )  # fmt: skip


def wan(key: str, network: Any, coder: Any, shift: float, **known: Any):
    """Wan's pipeline."""
    encoder, tokenizer = t5(key + "/text", many=True)
    scheduler = D.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    return D.WanPipeline(
        transformer=seeded(network, key), vae=seeded(coder, key + "/vae"), text_encoder=encoder,
        tokenizer=tokenizer, scheduler=scheduler, **{"transformer_2": None, **known},
    )  # fmt: skip


def wan_coder():
    """Wan 2.1's autoencoder."""
    return D.AutoencoderKLWan(base_dim=4, num_res_blocks=1, dim_mult=[1, 2, 2, 2])


@case("wan-2.1", call={**CLIP, "guidance_scale": 5.0}, options=SHORT)
def wan_21(key: str):
    return wan(key, wan_network(), wan_coder(), 3.0)


@case("wan-2.2-a14b", call={**CLIP, "guidance_scale": 4.0}, options=SHORT)
def wan_22_experts(key: str):
    second = seeded(wan_network(), key + "/second")
    return wan(key, wan_network(), wan_coder(), 3.0, transformer_2=second, boundary_ratio=0.875)


def wan_22_coder(key: str):
    """Wan 2.2 5B's autoencoder."""
    draw = drawn(key, "statistics")
    return D.AutoencoderKLWan(
        base_dim=4, decoder_base_dim=6, z_dim=48, num_res_blocks=1, dim_mult=[1, 2, 2, 2], is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
        temperal_downsample=[False, True, True],
        latents_mean=(0.3 * torch.randn(48, generator=draw)).tolist(),
        latents_std=(0.5 + torch.rand(48, generator=draw)).tolist(),
    )  # fmt: skip


@case("wan-2.2-5b", call={"height": 64, "width": 96, "num_frames": 9, "guidance_scale": 5.0}, options=SHORT)
def wan_22_small(key: str):
    network = wan_network(in_channels=48, out_channels=48)
    return wan(key, network, wan_22_coder(key), 5.0, expand_timesteps=True)


@case("ltx-video", call={"height": 64, "width": 96, "num_frames": 9, "guidance_scale": 3.0}, options=SHORT)
def ltx_video(key: str):
    encoder, tokenizer = t5(key + "/text")
    coder = D.AutoencoderKLLTXVideo(
        latent_channels=128, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
    )  # fmt: skip
    draw = drawn(key, "statistics")
    coder.latents_mean.copy_(0.3 * torch.randn(128, generator=draw))
    coder.latents_std.copy_(0.5 + torch.rand(128, generator=draw))
    network = D.LTXVideoTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32, num_layers=2, caption_channels=32
    )
    scheduler = flow(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
        max_image_seq_len=4096, shift_terminal=0.1,
    )  # fmt: skip
    return D.LTXPipeline(
        transformer=seeded(network, key), vae=seeded(coder, key + "/vae"), text_encoder=encoder,
        tokenizer=tokenizer, scheduler=scheduler,
    )  # fmt: skip


@case("cogvideox-5b", call={**CLIP, "guidance_scale": 6.0}, options=SHORT)
def cogvideox(key: str):
    encoder, tokenizer = t5(key + "/text")
    coder = D.AutoencoderKLCogVideoX(
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, sample_height=32, sample_width=48,
        scaling_factor=0.7,
    )  # fmt: skip
    network = D.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=16, out_channels=16, time_embed_dim=16,
        text_embed_dim=32, num_layers=2, sample_width=6, sample_height=4, sample_frames=9,
        max_text_seq_length=32, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    scheduler = D.CogVideoXDDIMScheduler(
        **BETAS, prediction_type="v_prediction", clip_sample=False, rescale_betas_zero_snr=True,
        set_alpha_to_one=True, snr_shift_scale=1.0, timestep_spacing="trailing",
    )  # fmt: skip
    return D.CogVideoXPipeline(
        transformer=seeded(network, key), vae=seeded(coder, key + "/vae"), text_encoder=encoder,
        tokenizer=tokenizer, scheduler=scheduler,
    )  # fmt: skip


@case("hunyuan-video", call={**CLIP, "guidance_scale": 6.0}, options=SHORT, negative=False)
def hunyuan_video(key: str):
    tokenizer = tokenizers.llama_tokenizer()
    config = T.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    second, second_words = clip(key + "/text_2")
    coder = D.AutoencoderKLHunyuanVideo(
        latent_channels=16, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
    )
    network = D.HunyuanVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=32, pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return D.HunyuanVideoPipeline(
        transformer=seeded(network, key), vae=seeded(coder, key + "/vae"),
        text_encoder=seeded(T.LlamaModel(config), key + "/text"), tokenizer=tokenizer, text_encoder_2=second,
        tokenizer_2=second_words, scheduler=flow(shift=7.0),
    )  # fmt: skip


@case("mochi", call={"height": 32, "width": 48, "num_frames": 7, "guidance_scale": 4.5}, options=SHORT)
def mochi(key: str):
    encoder, tokenizer = t5(key + "/text")
    coder = D.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5,
        add_attention_block=(False,) * 5,
    )  # fmt: skip
    network = D.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        text_embed_dim=32, time_embed_dim=16, max_sequence_length=32,
    )  # fmt: skip
    return D.MochiPipeline(
        transformer=seeded(network, key), vae=seeded(coder, key + "/vae"), text_encoder=encoder,
        tokenizer=tokenizer, scheduler=flow(invert_sigmas=True),
    )  # fmt: skip
