"""A model in one file of its makers' layout (.safetensors): diffusers' converters, offline.

The file holds weights alone, often without text encoders or autoencoder. A folder in diffusers' layout says
what the networks look like (its config.json files), and lends what the file lacks.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from sfumato.errors import Refused

WEIGHTS = (".safetensors", ".safetensors.index.json")


def components(
    file: Path, folder: Path, index: dict[str, Any], denoiser: str, dtype: torch.dtype
) -> dict[str, Any]:
    """The networks that the file holds, by component; what it lacks is left to the folder.

    Raises:
        Refused: the file's denoiser is not the one that the folder describes, or nobody has a component.
    """
    import diffusers
    from diffusers.loaders.single_file_model import _get_single_file_loadable_mapping_class as convertible
    from diffusers.loaders.single_file_utils import load_single_file_checkpoint

    try:
        tensors: Any = load_single_file_checkpoint(str(file), local_files_only=True)
    except Exception as problem:
        raise Refused(f"{file} is damaged ({problem}). Copy it again.") from problem
    found: dict[str, Any] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or not entry[0]:
            continue
        kind = getattr(diffusers, entry[1], None) if entry[0] == "diffusers" else None
        reason = "the file has no such part"
        is_network = isinstance(kind, type) and issubclass(kind, nn.Module)
        if is_network and (converter := convertible(kind)):
            with at_width(converter, folder / name):
                held = of_denoiser(tensors, entry[1]) if name == denoiser else tensors
                part, reason = converted(kind, held, folder, name, dtype)
        elif isinstance(kind, type) and name == denoiser:
            part, reason = under_its_own_names(kind, tensors, folder / name, dtype)
        elif entry[0] == "transformers" and name.startswith("text_encoder"):
            part = text_part(entry[1], name, tensors, folder, dtype)
        else:
            continue
        if part is not None:
            found[name] = part
        elif name == denoiser:
            raise Refused(
                f"{file} does not fit {folder}, whose {name} is a {entry[1]}: {reason}. Give as config the "
                "folder of the model that the file was made from."
            )
        elif not any(one.name.endswith(WEIGHTS) for one in (folder / name).glob("*")):
            raise Refused(
                f'{file} has no "{name}" ({entry[1]}), and {folder / name} holds no weights either. Put the '
                f"weights of the model's {name} there (*.safetensors)."
            )
    return found


IN_CHECKPOINT = ("model.diffusion_model.", "model.model.")
"""What stands before the denoiser's names in a file that holds more than it, as ComfyUI saves one."""
NORMS = [(r"(query_norm|key_norm|norms\.\d+)\.weight$", r"\1.scale")]
RENAMED = {
    "FluxTransformer2DModel": NORMS,
    "ChromaTransformer2DModel": NORMS,
    "HunyuanVideoTransformer3DModel": [
        (r"\.(img|txt)_attn\.norm\.query_norm\.(weight|scale)$", r".\1_attn_q_norm.weight"),
        (r"\.(img|txt)_attn\.norm\.key_norm\.(weight|scale)$", r".\1_attn_k_norm.weight"),
        (r"\.norm\.query_norm\.(weight|scale)$", ".q_norm.weight"),
        (r"\.norm\.key_norm\.(weight|scale)$", ".k_norm.weight"),
        (r"_attn\.(qkv|proj)\.", r"_attn_\1."), (r"(_mod|modulation)\.lin\.", r"\1.linear."),
        (r"mlp\.0\.", "mlp.fc1."), (r"((?:img|txt)_|blocks\.\d+\.)mlp\.2\.", r"\1mlp.fc2."),
        (r"^(time_in|guidance_in|txt_in\.t_embedder)\.in_layer", r"\1.mlp.0"),
        (r"^(time_in|guidance_in|txt_in\.t_embedder)\.out_layer", r"\1.mlp.2"),
        (r"^txt_in\.c_embedder\.in_layer", "txt_in.c_embedder.linear_1"),
        (r"^txt_in\.c_embedder\.out_layer", "txt_in.c_embedder.linear_2"),
    ],
}  # fmt: skip
"""Names of ComfyUI's networks where they are not the makers', which diffusers' converters want."""


