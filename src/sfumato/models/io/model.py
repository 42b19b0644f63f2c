"""A model on disk: one folder, a subfolder for each stage, safetensors and JSON, written all or nothing.

model.json                                   format, theory, what the model remembers
codec/ conditioner/ denoiser/                stage.json and weights.safetensors each

A run on a base that it does not change keeps base.json (and adapter.json) instead, see `reference`.
"""

import copy
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import save_file

from sfumato import hub, paths, user_code
from sfumato.errors import Refused, explain_malformed
from sfumato.models import hub_files
from sfumato.models.build import new_theory
from sfumato.models.control import ControlledDenoiser, add_control_modules
from sfumato.models.control.control_plan import FILE as CONTROL_PLANS
from sfumato.models.control.control_plan import load_weights as load_control_weights
from sfumato.models.control.control_plan import read_plans, write_plans
from sfumato.models.control.load import WEIGHTS as GUIDES
from sfumato.models.files import (
    PICKLES,
    must_be_safetensors,
    read_json,
    read_tensors,
    verify_checksums,
    write_checksums,
)
from sfumato.models.interface import Codec, Conditioner, Denoiser, Model
from sfumato.models.io import adapter_run, fitted_times
from sfumato.models.locate import chosen_weights, weights_of
from sfumato.models.lora import adapter, key_conversion
from sfumato.models.pretrained import train_text_encoders
from sfumato.models.pretrained.pipeline_folder import INDEX, find_model, load_pipeline, save_pipeline
from sfumato.models.pretrained.stages import PretrainedConditioner
from sfumato.models.stage_folder import fill, load_stage, save_stage
from sfumato.run_folder import atomic_folder

FORMAT = 1
AGAIN = "Copy the folder again, or save the model again."
NO_LOAD = "does not load as it stands"
VARIANTS = {torch.float16: "fp16", torch.bfloat16: "bf16"}
"""What the weights of a type are usually called where a repository has several."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save(model: Model, folder: Path | str, text_by_name: bool = False) -> None:
    """Write the model; an older one in this folder is replaced at once. Adapters become part of the weights.

    Args:
        text_by_name: the frozen text encoder is not copied, only where it came from.
    """
    controlled = model.denoiser if isinstance(model.denoiser, ControlledDenoiser) else None
    denoiser = plain(model.denoiser if controlled is None else controlled.base)
    with atomic_folder(Path(folder)) as beside:
        if controlled is not None:
            write_plans(beside, model)
            learned = {
                name: one.detach().cpu().contiguous() for name, one in controlled.trained_weights().items()
            }
            save_file(learned, beside / GUIDES)
        if model.origin is not None:
            with ExitStack() as apart:
                for one in [] if controlled is None else controlled.control_modules:
                    apart.enter_context(one.removed(denoiser))
                save_pipeline(model, beside, denoiser)
            keep_fitted(model, beside)
            write_checksums(beside)
            return
        parts = {"codec": model.codec, "conditioner": model.conditioner, "denoiser": denoiser}
        for role, stage in parts.items():
            save_stage(stage, beside / role, text_by_name)
        info = {name: value for name, value in model.info.items() if name != "guides"}
        described = {"format": FORMAT, "info": info}
        if code := user_code.keep_code(theory_words(info), beside):
            described["code"] = code
        (beside / "model.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
        keep_fitted(model, beside)
        write_checksums(beside)


def keep_fitted(model: Model, folder: Path) -> None:
    """The model's fitted sampling times go where its weights go."""
    if model.fitted_times is not None:
        fitted_times.write_times(folder, model.fitted_times)


def plain(denoiser: Denoiser) -> Denoiser:
    """The denoiser itself, or where it carries adapters a copy that has them in its weights."""
    if not adapter.names(adapter.peft_target(denoiser)):
        return denoiser
    merged = copy.deepcopy(denoiser)
    adapter.merge(adapter.peft_target(merged))
    return merged


