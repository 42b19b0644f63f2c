"""What a recipe says of control modules: which is trained, and which pictures it is shown."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.data import condition_images
from sfumato.data.settings import DataSettings
from sfumato.data.sources.sample import Sample
from sfumato.errors import Refused, nearest
from sfumato.generation import Pipeline, to_pictures
from sfumato.generation.image_guidance import CONTROLS
from sfumato.models import Condition
from sfumato.models import control as models_control
from sfumato.models.control import ControlledDenoiser, ControlPlan
from sfumato.readers import clips
from sfumato.readers.media import center_crop_resize, read_picture, to_pixels
from sfumato.recipe import DEFAULT, Recipe
from sfumato.workflow import base_images
from sfumato.workflow.preview import PreviewGroup

ITSELF = "picture"
"""The word for a sample's own picture."""
CONTROL = "data.control_image"


def check(recipe: Recipe) -> None:
    """Raises Refused for a key about control modules that could not act."""
    kind, base = recipe.model.train, recipe.model.base
    if kind == "controlnet" and base == "scratch":
        raise Refused(
            'model.train = "controlnet" guides a model that is there. Name one as model.base; or say '
            'model.train = "full", and the new model reads data.control_image itself.'
        )
    if kind in ("controlnet", "ip-adapter") and base == "scratch":
        raise Refused(
            f'model.train = "{kind}" guides a model that is there. Name one as model.base: train one first.'
        )
    for name, wanted in (
        ("model.control_layers", "controlnet"), ("data.control_image", "controlnet"),
        ("model.image_encoder", "ip-adapter"), ("data.reference_image", "ip-adapter"),
    ):  # fmt: skip
        if recipe.origin(name) != DEFAULT and kind != wanted and not (name == CONTROL and kind == "full"):
            raise Refused(
                f'{name} belongs to model.train = "{wanted}", but model.train is "{kind}". Say '
                f'model.train = "{wanted}", or leave {name} out.'
            )


def check_column(recipe: Recipe, samples: Sequence[Sample]) -> None:
    """Raises Refused where what is said as data.control_image is neither a kind nor a column of the data."""
    plan = control_plan_of(recipe)
    if plan is None or plan.kind not in CONTROLS:
        return
    place = column(recipe.data, "control")
    if place == ITSELF or any(place in sample.companions for sample in samples):
        return
    known = {name for sample in samples for name in sample.companions}
    hint = nearest(place, [*condition_images.KINDS, *known])
    raise Refused(
        f'data.control_image is "{place}", but no sample has such a column, and it is none of '
        f"{', '.join(condition_images.KINDS)}, which are made of the picture itself.{hint}"
    )


def control_plan_of(recipe: Recipe) -> ControlPlan | None:
    """The control module the recipe asks for, if any."""
    model = recipe.model
    kind = "control" if model.train == "full" and recipe.origin(CONTROL) != DEFAULT else model.train
    if kind not in models_control.KINDS:
        return None
    control = recipe.data.control_image if kind in CONTROLS else ""
    return ControlPlan(kind, model.control_layers, model.image_encoder, control, recipe.seed)


def attach_control(model: Pipeline, recipe: Recipe) -> None:
    """Put the recipe's control module around the model's denoiser.

    Raises:
        Refused: a second control module that reads a control.
    """
    plan = control_plan_of(recipe)
    known = model.denoiser.control_modules if isinstance(model.denoiser, ControlledDenoiser) else []
    if plan is None or any(one.kind == plan.kind for one in known):
        return
    if plan.kind in CONTROLS and any(one.kind in CONTROLS for one in known):
        raise Refused(
            f"{recipe.model.base} reads a control already. Train the new control module beside a base that "
            "reads none; both act at: sfumato generate RUN --control-module OTHER."
        )
    models_control.add_control_modules(model, [plan])


