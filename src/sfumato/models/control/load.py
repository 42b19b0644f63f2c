"""Trained control modules for a model: diffusers' ControlNets and IP-Adapters, and other runs'."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sfumato import paths
from sfumato.errors import Refused
from sfumato.models import hub_files
from sfumato.models.control.base import ControlledDenoiser
from sfumato.models.control.control_plan import FILE, ControlPlan, add_control_modules, read_plans
from sfumato.models.control.ip_adapter import features_of
from sfumato.models.files import read_tensors
from sfumato.models.interface import Denoiser, Model
from sfumato.models.locate import chosen_weights, weights_of

WEIGHTS = "guides.safetensors"
"""What control modules have learned, beside the base they act on."""


ENCODER = "image_encoder"
"""The folder beside an IP-Adapter's file in which its image encoder is looked for."""


def attach(model: Model, place: str | Path, image_encoder: str | Path | None = None) -> ControlledDenoiser:
    """Give a model a trained control module: a diffusers ControlNet's folder, an IP-Adapter's file, or a run
    (or a saved model) whose control modules stand beside the same base; or the Hub's id of one.

    Args:
        image_encoder: what an IP-Adapter sees through, a folder of transformers; default `image_encoder`
            beside its file.
    Raises:
        Refused: none of them, or one for another base.
    """
    path = hub_files.place(place)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise Refused(f"{path} is no control module: an IP-Adapter is a .safetensors file.")
        return _attach_ip_adapter(model, path.absolute(), image_encoder)
    if image_encoder is not None:
        raise Refused(f"image_encoder is for an IP-Adapter's file; {path} is none. Leave it out.")
    if (path / "config.json").is_file():
        return add_control_modules(model, [ControlPlan("controlnet", built={"folder": str(path.absolute())})])
    run, checkpoint = weights_of(path)
    home = run / "model" if (run / "model" / FILE).is_file() else run
    if (home / FILE).is_file():
        weights = home / WEIGHTS if home == run else chosen_weights(run, checkpoint)
        return _attach_run(model, path, home, weights)
    raise Refused(
        f"{path} is no control module: give the folder of a diffusers ControlNet (config.json), the "
        ".safetensors file of an IP-Adapter, or a run that trained one."
    )


def _attach_ip_adapter(model: Model, file: Path, image_encoder: str | Path | None) -> ControlledDenoiser:
    """An IP-Adapter's file, with its image encoder where there is one."""
    base = model.denoiser.base if isinstance(model.denoiser, ControlledDenoiser) else model.denoiser
    folder = file.parent / ENCODER if image_encoder is None else Path(image_encoder).expanduser().absolute()
    image = None
    if image_encoder is not None or folder.is_dir():
        image = {"source": str(folder), **features_of(base, str(file))}
    return add_control_modules(model, [ControlPlan("ip-adapter", built={"file": str(file), "image": image})])


def _attach_run(model: Model, path: Path, home: Path, weights: Path) -> ControlledDenoiser:
    """The control modules of a run beside the model's own."""
    plans = read_plans(home)
    if changing := next((one.kind for one in plans if one.kind in ("edit", "control")), ""):
        raise Refused(
            f"{path} cannot be added to a model: its base learned along ({changing}), so it draws by itself. "
            f"Say {paths.command('generate', path)}."
        )
    known = len(model.denoiser.control_modules) if isinstance(model.denoiser, ControlledDenoiser) else 0
    base = model.denoiser.base if isinstance(model.denoiser, ControlledDenoiser) else model.denoiser
    if (own := home / "denoiser" / "weights.safetensors").is_file() and not _is_same(base, read_tensors(own)):
        raise Refused(f"{path} was trained beside another base than this model. Add it to the base it knows.")
    nameless = [{name: said for name, said in one.built.items() if name != "name"} for one in plans]
    plans = [replace(one, built=built) for one, built in zip(plans, nameless, strict=True)]
    controlled = add_control_modules(model, plans)
    _fill(controlled, read_tensors(weights), known, path)
    return controlled.eval()


def _is_same(base: Denoiser, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a base has exactly these weights."""
    own = base.state_dict()
    if own.keys() != tensors.keys() or any(own[name].shape != one.shape for name, one in tensors.items()):
        return False
    return all(torch.equal(own[name], one.to(own[name])) for name, one in tensors.items())


def _fill(controlled: ControlledDenoiser, tensors: Mapping[str, Tensor], known: int, path: Path) -> None:
    """Put the tensors of a run's control modules into those after the first `known`."""
    moved: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        head, _, rest = name.removeprefix("guides.").partition(".")
        moved[f"guides.{int(head) + known}.{rest}"] = tensor
    own = {
        name: weight
        for name, weight in controlled.trained_weights().items()
        if name.startswith("guides.") and int(name.split(".")[1]) >= known
    }
    strange = sorted(own.keys() ^ moved.keys())
    strange = strange or sorted(name for name in own if own[name].shape != moved[name].shape)
    if strange:
        raise Refused(f'{path} does not fit this model: "{strange[0]}" differs. Add it to the base it knows.')
    for name, weight in own.items():
        weight.data.copy_(moved[name])