def load(
    folder: Path | str,
    dtype: str | torch.dtype = "float32",
    device: str = "cpu",
    model_class: type[Model] = Model,
    config: Path | str | None = None,
    codec_dtype: torch.dtype | None = None,
) -> Any:
    """The model in a folder that `save` wrote, or of a run: its newest averaged weights, or those of the
    checkpoint that is named (`runs/apples/checkpoints/best`).

    A single .safetensors file in its makers' layout needs `config`: a diffusers folder that describes its
    networks and lends what it lacks; by default the folder beside it, named like it.

    Args:
        codec_dtype: of the codec's weights, where it is another than the other stages'.
    Raises:
        Refused: no such folder, or nothing in it that is known.
        Failed: a file is damaged.
    """
    variant = VARIANTS.get(DTYPES[dtype] if isinstance(dtype, str) else dtype, "")
    if (file := Path(folder).expanduser()).suffix in (".safetensors", *PICKLES) and not file.is_dir():
        number = DTYPES[dtype] if isinstance(dtype, str) else dtype
        return load_pipeline(described_by(file, config), number, model_class, file, codec_dtype).to(device)
    if config is not None:
        raise Refused(f"config = {config} is for a single .safetensors file; {folder} is none. Leave it out.")
    found = find_model(folder, variant)
    if found.is_file() and not Path(folder).expanduser().exists():
        return load_lora_repo(found, dtype, device, model_class)
    path, checkpoint = weights_of(found)
    number = DTYPES[dtype] if isinstance(dtype, str) else dtype
    insides = [path / "model" / name for name in ("model.json", INDEX, adapter_run.BASE)]
    is_run = any(file.is_file() for file in insides)
    home = path / "model" if is_run else path
    model = load_home(home, str(folder), number, model_class, codec_dtype)
    model.fitted_times = fitted_times.read_times(home) or model.fitted_times
    plans = read_plans(home)
    if plans:
        with explain_malformed(home / CONTROL_PLANS, AGAIN):
            controlled = add_control_modules(model, plans)
        place = chosen_weights(path, checkpoint) if is_run else home / GUIDES
        load_control_weights(controlled, read_tensors(place), place)
        controlled.eval()
    elif is_run:
        plan = adapter_run.read_plan(home)
        weights = chosen_weights(path, checkpoint)
        tensors, text = read_tensors(weights), train_text_encoders.read_plan(home)
        if text is not None:
            with explain_malformed(home / train_text_encoders.FILE, AGAIN):
                taught = train_text_encoders.attach_text_training(model, text)
            tensors = train_text_encoders.load_text_weights(taught, tensors)
        if plan is not None:
            with explain_malformed(home / adapter_run.ADAPTER, AGAIN):
                adapter_run.attach(model.denoiser, plan)
            adapter_run.fill_adapter(model.denoiser, tensors, weights)
            model.denoiser.eval()
        elif text is None or not text.alone:
            fill(model.denoiser, tensors, weights)
    if model.origin is None:  # pipelines were read so, but for parts that they keep wide
        _narrow(model, number, codec_dtype)
    return model.to(device)


def _narrow(model: Model, number: torch.dtype, codec_dtype: torch.dtype | None) -> None:
    """Keep our own stages' weights in a dtype; beside a wide codec, only the network's matrices."""
    if codec_dtype is None:
        model.to(dtype=number)
        return
    for weight in model.denoiser.parameters():
        if weight.ndim >= 2:
            weight.data = weight.data.to(number)


