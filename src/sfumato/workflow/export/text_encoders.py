"""What text encoders learned, as files that load elsewhere: their LoRA's keys, and new words' embeddings.

A word's file holds one tensor under its own name, which diffusers' load_textual_inversion reads as it is;
where several encoders learned it, one for each, as ComfyUI and kohya's trainers call them: clip_l, clip_g.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sfumato.errors import Failed
from sfumato.generation import Pipeline
from sfumato.models.files import save_sealed
from sfumato.models.lora import adapter, key_conversion, lora_file
from sfumato.models.lora.lora_file import sorted_by_layer
from sfumato.models.pretrained import train_text_encoders
from sfumato.models.pretrained.textual_inversion import PARAMS, name_elsewhere
from sfumato.models.pretrained.train_text_encoders import ExtendedEmbedding, TextPlan


@dataclass
class TextLora:
    """Tensors under a target's keys, and their part of diffusers' metadata."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of a file that holds nothing else."""
        import json

        return {lora_file.METADATA: json.dumps(self.config, default=str)} if self.config else {}


def encoders(model: Pipeline) -> dict[str, nn.Module]:
    """The text encoders of the model's pipeline, by name."""
    return {
        name: part
        for name, part in model.origin.components.items()
        if name.startswith("text_encoder") and isinstance(part, nn.Module)
    }


def adapted_encoders(model: Pipeline) -> dict[str, nn.Module]:
    """Those that carry an adapter."""
    return {name: part for name, part in encoders(model).items() if adapter.names(part)}


def lora_of(model: Pipeline, tensors: Mapping[str, dict[str, Tensor]], to: str, scale: float) -> TextLora:
    """The text encoders' LoRA as the target calls it.

    The names are those that every version of diffusers, ComfyUI and kohya reads: with `text_model`.
    """
    found = TextLora()
    for home, network in adapted_encoders(model).items():
        parts = key_conversion.trained(tensors[home])
        if to == "diffusers":
            config = {**network.peft_config[adapter.NAME].to_dict()}  # type: ignore[union-attr, index, operator]
            config |= {"lora_alpha": config["r"], "use_rslora": False}
            config["target_modules"] = sorted(name.removeprefix("text_model.") for name in parts)
            found.config |= {f"{home}.{name}": value for name, value in config.items()}
            found.tensors |= {
                f"{home}.{full_layer_name(name)}": tensor
                for name, tensor in with_scale(tensors[home], scale).items()
            }
            continue
        flat = flat_prefix(model, home)
        for layer, one in parts.items():
            key = flat + full_layer_name(layer).replace(".", "_")
            found.tensors[f"{key}.lora_down.weight"] = one["down"].contiguous()
            found.tensors[f"{key}.lora_up.weight"] = one["up"].contiguous()
            found.tensors[f"{key}.alpha"] = torch.tensor(scale * one["down"].shape[0])
            if "length" in one and to == "comfyui":
                weight: Any = network.get_submodule(layer).weight
                one["length"] = key_conversion.length_for_comfyui(one, scale, weight)
            if "length" in one:
                found.tensors[f"{key}.dora_scale"] = one["length"].reshape(-1, 1).contiguous()
    return found


def flat_prefix(model: Pipeline, home: str) -> str:
    """What names of a text encoder's layers begin with where kohya and ComfyUI read them."""
    number = home.rpartition("_")[2] if home != "text_encoder" else "1"
    return "lora_te_" if len(encoders(model)) == 1 else f"lora_te{number}_"


def with_scale(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """An adapter's tensors with its scale in their second matrices: alpha is the rank then."""
    return {name: scale * one if ".lora_B." in name else one for name, one in tensors.items()}


def state_of(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """An adapter's tensors, as they are written."""
    return {name: one.detach().to(dtype).cpu().clone() for name, one in adapter.state(network).items()}


def named_layers(tensors: Mapping[str, dict[str, Tensor]]) -> tuple[list[str], list[str]]:
    """(the adapted layers of all networks, those of them that change nothing)."""
    found = {
        f"{home}.{name}".removeprefix("."): change
        for home, part in tensors.items()
        for name, change in sorted_by_layer(part)[0].items()
    }
    return list(found), sorted(name for name, change in found.items() if not change.acts)


def full_layer_name(name: str) -> str:
    """A layer's name with the part of it that newer transformers leave out."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


# ---------------------------------------------------------------- new words


def new_word_tables(model: Pipeline) -> dict[str, ExtendedEmbedding]:
    """The tables with new words, by encoder."""
    tables: dict[str, Any] = {name: one.get_input_embeddings() for name, one in encoders(model).items()}  # type: ignore[operator]
    return {name: table for name, table in tables.items() if isinstance(table, ExtendedEmbedding)}


def words_learned(model: Pipeline, plan: TextPlan) -> float:
    """How far the new words are from where they began, over their rows' deviation."""
    moved = 0.0
    for name in train_text_encoders.tokenizers_and_encoders(model):
        table, beginnings = (
            new_word_tables(model)[name],
            train_text_encoders.initial_embeddings(model, name, plan),
        )
        for word, _ in plan.tokens:
            began, now = beginnings[word], table.rows()[word]
            moved = max(moved, float((now - began.to(now)).abs().max() / began.std()))
    return moved


def write_words(model: Pipeline, to: str, folder: Path, info: Mapping[str, str]) -> dict[Path, str]:
    """A file for each new word; returns the words by file."""
    tables, files = new_word_tables(model), {}
    for word in next(iter(tables.values())).counts if tables else ():
        name = "".join(letter if letter.isalnum() else "-" for letter in word).strip("-") or "word"
        file = folder / f"{name}.safetensors"
        if file in files:
            raise Failed(f"Two new words would be written into {file.name}. Name them more differently.")
        rows = {
            name_elsewhere(model.origin, home): table.rows()[word].contiguous()
            for home, table in tables.items()
        }
        if len(rows) == 1:
            rows = {word if to == "diffusers" else PARAMS: next(iter(rows.values()))}
        save_sealed(rows, file, info)
        files[file] = word
    return files


def read_words(pipe: Any, file: Path, word: str) -> None:
    """Let diffusers load what was written, as its documentation says."""
    rows = load_file(file)
    if len(rows) == 1:
        given: Any = str(file) if word in rows else rows[PARAMS]
        pipe.load_textual_inversion(given, token=word)
        return
    for home in [name for name in pipe.components if name.startswith("text_encoder")]:
        tokenizer = getattr(pipe, home.replace("text_encoder", "tokenizer"))
        own: Any = getattr(pipe, home)
        pipe.load_textual_inversion(
            rows[name_elsewhere(pipe, home)], token=word, text_encoder=own, tokenizer=tokenizer
        )
