"""Files that load elsewhere: written beside their place, loaded back there, compared, and only then declared.

A LoRA goes out under diffusers', ComfyUI's or kohya's names; whole weights as a diffusers folder, or for
ComfyUI as the denoiser's file.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .. import __version__, stages
from ..errors import Failed, Refused
from ..generation import PaintingModel, load
from ..record import RunFolder, atomic_folder
from ..stages import adapters, exchange, reference, text_plan
from ..stages.adapters import AdapterPlan
from ..stages.guides import ControlledDenoiser
from ..stages.lora_names import names_of
from ..stages.pipeline import INDEX, quiet
from ..stages.pretrained import PretrainedConditioner
from ..stages.seal import save_sealed
from ..stages.text_plan import TextPlan
from ..stages.weights import plain
from . import exporting_text

TARGETS = ("diffusers", "comfyui", "kohya")
LORA_FILE, DENOISER_FILE = "pytorch_lora_weights.safetensors", "diffusion_model.safetensors"
CLOSE = 1e-3
"""The largest difference between our answer and that of the file, over the answer's deviation."""
WHOLE_IN_COMFYUI = (
    "StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux", "FluxKontext", "AuraFlow",
    "PixArtSigma",
)  # fmt: skip
"""Families whose denoiser ComfyUI loads under diffusers' names."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how near the answer of the file is to ours (over the answer's deviation)."""

    files: tuple[Path, ...]
    difference: float
    effect: float
    metadata: Mapping[str, str]


def export(
    run: Path, to: str, out: Path, triggers: Sequence[str] = (), dtype: torch.dtype = torch.float32
) -> Exported:
    """Write a run's adapter, or a run's or model's whole weights, for elsewhere.

    Args:
        to: one of TARGETS. out: the folder to write into. triggers: words for the metadata.
        dtype: of the adapter's tensors.
    Raises:
        Refused: what cannot be written for this target.
        Failed: what was written does not load there, changes nothing, or answers otherwise.
    """
    if to not in TARGETS:
        raise Refused(f'--to "{to}" is not known. Choose one of {", ".join(TARGETS)}.')
    model = load(run)
    if model.origin is None:
        raise Refused(
            f"{run} is a model of sfumato's own stages, which {to} has no classes for. It goes elsewhere as "
            "the folder that model.save writes, and loads with sfumato.load."
        )
    home = run / "model"
    plan = reference.read_plan(home) if home.is_dir() else None
    text = text_plan.read_plan(home) or TextPlan()
    info = metadata_of(run, model, plan, [*triggers, *(word for word, _ in text.tokens)])
    if isinstance(model.denoiser, ControlledDenoiser):
        from .exporting_guides import export_guides

        return export_guides(model, reference.read_base(home)[0], to, out, info)
    if plan is None and not text.alone:
        return export_whole(model, to, out, info)
    base = reference.read_base(home)[0] if (home / reference.BASE).is_file() else home
    return export_lora(model, plan, text, base, to, out, info, dtype)


def metadata_of(
    run: Path,
    model: PaintingModel,
    plan: AdapterPlan | None,
    triggers: Sequence[str],
) -> dict[str, str]:
    """What a reader of the file wants to know, under keys that are read elsewhere."""
    is_run = (run / "model").is_dir()
    base = reference.read_base(run / "model")[0] if (run / "model" / reference.BASE).is_file() else run
    step = RunFolder.open(run).checkpoint_folders()[-1].name.rpartition("-")[2] if is_run else "0"
    known: dict[str, Any] = {
        "format": "pt",
        "software": f"sfumato {__version__}",
        "base": base.name,
        "pipeline": model.info["pipeline"],
        "theory": model.theory.name,
        "steps": int(step),
        "resolution": f"{model.info.get('width')}x{model.info.get('height')}",
        "trigger_words": ", ".join(triggers),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": run.name,
        "modelspec.architecture": model.info["pipeline"].removesuffix("Pipeline") + ("/lora" if plan else ""),
        "modelspec.implementation": "sfumato",
        "modelspec.trigger_phrase": ", ".join(triggers),
        "modelspec.resolution": f"{model.info.get('width')}x{model.info.get('height')}",
        "modelspec.date": time.strftime("%Y-%m-%d"),
    }
    if plan is not None:
        alpha = plan.alpha or plan.rank
        known |= {
            "kind": "dora" if plan.dora else plan.kind, "rank": plan.rank, "alpha": alpha,
            "targets": ", ".join(plan.targets),
            "ss_network_module": "networks.lora" if plan.kind == "lora" else "lycoris.kohya",
            "ss_network_dim": plan.rank, "ss_network_alpha": alpha,
            "ss_base_model_version": model.info["family"], "ss_sd_model_name": base.name,
        }  # fmt: skip
    return {name: str(value) for name, value in known.items()}


