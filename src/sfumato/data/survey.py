"""A survey opens every picture once and notes what a report or a bucket plan wants to know of it."""

import base64
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from PIL import Image

from sfumato.data.sources.sample import Sample, SetAside
from sfumato.readers import clips, media

SIDE = 8  # pictures are compared as SIDE × SIDE × 3 numbers
NEAR = (
    0.022  # root mean square difference of those numbers, of 1, below which two pictures are near duplicates
)
THUMBNAIL = 112
MOST_COMPARED = 30_000
MOST_PAIRS = 10_000


@dataclass(frozen=True)
class ImageInfo:
    """What one picture is like: size in pixels, hash of its content, descriptor [192] in [0, 1]."""

    sample: Sample
    size: tuple[int, int]
    content: str
    descriptor: np.ndarray = field(repr=False, compare=False)
    thumbnail: str = field(default="", repr=False)
    clip: clips.VideoInfo | None = None


def inspect_images(
    samples: Sequence[Sample], thumbnails: set[int], progress: Callable[[int, int, str], None]
) -> tuple[list[ImageInfo], list[SetAside]]:
    """Open every picture; those numbered in `thumbnails` also give a small WebP for the contact sheet.

    Returns:
        What was seen, and the pictures that cannot be read, with reasons.
    """

    def one(numbered: tuple[int, Sample]) -> ImageInfo | SetAside:
        number, sample = numbered
        try:
            content, source = sample.content_hash(), sample.source()
            clip = clips.video_info(sample.name, source) if clips.is_clip(sample.name, source) else None
            video = clip is not None and sample.name.lower().endswith(media.CLIPS)
            picture = media.read_picture(clips.middle_frame(source, clip) if clip and video else source)
        except (media.Unreadable, OSError) as problem:
            return SetAside(sample.name, str(problem))
        small = (
            np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0), np.float32) / 255
        )
        shown = _thumbnail(picture) if number in thumbnails else ""
        return ImageInfo(sample, picture.size, content, small.reshape(-1), shown, clip)

    images: list[ImageInfo] = []
    broken: list[SetAside] = []
    with ThreadPoolExecutor(2) as pool:
        for done, found in enumerate(pool.map(one, enumerate(samples), chunksize=1)):
            if isinstance(found, ImageInfo):
                images.append(found)
            else:
                broken.append(found)
            progress(done + 1, len(samples), "looking")
    return images, broken


def _thumbnail(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=72)
    return base64.b64encode(buffer.getvalue()).decode()


def thumbnail_of(one: ImageInfo) -> str:
    """The thumbnail of a picture that was looked at before."""
    if one.thumbnail:
        return one.thumbnail
    source = one.sample.source()
    is_video = one.clip is not None and one.sample.name.lower().endswith(media.CLIPS)
    return _thumbnail(
        media.read_picture(clips.middle_frame(source, one.clip) if one.clip and is_video else source)
    )


def equal_groups(images: Sequence[ImageInfo]) -> list[list[str]]:
    """Names of pictures whose bytes are the same."""
    by_content: dict[str, list[str]] = {}
    for one in images:
        by_content.setdefault(one.content, []).append(one.sample.name)
    return [names for names in by_content.values() if len(names) > 1]


def near_pairs(images: Sequence[ImageInfo]) -> list[tuple[int, int, float]]:
    """(i, j, difference) of pictures that look alike though their bytes differ, the likest first.

    At most MOST_PAIRS. All pairs are compared; of more than MOST_COMPARED pictures, so many, evenly spread.
    """
    step = max(1, -(-len(images) // MOST_COMPARED))
    chosen = range(0, len(images), step)
    if len(chosen) < 2:
        return []
    table = np.stack([images[i].descriptor for i in chosen])
    squares = np.square(table).sum(1)
    limit = NEAR**2 * table.shape[1]
    found: list[tuple[int, int, float]] = []
    for at in range(0, len(table), 1024):
        block = table[at : at + 1024]
        apart = squares[at : at + 1024, None] + squares[None, at:] - 2 * block @ table[at:].T
        rows, columns = np.nonzero(np.triu(apart < limit, 1))
        for row, column in zip((rows + at).tolist(), (columns + at).tolist(), strict=True):
            i, j = chosen[row], chosen[column]
            if images[i].content != images[j].content:
                difference = float(np.square(images[i].descriptor - images[j].descriptor).mean()) ** 0.5
                found.append((i, j, difference))
            if len(found) >= MOST_PAIRS:
                return sorted(found, key=lambda pair: pair[2])
    return sorted(found, key=lambda pair: pair[2])


def leaks(images: Sequence[ImageInfo], near: Sequence[tuple[int, int, float]]) -> list[tuple[str, str, str]]:
    """(train name, held-out name, why) of samples that stand on both sides of the split."""
    found = []
    by_content: dict[str, list[ImageInfo]] = {}
    for one in images:
        by_content.setdefault(one.content, []).append(one)
    for group in by_content.values():
        found += [_sides(a, b, "equal pictures") for a, b in combinations(group[:20], 2) if _crosses(a, b)]
    found += [
        _sides(images[i], images[j], "near duplicates") for i, j, _ in near if _crosses(images[i], images[j])
    ]
    return found


def _crosses(a: ImageInfo, b: ImageInfo) -> bool:
    return a.sample.split != b.sample.split


def _sides(a: ImageInfo, b: ImageInfo, why: str) -> tuple[str, str, str]:
    first, second = (a, b) if a.sample.split == "train" else (b, a)
    return first.sample.name, second.sample.name, why


def evenly_spaced(count: int, wanted: int) -> set[int]:
    """`wanted` numbers below `count`, evenly spread."""
    return set(range(count)) if count <= wanted else {i * count // wanted for i in range(wanted)}
