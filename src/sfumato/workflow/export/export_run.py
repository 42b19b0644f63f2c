"""Files that load elsewhere: written beside their place, loaded back there, compared, and only then declared.

A LoRA goes out under diffusers', ComfyUI's or kohya's names; whole weights as a diffusers folder, or for
ComfyUI as the denoiser's file.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sfumato import __version__
from sfumato.errors import Refused, one_of
from sfumato.generation import Pipeline, load
from sfumato.models.control import ControlledDenoiser
from sfumato.models.io import adapter_run
from sfumato.models.locate import weights_of
from sfumato.models.lora.adapter import AdapterPlan
from sfumato.models.pretrained import train_text_encoders
from sfumato.models.pretrained.train_text_encoders import TextPlan
from sfumato.run_folder import RunFolder
from sfumato.workflow.export.compare import Exported
from sfumato.workflow.export.lora import export_lora
from sfumato.workflow.export.targets import TARGETS
from sfumato.workflow.export.whole_model import export_whole


def export(
    run: Path, to: str, out: Path, triggers: Sequence[str] = (), dtype: torch.dtype = torch.float32
) -> Exported:
    """Write a run's adapter, or a run's or model's whole weights, for elsewhere.

    Args:
        run: its newest checkpoint is written, or the one that is named (`RUN/checkpoints/step-000500`).
        to: one of TARGETS. out: the folder to write into. triggers: words for the metadata.
        dtype: of the adapter's tensors.
    Raises:
        Refused: what cannot be written for this target.
        Failed: what was written does not load there, changes nothing, or answers otherwise.
    """
    one_of("--to", to, TARGETS)
    model = load(run)
    if model.origin is None:
        raise Refused(
            f"{run} is a model of sfumato's own stages, which {to} has no classes for. It goes elsewhere as "
            "the folder that model.save writes, and loads with sfumato.load."
        )
    run, checkpoint = weights_of(run)
    home = run / "model"
    plan = adapter_run.read_plan(home) if home.is_dir() else None
    text = train_text_encoders.read_plan(home) or TextPlan()
    info = metadata_of(run, checkpoint, model, plan, [*triggers, *(word for word, _ in text.tokens)])
    if isinstance(model.denoiser, ControlledDenoiser):
        from sfumato.workflow.export.control import export_control_modules

        return export_control_modules(model, adapter_run.read_base(home)[0], to, out, info)
    if plan is None and not text.alone:
        return export_whole(model, to, out, info)
    base = adapter_run.read_base(home)[0] if (home / adapter_run.BASE).is_file() else home
    return export_lora(model, plan, text, base, to, out, info, dtype)


def metadata_of(
    run: Path,
    checkpoint: Path | None,
    model: Pipeline,
    plan: AdapterPlan | None,
    triggers: Sequence[str],
) -> dict[str, str]:
    """What a reader of the file wants to know, under keys that are read elsewhere."""
    is_run = (run / "model").is_dir()
    base = adapter_run.read_base(run / "model")[0] if (run / "model" / adapter_run.BASE).is_file() else run
    of_hub = adapter_run.hub_commit(run / "model")
    newest = RunFolder.open(run).checkpoint_folders()[-1] if is_run else None
    step = chosen.name.rpartition("-")[2] if (chosen := checkpoint or newest) else "0"
    name = run.name if checkpoint is None else f"{run.name}-{checkpoint.name}"
    known: dict[str, Any] = {
        "format": "pt",
        "software": f"sfumato {__version__}",
        "base": of_hub.get("hub", base.name),
        "pipeline": model.info["pipeline"],
        "theory": model.theory.name,
        "steps": int(step),
        "resolution": f"{model.info.get('width')}x{model.info.get('height')}",
        "trigger_words": ", ".join(triggers),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": name,
        "modelspec.architecture": model.info["pipeline"].removesuffix("Pipeline") + ("/lora" if plan else ""),
        "modelspec.implementation": "sfumato",
        "modelspec.trigger_phrase": ", ".join(triggers),
        "modelspec.resolution": f"{model.info.get('width')}x{model.info.get('height')}",
        "modelspec.date": time.strftime("%Y-%m-%d"),
    }
    if plan is not None:
        alpha = plan.alpha or plan.rank
        known |= {
            "kind": "dora" if plan.dora else plan.kind,
            "rank": plan.rank,
            "alpha": alpha,
            "targets": ", ".join(plan.targets),
            "ss_network_module": "networks.lora" if plan.kind == "lora" else "lycoris.kohya",
            "ss_network_dim": plan.rank,
            "ss_network_alpha": alpha,
            "ss_base_model_version": model.info["family"],
            "ss_sd_model_name": of_hub.get("hub", base.name),
        }
    if of_hub:
        known["base_commit"] = of_hub["commit"]
    return {name: str(value) for name, value in known.items()}