# ---------------------------------------------------------------- one answer, asked everywhere


def asked(model: PaintingModel, words: str = "") -> tuple[Tensor, Any]:
    """Latents and a condition that any copy of this model can be asked about; its prompt says `words` too."""
    kind = model.conditioner.kind
    sees = model.conditioner.shows if isinstance(model.conditioner, PretrainedConditioner) else ()
    side = 8 * model.codec.stride if model.codec.stride > 1 else int(model.info["width"])
    frames = 1 + model.codec.time_stride if "frames" in model.info else None
    if kind == "labels":
        side = int(model.info["width"])
    shape = model.latent_shape(side, side, frames)
    given: dict[str, Any] = {}
    if sees:
        given = {name: Image.new("RGB", (side, side), (180, 90, 40)) for name in sees}
        given |= model.codec.pixel_size(shape) if model.conditioner.placed else {}
    said = ["0"] if kind == "labels" else [f"a picture of a red circle {words}".strip()]
    prompt = None if kind == "none" else said
    condition = model.condition(prompt, **given) if prompt is not None else model.condition()
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(1)), condition


@torch.no_grad()
def answers(model: PaintingModel, x: Tensor, condition: Any) -> list[Tensor]:
    """The denoiser's answers at much and at little noise."""
    moments = [
        model.theory.t_data + share * (model.theory.t_noise - model.theory.t_data) for share in (0.95, 0.3)
    ]
    return [model.predict(x.to(model.dtype), moment, condition).float() for moment in moments]


def everything(model: PaintingModel, x: Tensor, condition: Any) -> list[Tensor]:
    """The answers, and what was read before them."""
    read = [tensor.float() for tensor in condition.values() if tensor.is_floating_point()]
    return [*answers(model, x, condition), *read]


