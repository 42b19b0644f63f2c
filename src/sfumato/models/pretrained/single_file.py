"""A model in one file of its makers' layout (.safetensors): diffusers' converters, offline.

The file holds weights alone, often without text encoders or autoencoder. A folder in diffusers' layout says
what the networks look like (its config.json files), and lends what the file lacks.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.models.load_network import check_size
from sfumato.models.scaled_weights import dequantize

WEIGHTS = (".safetensors", ".safetensors.index.json")


def components(
    file: Path,
    folder: Path,
    index: dict[str, Any],
    denoiser: str,
    dtype: torch.dtype,
    codec_dtype: torch.dtype | None = None,
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
    tensors = dequantize(tensors, dtype, file)
    found: dict[str, Any] = {}
    used: set[str] = set()
    reasons: dict[str, str] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or not entry[0]:
            continue
        kind = getattr(diffusers, entry[1], None) if entry[0] == "diffusers" else None
        reason = NO_PART
        number = codec_dtype or dtype if name == "vae" else dtype
        is_network = isinstance(kind, type) and issubclass(kind, nn.Module)
        if is_network:
            check_size(kind, folder / name, tensors=tensors)
        if is_network and (converter := convertible(kind)):
            with at_width(converter, folder / name):
                held, taken = of_denoiser(tensors, entry[1]) if name == denoiser else tensors, set[str]()
                part, reason = converted(kind, converter, held, folder, name, number, taken)
                used |= keys_of(tensors, [held[key] for key in taken])
        elif isinstance(kind, type) and name == denoiser:
            part, reason = under_its_own_names(kind, tensors, folder / name, dtype, used)
        elif entry[0] == "transformers" and name.startswith("text_encoder"):
            part, reason = text_part(entry[1], name, tensors, folder, dtype, used)
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
            why = "" if reason == NO_PART else f" ({reason})"
            raise Refused(
                f'{file} has no "{name}" ({entry[1]}){why}, and {folder / name} holds no weights either. '
                "Put the "
                f"weights of the model's {name} there (*.safetensors)."
            )
        else:
            reasons[name] = reason
    check_used(file, tensors, used, reasons)
    return found


NO_PART = "the file has no such part"
WITHOUT_USE = re.compile(
    r"^model_ema\.|^(first_stage_model|vae)\.loss\."
    r"|(^|\.)(position_ids|logit_scale|num_batches_tracked|inv_freq)$"
    r"|^((\w*_)?alphas_cumprod(_prev)?|betas|posterior_\w+|lvlb_weights|logvar|scale_factor)$"
    r"|^denoiser\.(log_)?sigmas$|^(v_pred|ztsnr|edm_mean|edm_std|iteration|global_step)$"
)
"""Keys of makers' files that are no weight of what is drawn with: their averages, tables, losses."""
TEXT_WITHOUT_USE = re.compile(r"(^|\.)(position_ids|logit_scale|text_projection(\.weight)?)$")
TEXT_PARTS = ("cond_stage_model.", "conditioner.embedders.", "text_encoders.")


def check_used(file: Path, tensors: Mapping[str, Tensor], used: set[str], reasons: Mapping[str, str]) -> None:
    """Raises Refused where the file holds a key that no network took."""
    left = sorted(key for key in tensors if key not in used and not WITHOUT_USE.search(key))
    if not left:
        return
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    why = next((f" ({name}: {said})" for name, said in reasons.items() if said != NO_PART), "")
    raise Refused(
        f"{file} holds {left[0]}{more}, which no network of the config's folder uses{why}: it would be "
        "ignored. Give as config the folder of the model that the file was made from; or, if they are of no "
        "use, write the file without them."
    )


EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
"""Keys by which files say that they were trained under EDM (Playground 2.5, CosXL)."""


