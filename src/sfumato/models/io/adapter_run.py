"""What a run keeps of a base it did not change: where it is, and the plan of the adapter beside it.

base.json     the base's folder (of the Hub: its id and commit too), fingerprints of its files, and what the
              model remembers
adapter.json  the adapter's plan; its weights are in the run's checkpoints
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato import hub
from sfumato.errors import Refused, check_types, explain_malformed, parse_object
from sfumato.models import hub_files
from sfumato.models.interface import Denoiser
from sfumato.models.io.base_fingerprint import base_fingerprint, check_base
from sfumato.models.lora import adapter
from sfumato.models.lora.adapter import AdapterPlan
from sfumato.models.pretrained.pipeline_folder import find_model
from sfumato.run_folder import write_atomic

FORMAT = 1
BASE, ADAPTER = "base.json", "adapter.json"


def write_base(folder: Path, base: Path, info: Mapping[str, Any]) -> None:
    """Remember a base by its place, and by what its files are now."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "format": FORMAT,
        "base": str(base.absolute()),
        "info": dict(info),
        **hub_files.commit_of(base),
    }
    described["fingerprint"] = base_fingerprint(base, info)
    write_atomic(folder / BASE, json.dumps(described, indent=1))


def read_base(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The base's folder and what the model remembers; one of the Hub's is fetched again where it is gone.

    Raises:
        Refused: the base is gone.
    """
    described = _read(folder / BASE)
    with explain_malformed(folder / BASE, "Copy the folder again."):
        base, info = Path(described["base"]), dict(described["info"])
        base.exists()  # a NUL in it is found here
        source = f"{described['hub']}@{described['commit']}" if "hub" in described else ""
    if not base.exists() and hub.parse(source) is not None:
        return find_model(source), info
    if not base.exists():
        raise Refused(
            f"{folder} is of a run that was trained on {base}, which is not there any more. Put the base "
            f'back there, or write its new place into {folder / BASE} ("base").'
        )
    return base, info


def hub_commit(folder: Path) -> dict[str, str]:
    """{hub, commit} of the base of a run in this folder; empty where it is none of the Hub's."""
    described = _read(folder / BASE) if (folder / BASE).is_file() else {}
    return {name: str(described[name]) for name in ("hub", "commit") if name in described}


def verify_base(folder: Path) -> None:
    """Raises Refused where a run in this folder was laid over a base that is another one now."""
    if not (folder / BASE).is_file():
        return
    known = _read(folder / BASE).get("fingerprint")
    if isinstance(known, Mapping) and known:
        check_base(folder, read_base(folder)[0], {str(name): str(one) for name, one in known.items()})


def write_plan(folder: Path, plan: AdapterPlan) -> None:
    """Remember an adapter's plan."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / ADAPTER, json.dumps({"format": FORMAT, **asdict(plan)}, indent=1))


def read_plan(folder: Path) -> AdapterPlan | None:
    """The plan of the adapter in a folder, if there is one."""
    if not (folder / ADAPTER).is_file():
        return None
    described = _read(folder / ADAPTER)
    with explain_malformed(folder / ADAPTER, "Copy the folder again."):
        known = {one.name: described[one.name] for one in fields(AdapterPlan) if one.name in described}
        plan = AdapterPlan(**{**known, "targets": tuple(known["targets"])})
        check_types(plan)
        return plan


def _read(file: Path) -> dict[str, Any]:
    with explain_malformed(file, "Train the recipe again."):
        described = parse_object(file.read_text(encoding="utf-8"))
        if described.get("format", 0) > FORMAT:
            raise Refused(
                f"{file} was written by a newer sfumato (format {described['format']}). Update sfumato."
            )
        return described


def attach(denoiser: Denoiser, plan: AdapterPlan) -> list[str]:
    """Put the planned adapter beside the denoiser's layers; returns their names."""
    return adapter.attach(adapter.peft_target(denoiser), plan, denoiser.lora_targets)


def fill_adapter(denoiser: Denoiser, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Put an adapter's trained tensors, by the names of the denoiser's parameters, into their places.

    Raises:
        Refused: naming the first that do not fit.
    """
    own = {name: weight for name, weight in denoiser.named_parameters() if weight.requires_grad}
    strange = sorted(own.keys() ^ tensors.keys())
    strange = strange or sorted(name for name, one in tensors.items() if one.shape != own[name].shape)
    if strange:
        raise Refused(
            f'{source} does not fit the adapter its run describes: "{strange[0]}" differs '
            f"({len(strange)} of {len(own)}). The base may be another one than it was trained on."
        )
    for name, tensor in tensors.items():
        own[name].data.copy_(tensor)
