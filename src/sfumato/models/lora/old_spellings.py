"""Spellings of keys that stand for usual ones: XLabs' FLUX, and diffusers' attention processors before peft.

    double_blocks.3.processor.qkv_lora1.down.weight            double_blocks.3.img_attn.qkv.lora_down.weight
    unet.….attn1.processor.to_out_lora.up.weight               unet.….attn1.to_out.0.lora_up.weight

Conventions: XLabs-AI/x-flux; diffusers' lora_conversion_utils.py, and its attention_processor.py before 0.22.
"""

import re

SPELLINGS = (
    (r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora1\.(down|up)\.", r"\1.img_attn.\2.lora_\3."),
    (r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora2\.(down|up)\.", r"\1.txt_attn.\2.lora_\3."),
    (r"(single_blocks\.\d+)\.processor\.qkv_lora\.(down|up)\.", r"\1.linear1_qkv.lora_\2."),
    (r"(single_blocks\.\d+)\.processor\.proj_lora\.(down|up)\.", r"\1.linear2.lora_\2."),
    (r"\.processor\.to_out_lora\.(down|up)\.", r".to_out.0.lora_\1."),
    (r"\.processor\.(\w+)_lora\.(down|up)\.", r".\1.lora_\2."),
)
"""(a pattern within a key, what is usual there), in order."""


def usual(key: str) -> str:
    """The key as it is spelt today."""
    for pattern, there in SPELLINGS:
        key = re.sub(pattern, there, key)
    return key
