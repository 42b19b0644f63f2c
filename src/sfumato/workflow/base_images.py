"""Bases that are shown pictures: what training shows them, and how their words are read beside it.

A picture to begin with comes from the data's column `data.source_image`; frames to go on from are
the clip's own.
"""

from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from sfumato.data.encoding.encode_plan import PROMPT_IMAGE_MARK
from sfumato.data.encoding.views import Companion
from sfumato.data.settings import DataSettings
from sfumato.data.sources.sample import Sample
from sfumato.errors import Refused
from sfumato.generation import Pipeline
from sfumato.models import Condition, Conditioner
from sfumato.models.pretrained.image_inputs import ImageCondition, picture
from sfumato.models.pretrained.stages import PretrainedConditioner
from sfumato.readers import clips
from sfumato.readers.media import Unreadable, center_crop_resize, conversion_of, read_picture, to_pixels
from sfumato.recipe import Recipe

SOURCE = "edit_source"
Rows = list[dict[str, torch.Tensor]]


def training_images(conditioner: Conditioner, settings: DataSettings) -> dict[str, ImageCondition]:
    """What training shows beside words; a base that can do without a source, only if the recipe names one."""
    if not isinstance(conditioner, PretrainedConditioner):
        return {}
    found = conditioner.training_images()
    is_wanted = bool(conditioner.shows) or bool(settings.source_image)
    return {name: one for name, one in found.items() if one.own or is_wanted}


def companions(model: Any, settings: DataSettings) -> dict[str, Companion]:
    """The same as companions of the samples."""
    found = training_images(model.conditioner, settings)
    if not found:
        return {}
    by = f"{model.codec.fingerprint()} {model.conditioner.fingerprint() if 'vision' in found else ''}"
    column = settings.source_image or SOURCE
    return {
        name: Companion(
            on_device(model, one), f"{name} {one.version} {by}", of="picture" if one.own else column
        )
        for name, one in found.items()
    }


def on_device(model: Any, lesson: ImageCondition) -> Callable[[torch.Tensor], torch.Tensor]:
    """A lesson's encoding on the model's device."""
    return lambda pixels: lesson.encode(pixels.to(model.device, model.dtype))


def check(recipe: Recipe, conditioner: Conditioner) -> None:
    """Raises Refused where the data cannot be shown as the base wants, or a source would not be shown."""
    data = recipe.data
    found = training_images(conditioner, data)
    if data.source_image and recipe.model.train != "edit" and not any(not one.own for one in found.values()):
        raise Refused(
            f'data.source_image belongs to model.train = "edit" and to bases that are shown a picture; '
            f"{recipe.model.base} draws from words. Leave data.source_image out."
        )
    if any(one.own for one in found.values()) and data.frames < 2:
        raise Refused(
            f"{recipe.model.base} goes on from frames of a clip, but data.frames is {data.frames}: name a "
            "folder of clips and set data.frames."
        )
    if encodes_text_with_image(conditioner) and data.flip:
        raise Refused("data.flip: this base reads its words beside the picture as it is. Leave it out.")


# ---------------------------------------------------------------- words read beside a picture


def encodes_text_with_image(conditioner: Conditioner) -> bool:
    """Whether words are read beside the picture that is shown."""
    return isinstance(conditioner, PretrainedConditioner) and conditioner.family.reads_pictures


def is_image_to_video(conditioner: Conditioner) -> bool:
    """Whether there has to be a picture, which the words' reader does not see."""
    if not isinstance(conditioner, PretrainedConditioner):
        return False
    return bool(conditioner.shows) and not conditioner.family.reads_pictures


def source_image(settings: DataSettings, sample: Sample) -> Any:
    """The picture a sample begins with: a path, or what draws or reads it gives."""
    found = sample.companions[settings.source_image or SOURCE]
    return found() if callable(found) else found