def load_checkpoint(model: Model, folder: Path | str) -> None:
    """Put the weights of another checkpoint of its run (`runs/apples/checkpoints/step-000500`) into a model.

    Only what checkpoints hold is read and replaced: of a LoRA its adapter.

    Raises:
        Refused: no such checkpoint, or one of another run. Failed: it is damaged.
    """
    path, checkpoint = weights_of(hub_files.local(folder))
    home, weights = path / "model", chosen_weights(path, checkpoint)
    tensors = read_tensors(weights)
    if read_plans(home):
        load_control_weights(model.denoiser, tensors, weights)  # type: ignore[arg-type]  # as `load` made it
        return
    text = train_text_encoders.read_plan(home)
    if text is not None:
        tensors = train_text_encoders.load_text_weights(train_text_encoders.taught_encoders(model), tensors)
    if adapter_run.read_plan(home) is not None:
        adapter_run.fill_adapter(model.denoiser, tensors, weights)
    elif text is None or not text.alone:
        fill(model.denoiser, tensors, weights)


def home_of(folder: Path | str) -> Path | None:
    """Where the description of a model is: of a run the folder `model` in it; None of what is no folder."""
    path = weights_of(hub_files.local(folder))[0]
    homes = [path / "model", path]
    known = ("model.json", INDEX, adapter_run.BASE)
    return next((one for one in homes if any((one / name).is_file() for name in known)), None)


def conditioner_kind(folder: Path | str) -> str:
    """What guides the model in a folder, without loading it: a conditioner's kind, "none" where nothing does.

    Of a pretrained pipeline "text" where it has a tokenizer; "" where only loading it would tell.
    """
    home = home_of(folder)
    if home is None:
        return ""
    with explain_malformed(home, AGAIN):
        if (home / adapter_run.BASE).is_file():
            return conditioner_kind(adapter_run.read_base(home)[0])
        if (home / INDEX).is_file():
            parts = read_json(home / INDEX)
            return "text" if any(name.startswith("tokenizer") and parts[name][0] for name in parts) else ""
        described = read_json(home / "conditioner" / "stage.json")
        return "" if described.get("own") else str(described.get("kind", ""))


def has_adapter(folder: Path | str) -> bool | None:
    """Whether the run in a folder trained a LoRA of its denoiser or text encoders; None of what is no run."""
    home = home_of(folder)
    if home is None:
        return None
    text = train_text_encoders.read_plan(home)
    return (home / adapter_run.ADAPTER).is_file() or (text is not None and text.lora is not None)


def load_lora_repo(file: Path, dtype: str | torch.dtype, device: str, model_class: type[Model]) -> Any:
    """The model of the Hub that a LoRA of the Hub was trained on, with the LoRA in its weights.

    Raises:
        Refused: neither its header nor its card says which.
    """
    from huggingface_hub import metadata_load

    with explain_malformed(file, "Fetch it again."), safe_open(file, "pt") as opened:
        said = dict(opened.metadata() or {})
    base = f"{said['base']}@{said['base_commit']}" if {"base", "base_commit"} <= said.keys() else ""
    if not base and (card := file.with_name("README.md")).is_file():
        with explain_malformed(card, "Load its base, and add it with add_lora."):
            listed = (metadata_load(card) or {}).get("base_model")
            base = str(listed[0] if isinstance(listed, list) and len(listed) == 1 else listed or "")
    if hub.parse(base) is None:
        raise Refused(
            f"{file.name} is a LoRA alone, and says no model of the Hub that it belongs to. Load its base, "
            "and add it: model.add_lora(ID), or sfumato generate BASE --lora ID."
        )
    model = load(base, dtype, device, model_class)
    key_conversion.merge(model, file)
    return model


def described_by(file: Path, config: Path | str | None) -> Path:
    """The folder that describes a single file's networks.

    Raises:
        Refused: no such file, a pickle, or no such folder.
    """
    if not file.is_file():
        raise Refused(f"{file} does not exist. Give the folder or file of a model, or the folder of a run.")
    must_be_safetensors(file)
    folder = Path(config).expanduser() if config is not None else file.with_suffix("")
    if not (folder / INDEX).is_file():
        raise Refused(
            f"{file} holds weights alone, and nothing is fetched: give config= a folder in diffusers' layout "
            "that describes its networks (config.json files, tokenizers), or put it at "
            f"{file.with_suffix('')}."
        )
    return folder


