"""A LoRA under diffusers', ComfyUI's or kohya's names, loaded back there and compared."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sfumato.errors import Failed, Refused
from sfumato.generation import Pipeline, load
from sfumato.models.files import save_sealed
from sfumato.models.load_network import quiet
from sfumato.models.lora import adapter, key_conversion, lora_file
from sfumato.models.lora.adapter import AdapterPlan
from sfumato.models.lora.experts import EXPERT_HEADER, SECOND
from sfumato.models.lora.layer_names import layer_names_of
from sfumato.models.pretrained.train_text_encoders import TextPlan
from sfumato.run_folder import atomic_folder
from sfumato.workflow.export import text_encoders
from sfumato.workflow.export.compare import (
    Exported,
    answers_and_conditions,
    check_agreement,
    example_inputs,
    largest_difference,
    with_same_prompts,
)

LORA_FILE, DENOISER_FILE = "pytorch_lora_weights.safetensors", "diffusion_model.safetensors"


# ---------------------------------------------------------------- adapters


def export_lora(
    model: Pipeline,
    plan: AdapterPlan | None,
    text: TextPlan,
    base: Path,
    to: str,
    out: Path,
    info: dict[str, str],
    dtype: torch.dtype,
) -> Exported:
    """A run's LoRA as a file, of its text encoders too; new words as files beside it."""
    if plan is not None and plan.kind != "lora" and to == "diffusers":
        raise Refused(
            f"diffusers reads LoRA only, and this run trained a {plan.kind}. Export it --to comfyui or kohya "
            "(LyCORIS), or save it within its base: sfumato.load(RUN).save(FOLDER)."
        )
    words = " ".join(word for word, _ in text.tokens)
    x, condition = example_inputs(model, words)
    ours = answers_and_conditions(model, x, condition)
    tensors = (
        {"": text_encoders.state_of(adapter.peft_target(model.denoiser), dtype)} if plan is not None else {}
    )
    tensors |= {
        name: text_encoders.state_of(one, dtype)
        for name, one in text_encoders.adapted_encoders(model).items()
    }
    layers, idle = text_encoders.named_layers(tensors)
    effect = effect_of(model, text, words, ours)
    if effect == 0 or (layers and len(idle) == len(layers)):
        raise Failed(
            f"The adapter changes nothing: {len(idle)} of its {len(layers)} layers are "
            f"still zero ({lora_file.said(idle)}). Train it further, with a larger learning rate."
        )
    with atomic_folder(out) as beside:
        if layers:
            write_lora(model, plan or text.lora, tensors, to, beside, info)
        files = sorted(beside.glob("*.safetensors"))
        written = text_encoders.write_words(model, to, beside, info)
        fresh = with_same_prompts(load(base), model)
        loader = "diffusers"
        if layers:
            matched = set(layers) - (set() if to == "diffusers" else set(idle))
            loader = load_back(fresh, files, to, matched)
        for file, word in written.items():
            text_encoders.read_words(fresh.origin, file, word)
        check_weights(model, fresh, loader, dtype)
        theirs = answers_and_conditions(fresh, x, example_inputs(fresh, words)[1])
        difference = check_agreement(ours, theirs, loader) if written else largest_difference(ours, theirs)
        names = sorted(file.name for file in beside.iterdir())
    return Exported(tuple(out / name for name in names), difference, effect, info)


@torch.no_grad()
def check_weights(model: Pipeline, fresh: Pipeline, where: str, dtype: torch.dtype) -> None:
    """Compare every adapted layer's weight, the adapter merged, with what was loaded back.

    Weights decide, since the answers of an adapter that is strong for its base may be far apart for their
    rounding alone.

    Raises:
        Failed: a weight is another one.
    """
    pairs = {"": (adapter.peft_target(model.denoiser), adapter.peft_target(fresh.denoiser))}
    theirs = text_encoders.encoders(fresh)
    pairs |= {home: (one, theirs[home]) for home, one in text_encoders.adapted_encoders(model).items()}
    limit = 2e-5 + 4 * torch.finfo(dtype).eps
    for home, (network, loaded) in pairs.items():
        for name, layer in adapter.adapted(network):
            mine, other = merged_weight(layer), merged_weight(loaded.get_submodule(name))
            apart = float((mine - other).abs().max() / mine.abs().max().clamp(min=1e-8))
            if not apart < limit:
                raise Failed(
                    f"What was written makes other weights once {where} has loaded it: "
                    f"{f'{home}.{name}'.removeprefix('.')} is {apart:.1e} of its largest apart, more than "
                    f"{limit:.0e}. Nothing was kept."
                )