def far(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference, over the deviation."""
    return max(float((a - b).abs().max() / a.std().clamp(min=1e-8)) for a, b in zip(one, other, strict=True))


def gate(ours: list[Tensor], theirs: list[Tensor], where: str) -> float:
    """The difference of two answers.

    Raises:
        Failed: it is too large.
    """
    difference = far(ours, theirs)
    if not difference < CLOSE:
        raise Failed(
            f"What was written answers otherwise once {where} has loaded it: the difference is "
            f"{difference:.1e} of the answer's deviation, more than {CLOSE:.0e}. Nothing was kept."
        )
    return difference


# ---------------------------------------------------------------- adapters


def export_lora(
    model: PaintingModel,
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
    x, condition = asked(model, words)
    ours = everything(model, x, condition)
    tensors = {"": exporting_text.state_of(adapters.body(model.denoiser), dtype)} if plan is not None else {}
    tensors |= {
        name: exporting_text.state_of(one, dtype) for name, one in exporting_text.adapted(model).items()
    }
    layers, idle = exporting_text.named_layers(tensors)
    effect = effect_of(model, text, words, ours)
    if effect == 0 or (layers and len(idle) == len(layers)):
        raise Failed(
            f"The adapter changes nothing: {len(idle)} of its {len(layers)} layers are "
            f"still zero ({exchange.said(idle)}). Train it further, with a larger learning rate."
        )
    with atomic_folder(out) as beside:
        if layers:
            write_lora(model, plan or text.lora, tensors, to, beside, info)
        files = sorted(beside.glob("*.safetensors"))
        written = exporting_text.write_words(model, to, beside, info)
        fresh = reading_alike(load(base), model)
        loader = "diffusers"
        if layers:
            matched = set(layers) - (set() if to == "diffusers" else set(idle))
            loader = load_back(fresh, files, to, matched)
        for file, word in written.items():
            exporting_text.read_words(fresh.origin, file, word)
        difference = gate(ours, everything(fresh, x, asked(fresh, words)[1]), loader)
        names = sorted(file.name for file in beside.iterdir())
    return Exported(tuple(out / name for name in names), difference, effect, info)


def reading_alike(fresh: PaintingModel, model: PaintingModel) -> PaintingModel:
    """The fresh model, its prompts read with the run's options, and asked in the run's theory."""
    if model.trained is not None:
        fresh.continue_as(model.theory)
    if isinstance(fresh.conditioner, PretrainedConditioner):
        fresh.conditioner.usual = dict(model.info.get("prompt_options", {}))
    return fresh


def effect_of(model: PaintingModel, text: TextPlan, words: str, ours: list[Tensor]) -> float:
    """How far the answers are from those without the adapters; of new words alone, from where they began."""
    networks = [adapters.body(model.denoiser), *exporting_text.adapted(model).values()]
    networks = [one for one in networks if adapters.names(one)]
    if not networks:
        return exporting_text.learned(model, text)
    for one in networks:
        adapters.scale(one, 0.0)
    x, condition = asked(model, words)
    effect = far(everything(model, x, condition), ours)
    for one in networks:
        adapters.scale(one, 1.0)
    return effect


def write_lora(
    model: PaintingModel,
    plan: Any,
    tensors: Mapping[str, dict[str, Tensor]],
    to: str,
    folder: Path,
    info: dict[str, str],
) -> None:
    """The adapter's file under the target's names; a peft folder where diffusers has no loader."""
    alpha = plan.alpha or plan.rank
    scale = alpha / plan.rank**0.5 if plan.rslora else alpha / plan.rank
    text = exporting_text.lora_of(model, tensors, to, scale)
    if "" not in tensors:
        save_sealed(text.tensors, folder / LORA_FILE, {**info, **text.said})
        return
    for second, part, network in experts(model, tensors[""]):
        config = network.peft_config[adapters.NAME]
        if to != "diffusers":
            keyed = exchange.written(part, scale, names_of(model.info["family"]), to, network)
            keyed |= {} if second else text.tensors
            save_sealed(keyed, folder / f"{info['modelspec.title']}{second}.safetensors", info)
        elif hasattr(model.origin, "load_lora_weights"):
            prefix = model.denoiser.family.network  # type: ignore[attr-defined]
            described = {**config.to_dict(), "target_modules": sorted(exchange.trained(part))}
            packed = {f"{prefix}.{name}": value for name, value in described.items()} | text.config
            more = {exchange.METADATA: json.dumps(packed, default=plainly)}
            keyed = {f"{prefix}.{name}": tensor for name, tensor in part.items()} | text.tensors
            save_sealed(keyed, folder / LORA_FILE.replace(".", f"{second}."), {**info, **more})
        else:
            config.save_pretrained(folder)
            keyed = {f"base_model.model.{name}": tensor for name, tensor in part.items()}
            save_sealed(keyed, folder / "adapter_model.safetensors", info)


def plainly(value: Any) -> Any:
    """A peft setting that JSON does not know."""
    return sorted(value) if isinstance(value, set) else str(value)


def experts(model: PaintingModel, tensors: dict[str, Tensor]) -> list[tuple[str, dict[str, Tensor], Any]]:
    """(ending of the file, its tensors, its network): one, or two where two experts were trained."""
    network: Any = adapters.body(model.denoiser)
    if not hasattr(network, "noisy"):
        return [("", tensors, network)]
    found = []
    for second, name in (("", "noisy"), ("_2", "clean")):
        part = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        one = getattr(network, name)
        one.peft_config = network.peft_config
        found += [(second, part, one)] if part else []
    return found


def load_back(fresh: PaintingModel, files: Sequence[Path], to: str, layers: set[str]) -> str:
    """Load what was written into a fresh base, as the target does; returns who loaded it.

    Raises:
        Failed: keys that found no layer, or layers that found no key.
    """
    pipe, network = fresh.origin, adapters.body(fresh.denoiser)
    if to != "diffusers":
        found = {name for file in files for name in read_back(fresh, file)}
    elif hasattr(pipe, "load_lora_weights"):
        for file in files:
            second = {"load_into_transformer_2": True} if file.stem.endswith("_2") else {}
            with quiet():  # it would tell of every text encoder that has no part in the file
                pipe.load_lora_weights(file, **second)
        found = {name for name, _ in adapters.adapted(network)}
        found |= {
            f"{home}.{name}"
            for home, one in exporting_text.encoders(fresh).items()
            for name, _ in adapters.adapted(one)
        }
    else:
        import peft

        held: Any = peft.PeftModel.from_pretrained(network, str(files[0].parent))
        found = {name for name, _ in adapters.adapted(held.base_model.model)}
    if missing := sorted(layers ^ found):
        raise Failed(
            f"{len(missing)} layers were not matched when {to} names were read: {exchange.said(missing)}."
        )
    return "diffusers" if to == "diffusers" else f"a reader of {to}'s names"


def read_back(fresh: PaintingModel, file: Path) -> list[str]:
    """The layers that a file changes, once merged; those of a second expert under our name for it."""
    is_second = file.stem.endswith("_2") and hasattr(adapters.body(fresh.denoiser), "clean")
    home = "clean." if is_second else "noisy." if hasattr(adapters.body(fresh.denoiser), "clean") else ""
    return [
        home + name.removeprefix("transformer_2.") for name in exchange.merge(fresh, file, second=is_second)
    ]


# ---------------------------------------------------------------- whole weights


def export_whole(model: PaintingModel, to: str, out: Path, info: dict[str, str]) -> Exported:
    """The whole model as a diffusers folder, or its denoiser as ComfyUI loads it."""
    x, condition = asked(model)
    ours = answers(model, x, condition)
    if to == "kohya" or (to == "comfyui" and model.info["family"] not in WHOLE_IN_COMFYUI):
        raise Refused(
            f"{to} loads no whole {model.info['pipeline']} under names that are known here. Export it --to "
            "diffusers; a run that trains a LoRA can be exported for it."
        )
    if to == "comfyui":
        network: Any = adapters.body(plain(model.denoiser))
        with atomic_folder(out) as beside:
            file = beside / DENOISER_FILE
            save_sealed({k: v.contiguous() for k, v in network.state_dict().items()}, file, info)
            difference = gate(ours, again(model, file, x, condition), "its own class")
        return Exported((out / DENOISER_FILE,), difference, 0.0, info)
    stages.save(model, out)
    (out / "sfumato.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
    fresh = reading_alike(load(out), model)
    difference = gate(ours, answers(fresh, x, condition), "diffusers")
    return Exported((out / INDEX, out / "sfumato.json"), difference, 0.0, info)


def again(model: PaintingModel, file: Path, x: Tensor, condition: Any) -> list[Tensor]:
    """The answers of a new network of the same config, filled from the file."""
    from safetensors.torch import load_file

    network: Any = adapters.body(plain(model.denoiser))
    new: nn.Module = type(network).from_config(network.config)
    new.load_state_dict(load_file(file))
    denoiser: Any = type(model.denoiser)(model.denoiser.family, new.eval())  # type: ignore[attr-defined, call-arg]
    other = PaintingModel(model.theory, model.codec, model.conditioner, denoiser, model.info)
    other.trained = model.trained
    return answers(other, x, condition)