def load_home(
    home: Path,
    given: str,
    number: torch.dtype,
    model_class: type[Model],
    codec_dtype: torch.dtype | None = None,
) -> Any:
    """The model in a folder of stages, a pipeline's folder, or one that says where its base is."""
    verify_checksums(home)
    if (home / adapter_run.BASE).is_file():
        adapter_run.verify_base(home)
        base, info = adapter_run.read_base(home)
        model = load(base, number, model_class=model_class, codec_dtype=codec_dtype)
        with explain_malformed(home / adapter_run.BASE, AGAIN):
            return restore_info(model, located(info, home))
    if (home / INDEX).is_file():
        with explain_malformed(home, "Look at its JSON files, or take it anew from where it came.", NO_LOAD):
            try:
                return load_pipeline(home, number, model_class, codec_dtype=codec_dtype)
            except StrictDataclassError as problem:  # a config's value of another type, in transformers
                raise ValueError(str(problem)) from problem
    if not (home / "model.json").is_file():
        raise Refused(explain_missing(home, given))
    with explain_malformed(home / "model.json", AGAIN):
        described = read_json(home / "model.json")
        if described.get("format", 0) > FORMAT:
            raise Refused(
                f"{home} was written by a newer sfumato (format {described['format']}). Update sfumato."
            )
        info = located(dict(described["info"]), home, described.get("code"))
        theory = new_theory(info.get("theory", ""))
    codec, conditioner = load_stage(home / "codec"), load_stage(home / "conditioner")
    denoiser = load_stage(home / "denoiser")
    for stage, kind in ((codec, Codec), (conditioner, Conditioner), (denoiser, Denoiser)):
        if not isinstance(stage, kind):
            name = kind.__name__.lower()
            raise Refused(f"{home / name} holds a {stage.kind}, not a {name}. Copy the folder again.")
    assert (
        isinstance(codec, Codec) and isinstance(conditioner, Conditioner) and isinstance(denoiser, Denoiser)
    )
    with explain_malformed(home / "model.json", AGAIN):
        return restore_info(model_class(theory, codec, conditioner, denoiser), info)


THEORIES = ("theory", "continued_as")
"""What of a model's info names a theory."""


def theory_words(info: Mapping[str, Any]) -> list[str]:
    """The theories that a model's info names."""
    return [info[name] for name in THEORIES if isinstance(info.get(name), str)]


def located(info: Mapping[str, Any], home: Path, code: Any = None) -> dict[str, Any]:
    """A model's info, its theories where they are: see `user_code.locate_code`."""
    return {
        name: user_code.locate_code(value, home, code)
        if name in THEORIES and isinstance(value, str)
        else value
        for name, value in info.items()
    }


RENAMED_INFO = {
    "text_options": "prompt_options",
    "presets": "merge_loras",
    "leaning": "guidance_options",
}
"""{what a model's info was called before 0.2: what it is called}."""


def restore_info(model: Any, info: Mapping[str, Any]) -> Any:
    """Let a model remember `info`: its sizes and steps, and the options its prompts are read with."""
    info = {RENAMED_INFO.get(name, name): value for name, value in info.items()}
    model.info = dict(info)
    if isinstance(model.conditioner, PretrainedConditioner):
        model.conditioner.usual = dict(info.get("prompt_options", {}))
    files = info.get("merge_loras", {})
    if isinstance(files, Mapping):
        merged = list(files.items())
    else:  # as format 1 wrote them
        merged = [key_conversion.weighted(one, "model.merge_loras") for one in files]
    for file, weight in merged:
        key_conversion.merge(model, file, weight)
    if info.get("continued_as"):
        model.retarget(new_theory(info["continued_as"]))
    return model


def explain_missing(path: Path, given: str) -> str:
    """Why nothing can be loaded from there, and what to do."""
    if not path.exists():
        hint = paths.similar(path, "model") or " Give the folder of a model or of a run."
        return f"{path} does not exist.{hint}"
    return paths.no_model(path)
