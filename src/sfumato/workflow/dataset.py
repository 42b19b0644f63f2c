"""The material of a run: its samples, the sizes they are brought to, and their pictures in memory."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from sfumato.data import condition_images
from sfumato.data.encoding import views
from sfumato.data.encoding.views import EncodingOptions
from sfumato.data.settings import EMBEDDED, DataSettings
from sfumato.data.sources import folder, hub_dataset, user_dataset
from sfumato.data.sources.captions import CaptionOptions, expand_captions
from sfumato.data.sources.sample import Collection, Sample
from sfumato.errors import Refused
from sfumato.readers import clips, media
from sfumato.recipe import Recipe
from sfumato.user_code import is_user_code
from sfumato.workflow import control_training

T = TypeVar("T")
Bucket = tuple[int, int]
MOST_BYTES = 4 << 30


def collect(settings: DataSettings) -> Collection:
    """The samples `data.train` names: a folder's, or an embedded set's.

    Raises:
        Refused: if there are none, or nothing is said.
    """
    if not settings.train:
        raise Refused(
            f"data.train is empty. Name a folder of pictures, or one of {', '.join(EMBEDDED)}, "
            "in the recipe or as data.train=DIR."
        )
    sets = dataset_names(settings)
    weights = settings.set_repeats or (1.0,) * len(sets)
    if len(weights) != len(sets) or min(weights) <= 0:
        raise Refused(
            f"data.set_repeats has {len(weights)} numbers for the {len(sets)} sets of data.train; "
            "give one above 0 for each."
        )
    parts = [
        (_source(replace(settings, train=one)), weight) for one, weight in zip(sets, weights, strict=True)
    ]
    found = folder.concatenate(parts) if len(parts) > 1 else _repeated(*parts[0])
    return replace(found, samples=expand_captions(found.samples, _caption_options(settings)))


def collection_of(recipe: Recipe) -> Collection:
    """The samples of a recipe; those of a model of classes are captioned with their classes.

    Raises:
        Refused: as `collect`, or samples without a class.
    """
    data = recipe.data
    if data.random_masks and data.frames:
        raise Refused("data.random_masks draws masks of pictures, not of clips. Leave it out.")
    if data.random_masks:
        found = _collection_of(replace(recipe, data=replace(data, random_masks=0)))
        return replace(
            found, samples=condition_images.with_random_masks(found.samples, data.random_masks, recipe.seed)
        )
    return _collection_of(recipe)


def _collection_of(recipe: Recipe) -> Collection:
    """The samples as they are, or with the names of their classes."""
    data = recipe.data
    if recipe.model.base != "scratch" or recipe.model.text_encoder != "labels":
        return collect(data)
    if len(dataset_names(data)) > 1:
        raise Refused(
            'model.text_encoder = "labels" takes one set: the classes of several are numbered apart. Put '
            "them into one folder, or let captions guide."
        )
    found = collect(replace(data, captions="none") if data.captions == "files" else data)
    lacking = next((one for one in found.samples if one.label is None), None)
    if lacking is not None:
        raise Refused(
            f'{lacking.name} has no class, but model.text_encoder is "labels". Classes come from a column '
            'label or class, or with data.captions = "folder" from the names of folders.'
        )
    samples = [replace(one, captions=(class_name(found, one.label or 0),)) for one in found.samples]
    return replace(found, samples=samples)


def class_names(found: Collection) -> list[str]:
    """Of the classes 0, 1, …, in small letters; their numbers where nobody named them."""
    count = 1 + max((one.label or 0 for one in found.samples), default=0)
    return [class_name(found, index).lower() for index in range(max(count, len(found.classes)))]


def class_name(found: Collection, label: int) -> str:
    """What a class is called."""
    return found.classes[label] if label < len(found.classes) else str(label)


def dataset_names(settings: DataSettings) -> tuple[str, ...]:
    """The data sets a recipe names."""
    return (settings.train,) if isinstance(settings.train, str) else settings.train


def _repeated(found: Collection, weight: float) -> Collection:
    samples = [replace(one, repeat=one.repeat * weight) for one in found.samples] if weight != 1 else None
    return replace(found, samples=samples or found.samples)


def _caption_options(settings: DataSettings) -> CaptionOptions:
    return CaptionOptions(
        settings.template,
        settings.trigger_words,
        settings.tag_shuffles,
        settings.keep_tags,
        settings.tag_separator,
    )


def _source(settings: DataSettings) -> Collection:
    assert isinstance(settings.train, str)
    if is_user_code(settings.train):
        found = user_dataset.collection(
            settings.train, control_training.columns(settings), captioned=settings.captions != "none"
        )
        return replace(found, samples=folder.split_held_out(found.samples, settings.held_out))
    if settings.train in ("shapes-alone", "shapes-reference", "shapes-edit"):
        from sfumato.data.sources import guided_shapes

        made = {"alone": guided_shapes.lone, "reference": guided_shapes.reference, "edit": guided_shapes.edit}
        return made[settings.train.removeprefix("shapes-")](size=settings.resolution)
    if settings.train == "shapes":
        from sfumato.data.sources import shapes

        return shapes.collection(size=settings.resolution)
    if settings.train == "moving-shapes":
        from sfumato.data.sources import moving_shapes

        if not settings.frames:
            raise Refused(
                f'The set "moving-shapes" holds clips: set data.frames = {moving_shapes.FRAMES}, '
                'or take "shapes".'
            )
        return moving_shapes.collection(size=settings.resolution)
    if settings.train in EMBEDDED:
        from sfumato.data.sources import openmoji

        return openmoji.collection(every=settings.train == "openmoji-all", size=settings.resolution)
    if hub_dataset.is_hub_dataset(settings.train):
        of_hub = hub_dataset.parse(settings.train)
        found = folder.open_collection(
            hub_dataset.fetch(of_hub),
            captions=settings.captions,
            held_out=settings.held_out,
            companions=control_training.columns(settings),
            image=of_hub.image,
            caption=of_hub.caption,
        )
        return replace(found, name=of_hub.repo.name.replace("/", "--"))
    return folder.open_collection(
        settings.train,
        captions=settings.captions,
        held_out=settings.held_out,
        companions=control_training.columns(settings),
    )


def map_samples(work: Callable[[Sample], T], samples: Sequence[Sample]) -> list[T]:
    """`work` of every sample, by two threads; when it is interrupted, what was only planned is dropped."""
    pool = ThreadPoolExecutor(2)
    try:
        return list(pool.map(work, samples))
    finally:
        pool.shutdown(cancel_futures=True)


def known_sizes(samples: Sequence[Sample], moving: bool = False) -> list[Bucket]:
    """(width, height) of every picture (if `moving`, also of every video) that can be opened."""

    def size(sample: Sample) -> Bucket | None:
        try:
            if moving and sample.name.lower().endswith(media.CLIPS):
                return clips.video_info(sample.name, sample.source()).size
            return media.size_of(sample.source())
        except (media.Unreadable, OSError):
            return None

    return [found for found in map_samples(size, samples) if found is not None]


class PicturesInMemory:
    """Pictures or clips in memory, each fitted to its bucket; what training a codec reads.

    Those that cannot be read are left out; encoding names them. `how` says how clips are cut.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        bucket_of: Bucket | Callable[[Bucket], Bucket],
        how: EncodingOptions | None = None,
    ) -> None:
        if how is not None and how.frames:
            decoded = map_samples(lambda sample: _clip(sample, bucket_of, how), samples)
        else:
            decoded = map_samples(lambda sample: _decoded(sample, bucket_of), samples)
        kept = [
            (sample, picture) for sample, picture in zip(samples, decoded, strict=True) if picture is not None
        ]
        if not kept:
            raise Refused("None of the pictures can be read. Look at them with: sfumato data DIR")
        self.ids = [sample.id for sample, _ in kept]
        self.names = [sample.name for sample, _ in kept]
        self.pictures = [picture for _, picture in kept]
        self.buckets = [tuple(picture.shape) for picture in self.pictures]

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Pictures or clips of one bucket, uint8 [b, 3, (F,) H, W]."""
        return torch.stack([self.pictures[index] for index in indices])


def _decoded(sample: Sample, bucket_of: Bucket | Callable[[Bucket], Bucket]) -> Tensor | None:
    try:
        image = media.read_picture(sample.source())
    except (media.Unreadable, OSError):
        return None
    width, height = bucket_of(image.size) if callable(bucket_of) else bucket_of
    return media.center_crop_resize(image, width, height)


def _clip(
    sample: Sample, bucket_of: Bucket | Callable[[Bucket], Bucket], how: EncodingOptions
) -> Tensor | None:
    task = views.plan_task(sample, bucket_of, how)
    pieces = views.decode(task) if isinstance(task, views.EncodingTask) else ""
    return None if isinstance(pieces, str) else pieces[len(pieces) // 2]


def fitting_in_memory(
    samples: Sequence[Sample], bucket_of: Bucket | Callable[[Bucket], Bucket], frames: int = 1
) -> Sequence[Sample]:
    """As many of the samples, evenly spread, as fit into memory when decoded."""
    width, height = bucket_of((512, 512)) if callable(bucket_of) else bucket_of
    most = max(1, MOST_BYTES // (3 * width * height * max(1, frames)))
    return samples if len(samples) <= most else [samples[i * len(samples) // most] for i in range(most)]
