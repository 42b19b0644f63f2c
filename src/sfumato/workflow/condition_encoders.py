"""Companions: which function encodes a sample's control picture, mask, reference or edit source.

A denoiser that wants one encoded in its own way says so: `companions(model)` gives {name: Companion}. Else a
mask becomes one number per latent, and every other picture becomes latents by the model's own codec.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from sfumato.data import condition_images
from sfumato.data.encoding.views import Companion
from sfumato.data.settings import DataSettings
from sfumato.errors import Refused, nearest
from sfumato.models import Model
from sfumato.models.control import ControlledDenoiser
from sfumato.models.control.image_encoders import ImageConditionEncoder
from sfumato.models.interface import DenoiserWrapper
from sfumato.models.pretrained import inpainting
from sfumato.models.stage_folder import is_ours
from sfumato.recipe import Recipe
from sfumato.user_code import is_user_code
from sfumato.workflow import base_images, control_training


def encoders(model: Model, settings: DataSettings) -> dict[str, Companion]:
    """How each companion the recipe names is encoded for this model; what it needs itself comes too."""
    own = own_encoders(model, settings)
    names = dict.fromkeys([*own, *settings.condition_columns])
    return {name: own.get(name) or _usual(model, name) for name in names}


def own_encoders(model: Model, settings: DataSettings) -> dict[str, Companion]:
    """The companions that this model reads, however the recipe names them."""
    own: dict[str, Companion] = dict(model.denoiser.companions(model))
    if isinstance(model.denoiser, ControlledDenoiser):
        own |= {
            name: _guiding(encoder, name, settings)
            for name, encoder in model.denoiser.encoders(model).items()
        }
    if inpainting.repaints(model.denoiser):
        own |= _repainting(model)
    elif settings.random_masks and "mask" not in {*own, *settings.condition_columns}:
        raise Refused(
            f"data.random_masks = {settings.random_masks}, but this model is shown no mask; it repaints "
            "without having "
            "learned to. Take an inpainting checkpoint as model.base, or leave data.random_masks out."
        )
    return own | base_images.companions(model, settings)


def check_read(recipe: Recipe, model: Model | None) -> None:
    """Raises Refused where the recipe names a column of pictures that nothing of the model would read.

    A denoiser of one's own may read any; it is asked by none of its words.

    Args:
        model: None for a denoiser of ours without control modules, before it is made.
    """
    denoiser = None if model is None else model.denoiser
    while isinstance(denoiser, DenoiserWrapper) and is_ours(type(denoiser)):
        denoiser = denoiser.base
    if denoiser is not None and not is_ours(type(denoiser)):
        return
    own = {} if model is None else own_encoders(model, recipe.data)
    read = {*own, *(word for one in own.values() for word in (one.of, one.without))}
    unread = [name for name in recipe.data.condition_columns if name not in read]
    if unread:
        said = f"it reads {', '.join(own)}" if own else "it reads no picture beside a sample's own"
        raise Refused(
            f'data.condition_columns names "{unread[0]}", which {recipe.model.base} would not read: {said}. '
            "Leave "
            "it out; or set model.train to controlnet, ip-adapter or edit, take an inpainting checkpoint as "
            "model.base, or a denoiser of your own (file.py:name)."
        )


def check_read_early(recipe: Recipe, base: Model | None) -> None:
    """`check_read` before anything is made, where that can be told."""
    is_ours_to_make = base is None and not is_user_code(recipe.model.denoiser)
    if not control_training.control_plan_of(recipe) and (base is not None or is_ours_to_make):
        check_read(recipe, base)


def _guiding(encoder: ImageConditionEncoder, name: str, settings: DataSettings) -> Companion:
    """How a guide's picture is made and encoded."""
    of, kind = control_training.column(settings, name), condition_images.kind_of(settings.control_image)
    if not name.startswith("control") or kind not in condition_images.KINDS:
        return Companion(encoder.encode, encoder.fingerprint, encoder.size, of)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return encoder.encode(condition_images.control_image(pixels, kind))

    return Companion(encode, f"{kind} {condition_images.VERSION}, {encoder.fingerprint}", encoder.size, of)


def _repainting(model: Model) -> dict[str, Companion]:
    """What an inpainting network reads, of the column `mask`: white is repainted."""

    def hole(pixels: torch.Tensor) -> torch.Tensor:
        shape = model.codec.latent_shape(pixels.shape[-1], pixels.shape[-2])
        return inpainting.hole_of(inpainting.opening(pixels), *shape[-2:])

    return {
        inpainting.HOLE: Companion(hole, f"hole 1, {model.codec.stride} pixels a side", of="mask"),
        inpainting.KEPT: Companion(model.encode, model.codec.fingerprint(), of="picture", without="mask"),
    }


def _usual(model: Model, name: str) -> Companion:
    return _mask(model) if name == "mask" else Companion(model.encode, model.codec.fingerprint())


def _mask(model: Model) -> Companion:
    """Masks [B, 1, h, w] in [0, 1], 1 where the picture is white: the mean over each latent's pixels."""
    stride = model.codec.stride

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        gray = (pixels.mean(1, keepdim=True) + 1) / 2
        return F.avg_pool2d(gray, stride) if gray.ndim == 4 else F.avg_pool3d(gray, (1, stride, stride))

    return Companion(encode, f"mask 1, mean over {stride} pixels")


def condition_dropout(settings: DataSettings, names: Sequence[str]) -> dict[str, float]:
    """`data.condition_dropout`, checked: {companion: share of samples shown without it}.

    Raises:
        Refused: it names no companion.
    """
    for name in settings.condition_dropout:
        if name not in names:
            hint = nearest(name, names) if names else " Set data.condition_columns first."
            raise Refused(f'data.condition_dropout names "{name}", which is no companion of this run.{hint}')
    return dict(settings.condition_dropout)
