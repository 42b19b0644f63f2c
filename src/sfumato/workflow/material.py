"""The material of a run: its samples, the sizes they are brought to, and their pictures in memory."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from ..data import media
from ..data.captions import Wording, worded
from ..data.sample import Collection, Sample
from ..data.settings import DataSettings
from ..errors import Refused
from ..recipe import EMBEDDED

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
    found = _source(settings)
    return replace(found, samples=worded(found.samples, _wording(settings)))


def _wording(settings: DataSettings) -> Wording:
    return Wording(
        settings.template, settings.trigger, settings.tag_orders, settings.tags_kept, settings.tag_separator
    )


def _source(settings: DataSettings) -> Collection:
    if settings.train == "shapes":
        from ..data import shapes

        return shapes.collection(size=settings.resolution)
    if settings.train in EMBEDDED:
        from ..data import openmoji

        return openmoji.collection(every=settings.train == "openmoji-all", size=settings.resolution)
    from ..data import sources

    return sources.open(
        settings.train,
        captions=settings.captions,
        held_out=settings.held_out,
        companions=settings.companions,
    )


def each(work: Callable[[Sample], T], samples: Sequence[Sample]) -> list[T]:
    """`work` of every sample, by two threads; when it is interrupted, what was only planned is dropped."""
    pool = ThreadPoolExecutor(2)
    try:
        return list(pool.map(work, samples))
    finally:
        pool.shutdown(cancel_futures=True)


def known_sizes(samples: Sequence[Sample]) -> list[Bucket]:
    """(width, height) of every picture that can be opened."""

    def size(sample: Sample) -> Bucket | None:
        try:
            return media.size_of(sample.source())
        except (media.Unreadable, OSError):
            return None

    return [found for found in each(size, samples) if found is not None]


class Pictures:
    """Pictures in memory, each fitted to its bucket; what training a codec reads.

    Those that cannot be read are left out; encoding names them.
    """

    def __init__(self, samples: Sequence[Sample], bucket_of: Bucket | Callable[[Bucket], Bucket]) -> None:
        decoded = each(lambda sample: _decoded(sample, bucket_of), samples)
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
        """Pictures of one bucket, uint8 [b, 3, H, W]."""
        return torch.stack([self.pictures[index] for index in indices])


def _decoded(sample: Sample, bucket_of: Bucket | Callable[[Bucket], Bucket]) -> Tensor | None:
    try:
        image = media.read_picture(sample.source())
    except (media.Unreadable, OSError):
        return None
    width, height = bucket_of(image.size) if callable(bucket_of) else bucket_of
    return media.fit(image, width, height)


def few(samples: Sequence[Sample], bucket_of: Bucket | Callable[[Bucket], Bucket]) -> Sequence[Sample]:
    """As many of the samples, evenly spread, as fit into memory when decoded."""
    width, height = bucket_of((512, 512)) if callable(bucket_of) else bucket_of
    most = max(1, MOST_BYTES // (3 * width * height))
    return samples if len(samples) <= most else [samples[i * len(samples) // most] for i in range(most)]
