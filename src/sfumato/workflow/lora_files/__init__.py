"""LoRA files as material: looked into, converted, merged, resized, extracted."""

from sfumato.workflow.lora_files.edit_loras import LoraFiles, extract, merge
from sfumato.workflow.lora_files.lora_info import LoraInfo, lora_info

__all__ = ["LoraFiles", "LoraInfo", "extract", "lora_info", "merge"]
