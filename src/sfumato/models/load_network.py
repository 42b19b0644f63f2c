"""A network from a folder of diffusers or transformers: every weight from the file, every key of it used.

Both libraries fill a weight that no file gives with random numbers, and drop a key that no layer has; here
either is an error by name. What a class itself says may be absent (tied weights, buffers that are computed)
and parts of a file that its class does not have (a language model's head) are excused.
"""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.models.scaled_weights import apply_scales, is_beside_scale, network_name, weight_of
from sfumato.models.size_limits import WeightCounts, check_network_size, read_config

BUFFERS = re.compile(
    r"(^|\.)(position_ids|inv_freq|num_batches_tracked|masked_bias|relative_position_index)$"
)
"""Keys of older writers that hold no weight: the network computes them."""
WEIGHTS = ("model", "diffusion_pytorch_model")
_FITTING: dict[Any, None] = {}
MOST_KNOWN = 256
"""Configs that this process remembers to be no larger than their weights."""


def load_network(
    kind: Any,
    folder: Path | str,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    unused: Sequence[str] = (),
) -> Any:
    """The network of a class of diffusers or transformers (or of an auto class) in a folder, offline.

    Args:
        folder: its word goes into the network's config, and so into fingerprints, as it is given.
        dtype: of its weights; None leaves it to the library. variant: "fp16" of model.fp16.safetensors.
        unused: parts whose answer nobody reads; where the file has none of it their weights are 0.
    Raises:
        Refused: it does not load, lacks a weight, or holds a key that nothing uses; the key is named.
    """
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    if not hasattr(kind, "load_config"):
        options |= {"trust_remote_code": False, "dtype": dtype} if dtype else {"trust_remote_code": False}
    elif dtype:
        options["torch_dtype"] = dtype
    if variant is not None:
        options["variant"] = variant
    check_size(kind, Path(folder), variant)
    try:
        with warnings.catch_warnings(), quiet("diffusers", "transformers"):
            warnings.simplefilter("ignore", FutureWarning)  # newer diffusers call torch_dtype dtype
            network, told = kind.from_pretrained(str(folder), output_loading_info=True, **options)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError, ImportError) as problem:
        said = " ".join(str(problem).split())[:400]
        raise Refused(f"{folder} does not load as a {kind.__name__}: {said}") from problem
    missing = {str(key) for key in told.get("missing_keys", ())}
    for name, weight in network.named_parameters():
        if name in missing and name.startswith(tuple(f"{part}." for part in unused)):
            missing.discard(name)
            weight.data.zero_()
    check_loaded(network, {**told, "missing_keys": missing}, Path(folder), variant)
    return network


