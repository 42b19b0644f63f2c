"""One stage on disk: a folder of stage.json (its kind and config) and weights.safetensors."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sfumato import user_code
from sfumato.errors import Failed, Refused, explain_malformed, nearest
from sfumato.models.files import read_json, read_tensors
from sfumato.models.interface import KINDS, Denoiser, Stage
from sfumato.models.size_limits import WeightCounts, check_network_size

Kind = TypeVar("Kind", bound=Stage)


def load_user_stage(word: str, kind: type[Kind], **arguments: Any) -> Kind:
    """The stage `file.py:name` makes when called with the arguments it takes; an object is that stage itself.

    Of a denoiser that is an object a copy is taken, because it is trained.

    Raises:
        Refused: it makes no such stage, or cannot be called so.
    """
    made = user_code.load_user_object(word)
    if callable(made) and not isinstance(made, nn.Module):
        if missing := sorted(getattr(made, "__abstractmethods__", ())):
            raise Refused(f"{word} lacks {', '.join(f'{name}()' for name in missing)}. {contract(kind)}")
        try:
            stage = made(**arguments)
        except (Refused, Failed, torch.OutOfMemoryError):
            raise
        except Exception as problem:
            raise Refused(
                f"{user_code.describe_error(word, problem)}. A {kind.__name__} is made by calling it with "
                f"{', '.join(arguments) or 'nothing'} (**rest takes what it does not need). {contract(kind)}"
            ) from problem
    else:
        stage = copy.deepcopy(made) if isinstance(made, Denoiser) else made
    if not isinstance(stage, kind):
        what = f"the class {made.__name__}" if isinstance(made, type) else f"a {type(stage).__name__}"
        raise Refused(f"{word} gives {what}, but here a {kind.__name__} is needed. {contract(kind)}")
    stage.own_name = "" if is_ours(type(stage)) else user_code.named_class(word)
    return stage


CONTRACTS = {
    "Denoiser": "config() gives the plain values its class is made with; forward(x, clock, condition) "
    "answers x [B, C, …] with its own shape, clock is [B] within clock_range, and condition a mapping, "
    'condition["tokens"] [B, L, D], condition["mask"] [B, L], condition["pooled"] [B, P]',
    "Codec": "stride and latent_channels are numbers; config() gives the plain values its class is made "
    "with; encode(pixels, noise=None) makes [B, 3, H, W] in [-1, 1] to latents [B, C, H/stride, W/stride], "
    "decode(latents) the reverse",
    "Conditioner": "width (and pooled_width, where it is another) say how wide its tensors are; config() "
    "gives the plain values its class is made with; forward(prompt, **options) makes a list of texts to a "
    "Condition, encode_empty(count) is what says nothing",
}
"""What one's own stages have to be."""


def contract(kind: type[Stage]) -> str:
    """A sentence that says what a stage is and where its base class comes from."""
    name = kind.__name__
    if name not in CONTRACTS:
        return ""
    return (
        f"A {name} is a class of `from sfumato.models import {name}`: {CONTRACTS[name]} (docs/own-code.md)."
    )


def is_ours(kind: type) -> bool:
    """Whether a class comes with sfumato."""
    return kind.__module__.split(".")[0] == __name__.split(".")[0]


def save_stage(stage: Stage, folder: Path, text_by_name: bool = False) -> None:
    """Write one stage into a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {"kind": stage.kind, "config": dict(stage.config())}
    if stage.own_name:
        described["own"] = stage.own_name
        described["code"] = user_code.keep_code([stage.own_name], folder)
    described["config"] |= stage.write_weights(folder, text_by_name)
    (folder / "stage.json").write_text(json.dumps(described, indent=1), encoding="utf-8")


def load_stage(folder: Path) -> Stage:
    """The stage in a folder that `save_stage` wrote."""
    file = folder / "stage.json"
    with explain_malformed(file, "Copy the folder again, or save the model again."):
        stage = _described_stage(folder, read_json(file))
    weights = folder / "weights.safetensors"
    if weights.exists():
        fill(stage, read_tensors(weights), weights)
    return stage.eval()


def _described_stage(folder: Path, described: Mapping[str, Any]) -> Stage:
    """The stage that a stage.json describes, its weights not yet filled in."""
    config = dict(described["config"])
    if described.get("own"):
        arguments = {} if described["kind"] == "text" else config
        word = user_code.locate_code(described["own"], folder, described.get("code"))
        stage = load_user_stage(word, Stage, **arguments)
    elif described["kind"] not in KINDS:
        raise Refused(
            f'{folder} holds a stage of kind "{described["kind"]}".{nearest(described["kind"], KINDS)}'
        )
    else:
        if config.get("source") == ".":
            config["source"] = str(folder)
        kind, source = KINDS[described["kind"]], folder / "stage.json"
        if "source" not in config:  # a text encoder of transformers is checked where it is loaded
            counts = WeightCounts.of_files([folder / "weights.safetensors"])
            check_network_size(lambda: kind(**config), counts, config, source)
        stage = kind(**config)
    return stage


def fill(stage: Stage, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Put weights into a stage; every name and shape must match.

    Raises:
        Refused: naming the first that do not.
    """
    try:
        stage.load_state_dict(dict(tensors))
    except RuntimeError as problem:
        lines = str(problem).splitlines()
        raise Refused(
            f"{source} does not fit a {stage.kind} of this config: {lines[-1].strip()}"
        ) from problem
