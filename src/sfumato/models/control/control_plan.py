"""Plans: a model's control modules as plain values; beside a base they build the same modules again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.errors import Refused, explain_malformed, parse_object
from sfumato.models.control.base import ControlledDenoiser, ControlModule
from sfumato.models.control.controlnet import ControlNet
from sfumato.models.control.image_encoders import image_encoder
from sfumato.models.control.ip_adapter import IPAdapter, features_of
from sfumato.models.control.own import ControlInput, EditSource, OwnControlNet, OwnIPAdapter
from sfumato.models.interface import Denoiser, Model, seeded
from sfumato.models.networks.dit import DiT
from sfumato.models.networks.unet import UNet
from sfumato.run_folder import write_atomic

FORMAT = 1
FILE = "guides.json"
KINDS = ("controlnet", "ip-adapter", "edit", "control")


@dataclass(frozen=True)
class ControlPlan:
    """One control module.

    Args:
        kind: controlnet, ip-adapter, edit, or control: read by the denoiser itself, which learns along.
        layers: of a ControlNet, 0 for the usual number.
        image: the image encoder of an IP-Adapter: "codec" or a folder.
        control: how its picture is made from a picture ("sketch", …), or which column holds it.
        seed: what new weights are drawn from.
        built: further values, once the control module is there.
    """

    kind: str
    layers: int = 0
    image: str = "codec"
    control: str = ""
    seed: int = 0
    built: Mapping[str, Any] = field(default_factory=dict)


def add_control_modules(model: Model, plans: Sequence[ControlPlan]) -> ControlledDenoiser:
    """The model's denoiser with new control modules around it, beside those it has. Sets `model.denoiser`.

    Raises:
        Refused: a control module that its base cannot have.
    """
    base = model.denoiser
    known: list[ControlModule] = []
    if isinstance(base, ControlledDenoiser):
        base, known = base.base, base.control_modules
    for plan in plans:
        known.append(seeded(plan.seed, lambda plan=plan, base=base: build_module(model, base, plan, known)))
    controlled = ControlledDenoiser(base, known).to(model.device, model.dtype)
    model.denoiser = controlled
    kept = model.info.get("guides", [])
    described = [
        {"kind": one.kind, "control": plan.control, "built": one.config()}
        for one, plan in zip(known[len(kept) :], plans, strict=True)
    ]
    model.info["guides"] = [*kept, *described]
    return controlled


def build_module(
    model: Model, base: Denoiser, plan: ControlPlan, known: Sequence[ControlModule]
) -> ControlModule:
    """The control module a plan describes, around this base."""
    built = dict(plan.built)
    alike = sum(one.kind == plan.kind for one in known)
    ours = isinstance(base, DiT)
    stride = built.get("stride", model.codec.stride)
    deep = built.get("deep", model.codec.time_stride if ours and base.frames else 1)
    shown = sum(one.name.startswith("control") for one in known)
    name = f"control_{shown + 1}" if shown else "control"
    if plan.kind == "controlnet":
        layers = built.get("layers", plan.layers)
        if ours:
            return OwnControlNet(base, stride, layers, built.get("name", name), deep)
        return ControlNet(base, layers, built.get("name", name), built.get("folder", ""), stride)
    if plan.kind not in KINDS:
        raise Refused(f'There is no control module "{plan.kind}"; there are {", ".join(KINDS)}.')
    if plan.kind == "control" and isinstance(base, DiT | UNet):
        return ControlInput(base, stride, built.get("name", name), deep)
    if plan.kind == "control":
        raise Refused(
            f"data.control_image: a {type(base).__name__} reads no control picture itself; what guides it "
            "stands "
            'beside it. Say model.train = "controlnet".'
        )
    if alike:
        raise Refused(f'This model has a control module "{plan.kind}" already, and takes one.')
    if plan.kind == "ip-adapter":
        said: Any = built.get("image", {"source": plan.image, **features_of(base)})
        side = int(model.info.get("resolution", 64))
        image: Any = said and image_encoder(codec=model.codec, pixels=side, **said)
        if ours:
            return OwnIPAdapter(base, image)
        return IPAdapter(base, image, int(built.get("width", 0)), file=built.get("file", ""))
    if not ours:
        raise Refused(
            f'model.train = "edit" is for our own DiT, not for a {type(base).__name__}: editing families '
            '(FLUX.1 Kontext, Qwen-Image-Edit) are trained with "full" or "lora".'
        )
    return EditSource(base)


def plans_of(described: Sequence[Mapping[str, Any]]) -> list[ControlPlan]:
    """The plans that build what was described in a model's `info`."""
    return [ControlPlan(one["kind"], control=one.get("control", ""), built=one["built"]) for one in described]


def write_plans(folder: Path, model: Model) -> None:
    """Write down the model's control modules; their weights are elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {"format": FORMAT, "guides": model.info.get("guides", [])}
    write_atomic(folder / FILE, json.dumps(described, indent=1))


def read_plans(folder: Path) -> list[ControlPlan]:
    """The plans in a folder; none where there are none.

    Raises:
        Failed: the file is damaged. Refused: it is of a newer sfumato.
    """
    file = folder / FILE
    if not file.is_file():
        return []
    with explain_malformed(file, "Copy the folder again."):
        said = parse_object(file.read_text(encoding="utf-8"))
        if said.get("format", 0) > FORMAT:
            raise Refused(f"{file} was written by a newer sfumato (format {said['format']}). Update sfumato.")
        return plans_of(said["guides"])


def load_weights(controlled: ControlledDenoiser, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Put trained tensors into their places.

    Raises:
        Refused: naming the first that does not fit.
    """
    own, rest = controlled.trained_weights(), set(controlled.state_dict())
    strange = sorted(own.keys() - tensors.keys()) + sorted(tensors.keys() - rest)
    strange = strange or sorted(name for name in own if own[name].shape != tensors[name].shape)
    if strange:
        raise Refused(
            f'{source} does not fit the control modules its folder describes: "{strange[0]}" differs '
            f"({len(strange)} of {len(own)}). The base may be another one than they were trained on."
        )
    for name, weight in own.items():
        weight.data.copy_(tensors[name])