def check_size(
    kind: Any, folder: Path, variant: str | None = None, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Raises Refused where the config in a folder asks for a network larger than the weights it has.

    Args:
        kind: its class; variant: as of `load_network`. tensors: of a single file, counted as well.
    """
    config = read_config(folder)
    counts = WeightCounts.of_files(weight_files(folder, variant) if folder.is_dir() else ())
    counts += WeightCounts.of_tensors(tensors or {})
    if not config or not counts.tensors:
        return  # what is missing is said by who reads it

    def build() -> None:
        if hasattr(kind, "load_config"):
            kind.from_config(config)
            return
        from transformers import AutoConfig

        whose: Any = getattr(kind, "config_class", None) or AutoConfig
        said = whose.from_pretrained(str(folder), local_files_only=True)
        kind._from_config(said) if hasattr(kind, "_from_config") else kind.from_config(said)

    seen = kind, json.dumps(config, sort_keys=True), counts
    if seen in _FITTING:
        return
    with quiet("diffusers", "transformers"):
        check_network_size(build, counts, config, folder / "config.json")
    _FITTING[seen] = None
    if len(_FITTING) > MOST_KNOWN:
        _FITTING.pop(next(iter(_FITTING)))


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Inside the block these libraries (diffusers, transformers) keep to themselves what is handled here."""
    logs = [import_module(f"{name}.utils.logging") for name in libraries]
    kept = [(one, one.get_verbosity()) for one in logs]
    for one in logs:
        one.set_verbosity_error()
    try:
        yield
    finally:
        for one, level in kept:
            one.set_verbosity(level)


def check_loaded(network: nn.Module, told: Any, folder: Path, variant: str | None = None) -> None:
    """Apply the scales of narrow weights; raises Refused where a weight is missing or a key is left over."""
    unexpected = {str(key) for key in told.get("unexpected_keys", ())}
    if any(weight_of(key) or is_beside_scale(key) for key in unexpected):
        scales = read_scales(weight_files(folder, variant))
        applied = apply_scales(network, scales, folder)
        unexpected = {
            key
            for key in unexpected
            if not is_beside_scale(key) and network_name(weight_of(key), applied) not in applied
        }
    check_missing(network, told.get("missing_keys", ()), folder)
    if wrong := told.get("mismatched_keys"):
        name = wrong[0] if isinstance(wrong, list) else next(iter(wrong))
        raise Refused(
            f"{folder}: {name[0] if isinstance(name, tuple) else name} has another shape than config.json "
            "says. Download the model again, whole."
        )
    check_left_over(left_over(network, unexpected), folder)


def check_missing(network: nn.Module, missing: Iterable[str], source: Any) -> None:
    """Raises Refused where a weight was given by no file; tied ones and those a class excuses are not."""
    excused = [re.compile(one) for one in getattr(network, "_keys_to_ignore_on_load_missing", None) or ()]
    tied = set(getattr(network, "all_tied_weights_keys", None) or ())
    tied |= set(getattr(network, "_tied_weights_keys", None) or ())
    known = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in network.named_buffers()}
    names = sorted(
        key
        for key in map(str, missing)
        if key in known
        and key not in tied
        and not BUFFERS.search(key)
        and not any(one.search(key) for one in excused)
    )
    names = sorted({*names, *(name for name, weight in network.named_parameters() if weight.is_meta)})
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise Refused(
            f"{source} has no {names[0]}{more}, which its {type(network).__name__} needs: the weight would "
            "be random. Download the model again, whole."
        )


def left_over(network: nn.Module, unexpected: Iterable[str]) -> list[str]:
    """Keys that a layer of the network should have used: not buffers, nor parts that its class lacks."""
    prefixes = {str(getattr(network, "base_model_prefix", "")), "model", "language_model"}
    prefixes |= {"text_model"} if "Text" in type(network).__name__ else set()
    parts = {name for name, _ in network.named_children()} | {name for name, _ in network.named_parameters()}
    is_diffusers = hasattr(network, "load_config")
    return sorted(
        key
        for key in unexpected
        if not BUFFERS.search(key) and (is_diffusers or weight_of(key) or first_part(key, prefixes) in parts)
    )


def first_part(key: str, prefixes: Iterable[str]) -> str:
    """The part of a network that a key belongs to, prefixes of whole models apart."""
    known, words = set(prefixes), key.split(".")
    while len(words) > 1 and words[0] in known:
        words = words[1:]
    return words[0]


def check_left_over(keys: Iterable[str], source: Any) -> None:
    """Raises Refused where keys of a file were used by nothing."""
    names = sorted(keys)
    if not names:
        return
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    raise Refused(
        f"{source} holds {names[0]}{more}, which no layer of the network has: it would be ignored, and the "
        "network would be another one. Give the config.json the weights were made with; or, if they are of "
        "no use, write the file without them."
    )


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files of weights that a library reads in a folder: one, or the shards that an index names."""
    of = f".{variant}" if variant else ""
    for stem in WEIGHTS:
        whole = folder / f"{stem}{of}.safetensors"
        for index in (
            folder / f"{stem}.safetensors.index{of}.json",
            folder / f"{stem}{of}.safetensors.index.json",
        ):
            if not whole.is_file() and index.is_file():
                try:
                    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                except (OSError, ValueError, KeyError, AttributeError) as problem:
                    raise Refused(f"{index} is damaged ({problem}). Download the model again.") from problem
                return sorted({folder / Path(str(name)).name for name in named})
        if whole.is_file():
            return [whole]
    return sorted(folder.glob("*.safetensors"))


def read_scales(files: Iterable[Path]) -> dict[str, Tensor]:
    """The scales of narrow weights in files, and what stands beside them."""
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    if weight_of(key) or key.endswith(".comfy_quant"):
                        found[key] = opened.get_tensor(key)
        except (OSError, SafetensorError) as problem:
            raise Refused(f"{file} is damaged ({problem}). Download the model again.") from problem
    return found
