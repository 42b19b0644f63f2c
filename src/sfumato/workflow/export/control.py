"""Guides for elsewhere: a ControlNet as diffusers' folder, an IP-Adapter as the file its pipelines load."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sfumato.errors import Failed, Refused
from sfumato.generation import Pipeline, load
from sfumato.models import Condition
from sfumato.models.control import ControlledDenoiser, ControlModule, attach, controlnet, ip_adapter
from sfumato.run_folder import atomic_folder
from sfumato.workflow.export.compare import (
    Exported,
    answers,
    check_agreement,
    example_inputs,
    largest_difference,
)

ADAPTER_FILE = "ip-adapter.safetensors"


def export_control_modules(
    model: Pipeline, base: Path, to: str, out: Path, metadata: Mapping[str, str]
) -> Exported:
    """Write what guides a run: one control module into `out`, several into a folder each.

    Raises:
        Refused: a target that reads no control modules, or a control module that nobody else has.
        Failed: what was written changes nothing, does not load, or answers otherwise.
    """
    controlled = model.denoiser
    assert isinstance(controlled, ControlledDenoiser)
    if to != "diffusers":
        raise Refused(
            f"{to} takes no control modules from here: write ControlNets and IP-Adapters --to diffusers."
        )
    done: list[Exported] = []
    for module in controlled.control_modules:
        place = out if len(controlled.control_modules) == 1 else out / module.name
        done.append(_export(model, module, base, place, {**metadata, "kind": module.kind}))
    files = tuple(file for one in done for file in one.files)
    worst = max(done, key=lambda one: one.difference)
    return replace(worst, files=files, effect=min(one.effect for one in done))


def _export(
    model: Pipeline, module: ControlModule, base: Path, out: Path, metadata: Mapping[str, str]
) -> Exported:
    """One control module, loaded back by diffusers' own classes and compared."""
    x, condition = example_inputs(model)
    shown = _shown(model, module, x, condition)
    ours, plain = answers(model, x, shown), answers(model, x, condition)
    if (effect := largest_difference(plain, ours)) == 0:
        raise Failed(f"The {module.kind} changes nothing yet. Train it further, with a larger learning rate.")
    controlled: Any = model.denoiser
    with atomic_folder(out) as beside:
        if isinstance(module, controlnet.ControlNet):
            controlnet.write(module, beside)
            written = beside
        elif isinstance(module, ip_adapter.IPAdapter):
            written = beside / ADAPTER_FILE
            ip_adapter.write(module, controlled.base, written)
            _load(load(base).origin, beside)
        else:
            raise Refused(
                f"No other program has a control module like {module.name}; it loads with sfumato.load."
            )
        fresh = load(base)
        attach(fresh, written)
        if model.trained is not None:
            fresh.retarget(model.theory)
        again = Condition({_renamed(name, module): one for name, one in shown.items()}, size=shown.size)
        difference = check_agreement(ours, answers(fresh, x, again), "diffusers")
        files = sorted(file.name for file in beside.iterdir())
    return Exported(tuple(out / name for name in files), difference, effect, metadata)


def _renamed(name: str, module: ControlModule) -> str:
    """A control module that is alone has the first name of its kind."""
    usual = "control" if module.kind == "controlnet" else "reference"
    return usual if name == module.name else name


def _shown(model: Pipeline, module: ControlModule, x: torch.Tensor, condition: Condition) -> Condition:
    """The condition with a picture of the size that x stands for."""
    size = model.codec.pixel_size(x.shape[1:])
    how = module.encoder(model)
    width, height = how.size or (size["width"], size["height"])
    rows = torch.linspace(-1, 1, height)[:, None] * torch.linspace(1, -1, width)
    picture = torch.stack([rows, -rows, rows.abs()])[None].to(model.device, model.dtype)
    with torch.no_grad():
        return Condition({**condition, module.name: how.encode(picture)}, size=condition.size)


def _load(pipe: Any, folder: Path) -> None:
    """Let diffusers' pipeline load an adapter, as a user would.

    Raises:
        Failed: it does not.
    """
    words = ("image_encoder_folder", "image_encoder_pretrained_model_name_or_path")
    flux = type(pipe).__name__.startswith("Flux")
    try:
        pipe.load_ip_adapter(str(folder), subfolder="", weight_name=ADAPTER_FILE, **{words[flux]: None})
    except (ValueError, RuntimeError, KeyError, OSError) as problem:
        message = " ".join(str(problem).split())
        raise Failed(f"diffusers does not load the IP-Adapter that was written: {message}") from problem