@torch.no_grad()
def with_blank_control(model: Pipeline, condition: Condition, side: int, frames: int = 0) -> Condition:
    """The condition with what the model's control modules read of grey pictures of this side.

    Args:
        frames: of the clips that are drawn; 0: pictures are.
    """
    if not isinstance(model.denoiser, ControlledDenoiser):
        return condition
    encodings: dict[str, Tensor] = {}
    for name, how in model.denoiser.encoders(model).items():
        width, height = how.size or (side, side)
        of_clip = [frames if how.moves else 1] if frames else []
        gray = torch.zeros(1, 3, *of_clip, height, width, device=model.device, dtype=model.dtype)
        encoding = how.encode(gray)
        encodings[name] = encoding.expand(condition.size, *encoding.shape[1:])
    return Condition({**condition, **encodings}, size=condition.size)


def column(settings: DataSettings, name: str) -> str:
    """Which picture of a sample a control module's tensor is made from: a column, or ITSELF."""
    if name.startswith("control"):
        return (
            ITSELF
            if condition_images.kind_of(settings.control_image) in condition_images.KINDS
            else settings.control_image
        )
    return {"reference": settings.reference_image, "edit_source": settings.source_image or "edit_source"}.get(
        name, name
    )


def columns(settings: DataSettings) -> tuple[str, ...]:
    """Columns of the user's own that name pictures."""
    names = [column(settings, name) for name in ("control", "reference", "edit_source")]
    return tuple(dict.fromkeys([*settings.condition_columns, *(one for one in names if one != ITSELF)]))


def with_control_images(
    groups: Sequence[PreviewGroup], model: Pipeline, recipe: Recipe, data: Any
) -> list[PreviewGroup]:
    """The groups with the pictures that guide their drawings: of the sample with that caption, of held-out
    ones in their group; else the first samples'.
    """
    if not isinstance(model.denoiser, ControlledDenoiser) and not base_images.training_images(
        model.conditioner, recipe.data
    ):
        return list(groups)

    def guides_of(group: PreviewGroup) -> dict[str, Any]:
        sets = (data.held_out, data.train) if group.name == "held_out" else (data.train, data.held_out)
        items = [item.sample for encoded in sets for item in encoded.items]
        known = {sample.captions[0] if sample.captions else "": sample for sample in reversed(items)}
        chosen = [known.get(prompt, items[at % len(items)]) for at, prompt in enumerate(group.prompts)]
        return control_arguments(model, recipe.data, chosen)

    return [replace(group, guides=guides_of(group)) for group in groups]


def control_arguments(model: Pipeline, settings: DataSettings, samples: Sequence[Sample]) -> dict[str, Any]:
    """The samples' pictures that guide, as arguments of `generate`; {} without control modules."""
    if not isinstance(model.denoiser, ControlledDenoiser):
        return base_images.image_arguments(model, settings, samples)
    word = {"edit_source": "image"}
    return {
        word.get(one.name, one.name): [picture_for(settings, one.name, sample) for sample in samples]
        for one in model.denoiser.control_modules
        if "_" not in one.name or one.name == "edit_source"
    }


def picture_for(settings: DataSettings, name: str, sample: Sample) -> Any:
    """The picture of a sample for a control module, at data.resolution; of clips uint8 [F, H, W, 3].

    Raises:
        Refused: the sample has none.
    """
    place = column(settings, name)
    if place != ITSELF and place not in sample.companions:
        raise Refused(f'{sample.name} has no "{place}".')
    other = sample.companions.get(place)
    source: Any = sample.source() if place == ITSELF else other() if callable(other) else other
    pixels = to_pixels(_frames(settings, source, sample.name)[None])
    if name.startswith("control") and place == ITSELF:
        pixels = condition_images.control_image(pixels, settings.control_image)
    return to_pictures(pixels, bool(settings.frames))[0]


def _frames(settings: DataSettings, source: Any, name: str) -> Tensor:
    """A picture, uint8 [3, H, W]; where clips are wanted [3, F, H, W], a picture one of a single frame."""
    name = source.name if isinstance(source, Path) else name
    side = settings.resolution
    if settings.frames and clips.is_clip(name, source):
        piece = clips.middle_clip(name, source, settings.frames, settings.fps, settings.short_clip_frames)
        return clips.read_frames(name, source, piece, side, side)
    still = center_crop_resize(read_picture(source), side, side)
    return still[:, None] if settings.frames else still