def of_denoiser(tensors: dict[str, Any], kind: str) -> dict[str, Any]:
    """The denoiser's tensors in a file, under the names that diffusers' converter of this class wants."""
    before = next((one for one in IN_CHECKPOINT if any(key.startswith(one) for key in tensors)), "")
    own = {key.removeprefix(before): one for key, one in tensors.items() if key.startswith(before)}
    if kind.startswith("UNet"):
        is_original = any(key.startswith("input_blocks.") for key in own)
        return {f"{IN_CHECKPOINT[0]}{key}": one for key, one in own.items()} if is_original else own
    rules = RENAMED.get(kind, [])
    if rules is not NORMS and not any("attn.qkv." in key for key in own):
        return own
    return {renamed(key, rules): one for key, one in own.items()}


def renamed(key: str, rules: list[tuple[str, str]]) -> str:
    """A key after every rule (a pattern, what stands there instead)."""
    for pattern, there in rules:
        key = re.sub(pattern, there, key)
    return key


REAL_WIDTH = 3072
"""The width that diffusers has written into its converters of FLUX.1, Chroma and HunyuanVideo."""


def sizes_of(kind: str, config: dict[str, Any]) -> dict[int, int]:
    """Numbers that diffusers has written into its converter of this class → those of the config."""
    if kind == "MochiTransformer3DModel":
        return {48: config["num_layers"]}
    if kind == "Lumina2Transformer2DModel":
        width = config["hidden_size"]
        return {2304: width, 768: width // config["num_attention_heads"] * config["num_kv_heads"]}
    heads, size = config.get("num_attention_heads"), config.get("attention_head_dim")
    return {REAL_WIDTH: heads * size} if isinstance(heads, int) and isinstance(size, int) else {}


@contextmanager
def at_width(kind: str, folder: Path) -> Iterator[None]:
    """Inside the block, the converter of this class of network splits layers at the sizes of the config."""
    from diffusers.loaders import single_file_model

    entry: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[kind]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    usual, sizes = entry["checkpoint_mapping_fn"], sizes_of(kind, config)
    if isinstance(usual, FunctionType) and any(real != own for real, own in sizes.items()):
        entry["checkpoint_mapping_fn"] = FunctionType(narrowed(usual.__code__, sizes), usual.__globals__)
    try:
        yield
    finally:
        entry["checkpoint_mapping_fn"] = usual


def narrowed(code: CodeType, sizes: dict[int, int]) -> CodeType:
    """The same code with other numbers for the real sizes, in functions inside it too."""
    constants = [narrowed(one, sizes) if isinstance(one, CodeType) else one for one in code.co_consts]
    known = [sizes.get(one, one) if type(one) is int else one for one in constants]
    return code.replace(co_consts=tuple(known))


def under_its_own_names(
    kind: Any, tensors: dict[str, Any], folder: Path, dtype: torch.dtype
) -> tuple[nn.Module | None, str]:
    """(the network filled with weights under diffusers' own names, or None; why not)."""
    network = kind.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    own = of_denoiser(tensors, kind.__name__)
    missing = sorted(network.state_dict().keys() - own.keys())
    if missing:
        return None, f"diffusers converts no other layout of it, and it has no {missing[0]}"
    try:
        network.load_state_dict(own, strict=False)
    except RuntimeError as problem:
        return None, " ".join(str(problem).split())[:200]
    return network.to(dtype).eval(), ""


def converted(
    kind: Any, tensors: dict[str, Any], folder: Path, name: str, dtype: torch.dtype
) -> tuple[nn.Module | None, str]:
    """(the network with the file's weights, or None; why not)."""
    try:
        network = kind.from_single_file(
            dict(tensors), config=str(folder), subfolder=name, torch_dtype=dtype, local_files_only=True
        )
    except KeyError as problem:
        return None, f"it has no {problem.args[0]}"
    except Exception as problem:  # converters fail in every way on a file that is of something else
        message = " ".join(str(problem).split())[:200]
        return None, f"its tensors are not those that diffusers converts into it ({message})"
    empty = [key for key, weight in network.named_parameters() if weight.is_meta]
    return (None, f"it has no {empty[0]}") if empty else (network.eval(), "")


def text_part(
    kind: str, name: str, tensors: dict[str, Any], folder: Path, dtype: torch.dtype
) -> nn.Module | None:
    """The text encoder with the file's weights; None where the file has none."""
    from diffusers import pipelines
    from diffusers.loaders.single_file import load_single_file_sub_model

    try:
        part: Any = load_single_file_sub_model(
            library_name="transformers",
            class_name=kind,
            name=name,
            checkpoint=dict(tensors),
            pipelines=pipelines,
            is_pipeline_module=False,
            cached_model_config_path=str(folder),
            torch_dtype=dtype,
            local_files_only=True,
        )
    except Exception:  # as above; the folder's own is taken then
        return None
    return None if any(weight.is_meta for weight in part.parameters()) else part