def merged_weight(layer: Any) -> Tensor:
    """A layer's weight with its adapters added; the layer stays as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(layer, BaseTunerLayer):
        one: Any = copy.deepcopy(layer)
        one.merge()
        layer = one.get_base_layer()
    return cast(Tensor, layer.weight).detach().float()


def effect_of(model: Pipeline, text: TextPlan, words: str, ours: list[Tensor]) -> float:
    """How far the answers are from those without the adapters; of new words alone, from where they began."""
    networks = [adapter.peft_target(model.denoiser), *text_encoders.adapted_encoders(model).values()]
    networks = [one for one in networks if adapter.names(one)]
    if not networks:
        return text_encoders.words_learned(model, text)
    for one in networks:
        adapter.scale(one, 0.0)
    x, condition = example_inputs(model, words)
    effect = largest_difference(answers_and_conditions(model, x, condition), ours)
    for one in networks:
        adapter.scale(one, 1.0)
    return effect


def write_lora(
    model: Pipeline,
    plan: Any,
    tensors: Mapping[str, dict[str, Tensor]],
    to: str,
    folder: Path,
    info: dict[str, str],
) -> None:
    """The adapter's file under the target's names; a peft folder where diffusers has no loader.

    For diffusers the scale is part of the weights, and alpha is the rank: who reads the same keys without
    their metadata acts alike.
    """
    alpha = plan.alpha or plan.rank
    scale = alpha / plan.rank**0.5 if plan.rslora else alpha / plan.rank
    if plan.dora and to != "diffusers":
        info = {**info, **dora_metadata(to)}
    text = text_encoders.lora_of(model, tensors, to, scale)
    if "" not in tensors:
        save_sealed(text.tensors, folder / LORA_FILE, {**info, **text.metadata})
        return
    for second, part, network in experts(model, tensors[""]):
        if hasattr(adapter.peft_target(model.denoiser), "noisy"):
            info = {**info, EXPERT_HEADER: "low" if second else "high"}
        config = network.peft_config[adapter.NAME]
        if to != "diffusers":
            names = layer_names_of(model.denoiser.family)
            keyed = key_conversion.to_target_keys(part, scale, names, to, network)
            keyed |= {} if second else text.tensors
            save_sealed(keyed, folder / f"{info['modelspec.title']}{second}.safetensors", info)
        elif hasattr(model.origin, "load_lora_weights"):
            prefix = model.denoiser.family.network  # type: ignore[attr-defined]
            described = {
                **config.to_dict(),
                "target_modules": sorted(key_conversion.trained(part)),
                "lora_alpha": plan.rank,
                "use_rslora": False,
            }
            packed = {f"{prefix}.{name}": value for name, value in described.items()} | text.config
            more = {lora_file.METADATA: json.dumps(packed, default=as_json)}
            keyed = {f"{prefix}.{name}": one for name, one in text_encoders.with_scale(part, scale).items()}
            keyed |= text.tensors
            save_sealed(keyed, folder / LORA_FILE.replace(".", f"{second}."), {**info, **more})
        else:
            config.save_pretrained(folder)
            keyed = {f"base_model.model.{name}": tensor for name, tensor in part.items()}
            save_sealed(keyed, folder / "adapter_model.safetensors", info)


def dora_metadata(to: str) -> dict[str, str]:
    """What a reader of a DoRA must know: kohya's own networks have none, the trainer's LyCORIS module has."""
    if to == "comfyui":
        return {lora_file.DORA_SCALE: lora_file.OF_BASE}
    return {
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": json.dumps({"algo": "locon", "dora_wd": True, "wd_on_output": True}),
    }


def as_json(value: Any) -> Any:
    """A peft setting that JSON does not know."""
    return sorted(value) if isinstance(value, set) else str(value)


def experts(model: Pipeline, tensors: dict[str, Tensor]) -> list[tuple[str, dict[str, Tensor], Any]]:
    """(ending of the file, its tensors, its network): one, or two where two experts were trained."""
    network: Any = adapter.peft_target(model.denoiser)
    if not hasattr(network, "noisy"):
        return [("", tensors, network)]
    found = []
    for second, name in (("", "noisy"), ("_2", "clean")):
        part = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        one = getattr(network, name)
        one.peft_config = network.peft_config
        found += [(second, part, one)] if part else []
    return found


def load_back(fresh: Pipeline, files: Sequence[Path], to: str, layers: set[str]) -> str:
    """Load what was written into a fresh base, as the target does; returns who loaded it.

    Raises:
        Failed: keys that found no layer, or layers that found no key.
    """
    pipe, network = fresh.origin, adapter.peft_target(fresh.denoiser)
    if to != "diffusers":
        found = {name for file in files for name in read_back(fresh, file)}
    elif hasattr(pipe, "load_lora_weights"):
        for file in files:
            second = {"load_into_transformer_2": True} if file.stem.endswith("_2") else {}
            with quiet("diffusers"):  # it would tell of every text encoder that has no part in the file
                pipe.load_lora_weights(file, **second)
        found = {name for name, _ in adapter.adapted(network)}
        found |= {
            f"{home}.{name}"
            for home, one in text_encoders.encoders(fresh).items()
            for name, _ in adapter.adapted(one)
        }
    else:
        import peft

        held: Any = peft.PeftModel.from_pretrained(network, str(files[0].parent))
        found = {name for name, _ in adapter.adapted(held.base_model.model)}
    if missing := sorted(layers ^ found):
        raise Failed(
            f"{len(missing)} layers were not matched when {to} names were read: {lora_file.said(missing)}."
        )
    return "diffusers" if to == "diffusers" else f"a reader of {to}'s names"


def read_back(fresh: Pipeline, file: Path) -> list[str]:
    """The layers that a file changes, once merged; those of a second expert under our name for it."""
    names = key_conversion.merge(fresh, file)
    if not hasattr(adapter.peft_target(fresh.denoiser), "clean"):
        return names
    return [
        f"clean.{name.removeprefix(SECOND)}" if name.startswith(SECOND) else f"noisy.{name}" for name in names
    ]
