"""Parts of tiny checkpoints: text encoders with their tokenizers, autoencoders, parameters from names.

Every parameter is drawn from a seed hashed from its name, so that nothing stays at zero and a wrong input
shows.
"""

from hashlib import sha256
from typing import Any

import diffusers as D
import torch
import transformers as T

from . import tokenizers


def drawn(*key: str) -> torch.Generator:
    """A generator of its own for this name."""
    return torch.Generator().manual_seed(int(sha256("/".join(key).encode()).hexdigest()[:12], 16))


@torch.no_grad()
def seeded(module: Any, key: str) -> Any:
    """The module with every parameter redrawn, none left at zero."""
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=drawn(key, name))
        leaf = name.rsplit(".", 1)[-1]
        if parameter.ndim >= 2:
            table = "embed" in name and parameter.ndim == 2 and parameter.shape[0] > 4 * parameter.shape[1]
            noise = noise * (0.5 if table else parameter[0].numel() ** -0.5)
        else:
            noise = 1 + 0.1 * noise if leaf in ("weight", "gamma", "g") else 0.05 * noise
        parameter.copy_(noise)
    return module.eval()


def clip(
    key: str, pooled: bool = False, width: int = 32, pad: str = "<|endoftext|>", act: str = "quick_gelu"
):
    """(text encoder, tokenizer) of CLIP's kind."""
    tokenizer = tokenizers.clip_tokenizer(pad)
    config = T.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, hidden_act=act, projection_dim=width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_position_embeddings=77,
    )  # fmt: skip
    kind = T.CLIPTextModelWithProjection if pooled else T.CLIPTextModel
    return seeded(kind(config), key), tokenizer


def t5(key: str, width: int = 32, many: bool = False):
    """(text encoder, tokenizer) of T5's kind, or UMT5's."""
    tokenizer = tokenizers.t5_tokenizer()
    config, kind = (T.UMT5Config, T.UMT5EncoderModel) if many else (T.T5Config, T.T5EncoderModel)
    settings = config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=8, relative_attention_max_distance=32,
    )  # fmt: skip
    return seeded(kind(settings), key), tokenizer


def gemma(key: str, width: int = 32):
    """(text encoder, tokenizer) of Gemma 2's kind."""
    tokenizer = tokenizers.gemma_tokenizer()
    config = T.Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=64,
        max_position_embeddings=1024, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return seeded(T.Gemma2Model(config), key), tokenizer


def qwen3(key: str, kind: Any, width: int = 32):
    """(text encoder, tokenizer) of Qwen 3's kind."""
    tokenizer = tokenizers.qwen_tokenizer()
    config = T.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )  # fmt: skip
    return seeded(kind(config), key), tokenizer


def qwen_vl(key: str, width: int = 32):
    """(text encoder, tokenizer) of Qwen 2.5-VL's kind."""
    tokenizer = tokenizers.qwen_tokenizer()
    number = tokenizer.convert_tokens_to_ids
    rope = {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": number("<|im_end|>"),
        "rope_scaling": rope, "rope_theta": 1e6,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width,
        "fullatt_block_indexes": [0], "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "window_size": 112,
    }  # fmt: skip
    config = T.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"), vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )  # fmt: skip
    return seeded(T.Qwen2_5_VLForConditionalGeneration(config), key), tokenizer


def vae(key: str, channels: int = 4, factor: float = 0.18215, shift: float | None = None, quant: bool = True):
    """AutoencoderKL."""
    return seeded(
        D.AutoencoderKL(
            in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=[8] * 4, layers_per_block=1,
            latent_channels=channels, norm_num_groups=4, sample_size=64, scaling_factor=factor,
            shift_factor=shift, use_quant_conv=quant, use_post_quant_conv=quant,
        ),
        key,
    )  # fmt: skip