def source_image_hash(settings: DataSettings, sample: Sample) -> str:
    """A hash of that picture, and the size it is seen at."""
    found = source_image(settings, sample)
    try:
        note = conversion_of(found)
    except Unreadable:
        note = ""  # said where it is read
    if isinstance(found, Path):
        found = found.read_bytes()
    if isinstance(found, Image.Image):
        found = repr((found.mode, found.size)).encode() + found.tobytes()
    return f"{sha256(found).hexdigest()} at {settings.resolution}{note and f' ({note})'}"


def text_image_encoder(
    model: Pipeline, settings: DataSettings, samples: Sequence[Sample]
) -> Callable[[Sequence[str]], Rows]:
    """Captions with their pictures (`encode_plan.text_key`) → rows of what is read, without what is seen."""
    column = settings.source_image or SOURCE
    known = {source_image_hash(settings, one): one for one in samples if column in one.companions}
    image_names = training_images(model.conditioner, settings)

    def read(texts: Sequence[str]) -> Rows:
        rows = []
        for text in texts:
            caption, _, content = text.partition(PROMPT_IMAGE_MARK)
            one = fit_picture(settings, source_image(settings, known[content]))
            ask: Any = model.conditioner if caption else model.conditioner.encode_negative
            row = ask([caption or None], image=[one]).row(0)
            rows.append({name: tensor for name, tensor in row.items() if name not in image_names})
        return rows

    return read


def picture_key(model: Pipeline, settings: DataSettings) -> Callable[[Sample], str] | None:
    """The content of the picture that a sample's words are read beside, where they are."""
    return partial(source_image_hash, settings) if encodes_text_with_image(model.conditioner) else None


def fit_picture(settings: DataSettings, source: Any) -> Image.Image:
    """A picture at data.resolution, as it is encoded too."""
    side = settings.resolution
    return picture(to_pixels(center_crop_resize(read_picture(source), side, side)[None])[0])


# ---------------------------------------------------------------- drawing and counting


def image_arguments(
    model: Pipeline, settings: DataSettings, samples: Sequence[Sample]
) -> dict[str, list[Any]]:
    """What samples show, as arguments of `generate`; {} for a base that is shown nothing."""
    found = training_images(model.conditioner, settings)
    if not found:
        return {}
    if any(not one.own for one in found.values()):
        return {"image": [fit_picture(settings, source_image(settings, sample)) for sample in samples]}
    ends = [first_and_last_frame(settings, sample) for sample in samples]
    names = cast(PretrainedConditioner, model.conditioner).shows
    return {name: [pair[place] for pair in ends] for place, name in enumerate(names)}


def first_and_last_frame(settings: DataSettings, sample: Sample) -> tuple[Image.Image, Image.Image]:
    """The first and the last frame of a sample's clip."""
    side, source = settings.resolution, sample.source()
    if clips.is_clip(sample.name, source):
        piece = clips.middle_clip(
            sample.name, source, settings.frames, settings.fps, settings.short_clip_frames
        )
        clip = clips.read_frames(sample.name, source, piece, side, side)
    else:
        clip = center_crop_resize(read_picture(source), side, side)[:, None]
    first, last = (picture(to_pixels(clip[None, :, place])[0]) for place in (0, -1))
    return first, last


def example_condition(model: Pipeline, settings: DataSettings, texts: Sequence[str]) -> Condition:
    """The condition of such texts beside grey pictures, as large as training's: to count with."""
    conditioner, count, side = model.conditioner, len(texts), settings.resolution
    found = training_images(conditioner, settings)
    if not found:
        return model.condition(texts)
    gray = Image.new("RGB", (side, side), (128, 128, 128))
    if encodes_text_with_image(conditioner):
        condition = model.condition(texts, image=[gray] * count)
    else:
        condition = conditioner.words(texts)  # type: ignore[attr-defined]
    frames = (settings.frames,) if settings.frames else ()
    pixels = torch.zeros(count, 3, *frames, side, side)
    with torch.no_grad():
        encodings = {name: on_device(model, one)(pixels) for name, one in found.items()}
    return Condition({**condition, **encodings})