def said_of_theory(file: Path) -> dict[str, Any]:
    """What a file says of the theory it was trained under, as settings of a diffusers scheduler.

    Markers are keys without numbers, `v_pred` and `ztsnr` (zero terminal SNR), or entries of the header:
    `modelspec.prediction_type`, and sd-scripts' `ss_v_parameterization` and `ss_zero_terminal_snr`. A table
    that ends at pure noise is sampled from there: timesteps are spaced from the end.

    Raises:
        Refused: a theory that is not read here.
    """
    try:
        with safe_open(file, "pt") as opened:
            header = dict(opened.metadata() or {})
            keys = {key.rpartition("model.")[2] for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as problem:
        raise Refused(f"{file} is damaged ({problem}). Copy it again.") from problem
    if edm := sorted(keys & set(EDM)):
        raise Refused(
            f"{file} says ({edm[0]}) that it was trained under EDM, which is not read from single files. "
            "Give a model that was trained on a table of betas."
        )
    found: dict[str, Any] = {}
    told = header.get("modelspec.prediction_type", "").lower()
    if "v_pred" in keys or told in ("v", "v_prediction") or header.get("ss_v_parameterization") == "True":
        found["prediction_type"] = "v_prediction"
    elif told == "epsilon":
        found["prediction_type"] = "epsilon"
    elif told:
        raise Refused(
            f'{file}: modelspec.prediction_type is "{told[:40]}"; epsilon and v are read. Correct it in '
            "the file's header."
        )
    if "ztsnr" in keys or header.get("ss_zero_terminal_snr") == "True":
        found |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
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


def keys_of(tensors: Mapping[str, Tensor], some: Iterable[Tensor]) -> set[str]:
    """The keys under which a file holds these tensors."""
    held = {id(one) for one in some}
    return {key for key, one in tensors.items() if id(one) in held}


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


class Traced(Tensor):
    """A tensor that knows of which keys of the file it was made, through whatever a converter does to it."""

    keys: frozenset[str] = frozenset()

    @classmethod
    def of(cls, key: str, tensor: Tensor) -> "Traced":
        """The same numbers, and the key they have in the file."""
        one = tensor.as_subclass(cls)
        one.keys = frozenset((key,))
        return one

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What is made of traced tensors is made of all their keys."""
        out = super().__torch_function__(func, types, args, kwargs or {})
        keys = frozenset[str]().union(*(one.keys for one in flattened((args, kwargs))))
        for one in flattened(out):
            one.keys = one.keys | keys
        return out


def flattened(value: Any) -> Iterator[Traced]:
    """The traced tensors inside lists, tuples and dicts."""
    if isinstance(value, Traced):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from flattened(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from flattened(one)


@contextmanager
def traced(kind: str, made: dict[str, frozenset[str]]) -> Iterator[None]:
    """Inside the block the converter of this class writes into `made` of which keys each weight was made."""
    from diffusers.loaders import single_file_model

    entry: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[kind]
    usual = entry["checkpoint_mapping_fn"]

    def follow(checkpoint: Mapping[str, Tensor], **known: Any) -> dict[str, Tensor]:
        marked = {key: Traced.of(key, one) for key, one in checkpoint.items()}
        out = usual(checkpoint=marked, **known)
        made.update({key: getattr(one, "keys", frozenset()) for key, one in out.items()})
        return {key: one.as_subclass(Tensor) for key, one in out.items()}

    entry["checkpoint_mapping_fn"] = follow
    try:
        yield
    finally:
        entry["checkpoint_mapping_fn"] = usual


def under_its_own_names(
    kind: Any, tensors: dict[str, Any], folder: Path, dtype: torch.dtype, used: set[str]
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
    used |= keys_of(tensors, [own[key] for key in network.state_dict()])
    return network.to(dtype).eval(), ""


def converted(
    kind: Any,
    converter: str,
    tensors: dict[str, Any],
    folder: Path,
    name: str,
    dtype: torch.dtype,
    used: set[str],
) -> tuple[nn.Module | None, str]:
    """(the network with the file's weights, or None; why not); adds the keys it was made of to `used`."""
    made: dict[str, frozenset[str]] = {}
    try:
        with traced(converter, made):
            network = kind.from_single_file(
                dict(tensors), config=str(folder), subfolder=name, torch_dtype=dtype, local_files_only=True
            )
    except KeyError as problem:
        return None, f"it has no {problem.args[0]}"
    except Exception as problem:  # converters fail in every way on a file that is of something else
        message = " ".join(str(problem).split())[:200]
        return None, f"its tensors are not those that diffusers converts into it ({message})"
    empty = [key for key, weight in network.named_parameters() if weight.is_meta]
    if empty:
        return None, f"it has no {empty[0]}"
    known = network.state_dict()
    made = made or {key: frozenset((key,)) for key in tensors}
    used |= frozenset[str]().union(*(keys for key, keys in made.items() if key in known))
    return network.eval(), ""


def text_part(
    kind: str, name: str, tensors: dict[str, Any], folder: Path, dtype: torch.dtype, used: set[str]
) -> tuple[nn.Module | None, str]:
    """(the text encoder with the file's weights, or None where the file has none; why not)."""
    from diffusers import pipelines
    from diffusers.loaders.single_file import load_single_file_sub_model

    asked, given = Asked(tensors), set[str]()
    try:
        with watched(given):
            part: Any = load_single_file_sub_model(
                library_name="transformers",
                class_name=kind,
                name=name,
                checkpoint=asked,
                pipelines=pipelines,
                is_pipeline_module=False,
                cached_model_config_path=str(folder),
                torch_dtype=dtype,
                local_files_only=True,
            )
    except Exception as problem:  # as above; the folder's own is taken then
        return None, " ".join(str(problem).split())[:200] if asked.taken else NO_PART
    if not asked.taken:  # the folder's own, which is opened with its index
        return None, NO_PART
    if empty := [key for key, weight in part.named_parameters() if weight.is_meta]:
        return None, f"it has no {empty[0]}"
    known = {re.sub(r"^text_model\.", "", key) for key in part.state_dict()}
    names = (re.sub(r"^text_model\.", "", key) for key in sorted(given))
    if extra := [one for one in names if one not in known and not TEXT_WITHOUT_USE.search(one)]:
        return None, f"no layer of it is called {extra[0]}"
    homes = {text_home(key) for key in asked.taken}
    used |= {key for key in tensors if text_home(key) in homes}
    return part, ""


@contextmanager
def watched(given: set[str]) -> Iterator[None]:
    """Inside the block the converter of text encoders writes down which weights it hands to the network."""
    from diffusers.loaders import single_file_utils

    module: Any = single_file_utils
    usual = module.load_model_dict_into_meta

    def fill(network: Any, state_dict: Mapping[str, Any], *known: Any, **named: Any) -> Any:
        given.update(state_dict)
        return usual(network, state_dict, *known, **named)

    module.load_model_dict_into_meta = fill
    try:
        yield
    finally:
        module.load_model_dict_into_meta = usual


class Asked(dict[str, Any]):
    """The file's tensors; `taken` are the keys of text encoders that a converter took, not only looked at."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        super().__init__(tensors)
        self.taken: set[str] = set()

    def note(self, key: str) -> None:
        """A key of a text encoder was asked for."""
        if text_home(key):
            self.taken.add(key)

    def get(self, key: str, default: Any = None) -> Any:  # type: ignore[override]
        """As of any dict."""
        self.note(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        """As of any dict."""
        self.note(key)
        return super().pop(key, *default)


def text_home(key: str) -> str:
    """Where a file keeps the text encoder that a key belongs to; empty for keys of other networks."""
    words = key.split(".")
    if not key.startswith(TEXT_PARTS):
        return ""
    return ".".join(words[: 3 if key.startswith("conditioner.") else 2 if key.startswith("text_enc") else 1])
