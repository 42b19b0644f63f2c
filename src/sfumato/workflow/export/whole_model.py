"""The whole weights as a diffusers folder, or for ComfyUI as the denoiser's file."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sfumato import models
from sfumato.errors import Refused
from sfumato.generation import Pipeline, load
from sfumato.models.files import save_sealed
from sfumato.models.io.model import plain
from sfumato.models.lora import adapter
from sfumato.models.pretrained.pipeline_folder import INDEX
from sfumato.run_folder import atomic_folder
from sfumato.workflow.export.compare import (
    Exported,
    answers,
    check_agreement,
    example_inputs,
    with_same_prompts,
)
from sfumato.workflow.export.lora import DENOISER_FILE

# ---------------------------------------------------------------- whole weights


def export_whole(model: Pipeline, to: str, out: Path, info: dict[str, str]) -> Exported:
    """The whole model as a diffusers folder, or its denoiser as ComfyUI loads it."""
    x, condition = example_inputs(model)
    ours = answers(model, x, condition)
    if to == "kohya" or (to == "comfyui" and not model.denoiser.family.comfyui_loads_whole):
        raise Refused(
            f"{to} loads no whole {model.info['pipeline']} under names that are known here. Export it --to "
            "diffusers; a run that trains a LoRA can be exported for it."
        )
    if to == "comfyui":
        network: Any = adapter.peft_target(plain(model.denoiser))
        with atomic_folder(out) as beside:
            file = beside / DENOISER_FILE
            save_sealed({k: v.contiguous() for k, v in network.state_dict().items()}, file, info)
            difference = check_agreement(ours, answers_reloaded(model, file, x, condition), "its own class")
        return Exported((out / DENOISER_FILE,), difference, 0.0, info)
    models.save(model, out)
    (out / "sfumato.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
    fresh = with_same_prompts(load(out), model)
    difference = check_agreement(ours, answers(fresh, x, condition), "diffusers")
    return Exported((out / INDEX, out / "sfumato.json"), difference, 0.0, info)


def answers_reloaded(model: Pipeline, file: Path, x: Tensor, condition: Any) -> list[Tensor]:
    """The answers of a new network of the same config, filled from the file."""
    from safetensors.torch import load_file

    network: Any = adapter.peft_target(plain(model.denoiser))
    new: nn.Module = type(network).from_config(network.config)
    new.load_state_dict(load_file(file))
    denoiser: Any = type(model.denoiser)(model.denoiser.family, new.eval())  # type: ignore[attr-defined, call-arg]
    other = Pipeline(model.theory, model.codec, model.conditioner, denoiser, model.info)
    other.trained = model.trained
    return answers(other, x, condition)
