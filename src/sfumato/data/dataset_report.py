"""The report of a data set: what is in it, before anyone trains on it, as plain numbers and thumbnails."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from sfumato.data import buckets, survey
from sfumato.data.sources.captions import truncated
from sfumato.data.sources.sample import HELD_OUT, TRAIN, Collection
from sfumato.errors import printable
from sfumato.readers.clips import is_short

PAIRS = 12  # equal or similar pictures that are shown
SHOWN = 240  # pictures on the contact sheets
_STOP = """
a an the of in on at and or with to for is are by from its it this that as be you your our if can
"""
STOP = frozenset(_STOP.split())
FRAMES = (9, 16, 17, 24, 25, 33, 49, 81, 121)  # what models usually take
TOKENS = (4, 8, 16, 32, 48, 64, 77, 128, 256, 512)
ASPECTS = (0.25, 0.4, 0.55, 0.7, 0.85, 1.18, 1.43, 1.82, 2.5, 4)
MEGAPIXELS = (0.01, 0.03, 0.1, 0.26, 0.5, 1, 2, 4, 8, 16)
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True)
class Thumbnail:
    """A picture of a contact sheet: WebP in base64, its caption, shares of width and height cut off."""

    thumbnail: str
    caption: str
    cut_wide: float = 0.0
    cut_high: float = 0.0


@dataclass(frozen=True)
class DatasetReport:
    """What was found; `summary` is plain JSON.

    sheets: for each bucket some of its pictures; twins: (thumbnail, name) of some that are alike.
    """

    summary: dict[str, Any]
    sheets: list[tuple[str, list[Thumbnail]]] = field(default_factory=list)
    twins: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)


def report(
    collection: Collection,
    resolution: int = 256,
    stride: int = 16,
    count: int = 5,
    progress: Callable[[int, int, str], None] | None = None,
    tokens: Callable[[list[str]], list[int]] | None = None,
    most_tokens: int = 77,
    frames: int = 16,
    fps: float = 8.0,
) -> DatasetReport:
    """Open every picture of a collection and describe what is there.

    Args:
        resolution, stride, count: of the bucket plan that is shown.
        progress: called with (done, total, phase).
        tokens: lengths of captions by the model's own tokenizer; those above most_tokens are listed.
        frames, fps: what a clip must have, to name those that would be dropped.
    """
    tell = progress or (lambda done, total, phase: None)
    shown = survey.evenly_spaced(len(collection.samples), SHOWN)
    images, broken = survey.inspect_images(collection.samples, shown, tell)
    set_aside = [*collection.set_aside, *broken]
    sizes = [one.size for one in images]
    near = survey.near_pairs(images)
    plan = buckets.choose(sizes, resolution, stride, count)
    captions = [caption for one in images for caption in one.sample.captions if caption]
    summary = {
        "name": collection.name,
        "samples": len(images),
        "captions": len(captions),
        "train": sum(one.sample.split == TRAIN for one in images),
        "held_out": sum(one.sample.split == HELD_OUT for one in images),
        "sizes": {f"{w}x{h}": n for (w, h), n in sorted(Counter(sizes).items(), key=lambda item: -item[1])},
        "caption_statistics": _captions(captions),
        "tokens": _tokens(captions, tokens, most_tokens),
        "truncated": truncated(sorted(set(captions)), tokens, most_tokens) if tokens else [],
        "classes": collection.classes,
        "labels": _labels(images, collection.classes),
        "companions": dict(Counter(name for one in images for name in one.sample.companions)),
        "kinds": dict(Counter(_kind(one.sample.name) for one in images).most_common()),
        "aspect": _histogram([w / h for w, h in sizes], ASPECTS),
        "megapixels": _histogram([w * h / 1e6 for w, h in sizes], MEGAPIXELS),
        "clips": _clips(images, frames, fps),
        "bucket_plan": {
            "resolution": resolution,
            "stride": stride,
            **_fitted(sizes, plan, resolution, stride),
        },
        "equal_pictures": [[printable(name) for name in names] for names in survey.equal_groups(images)],
        "near_duplicates": [
            [printable(images[i].sample.name), printable(images[j].sample.name), round(apart, 4)]
            for i, j, apart in near[:200]
        ],
        "near_duplicate_pairs": len(near),
        "leaks": [[printable(a), printable(b), why] for a, b, why in survey.leaks(images, near)],
        "set_aside": [{"file": printable(one.file), "reason": one.reason} for one in set_aside],
    }
    return DatasetReport(summary, _sheets(images, plan), _twins(images, near))


def _fitted(
    sizes: Sequence[tuple[int, int]], plan: buckets.Buckets, resolution: int, stride: int
) -> dict[str, Any]:
    """The shapes of a plan, and what they cut off and enlarge beside one square."""
    return {
        "buckets": plan.describe(sizes),
        "cropped": plan.waste(sizes),
        "cropped_by_one_square": buckets.choose(sizes, resolution, stride, 1).waste(sizes),
        "enlarged": buckets.mean([buckets.is_enlarged(size, plan(size)) for size in sizes]),
    }


def _kind(name: str) -> str:
    """What kind of file a name ends in: "png"; "drawn" where it ends in nothing."""
    return PurePosixPath(name).suffix.lower().lstrip(".") or "drawn"


def _labels(images: Sequence[survey.ImageInfo], classes: Sequence[str]) -> list[list[Any]]:
    """[class, pictures] of those that have a class, the largest first."""
    counted = Counter(one.sample.label for one in images if one.sample.label is not None)
    return [
        [classes[label] if 0 <= label < len(classes) else str(label), number]
        for label, number in counted.most_common()
    ]


def _twins(
    images: Sequence[survey.ImageInfo], near: Sequence[tuple[int, int, float]]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Some of the pictures that are equal or look alike, to be shown side by side."""
    by_name = {one.sample.name: one for one in images}
    groups = [(names[:2], f"{len(names)} equal pictures") for names in survey.equal_groups(images)]
    groups += [
        ([images[i].sample.name, images[j].sample.name], f"alike, {apart:.1%} apart") for i, j, apart in near
    ]
    shown = []
    for names, why in groups[:PAIRS]:
        pair = [by_name[name] for name in names]
        across = " · across the split" if len({one.sample.split for one in pair}) > 1 else ""
        shown.append((why + across, [(survey.thumbnail_of(one), printable(one.sample.name)) for one in pair]))
    return shown


def _clips(images: Sequence[survey.ImageInfo], frames: int, fps: float) -> dict[str, Any] | None:
    """How long the clips are, their rates, and which are too short; None where there are none."""
    named = [(one.sample.name, one.clip) for one in images if one.clip is not None]
    if not named:
        return None
    found = [clip for _, clip in named]
    short = [
        {"file": printable(name), "reason": f"{clip.seconds:.2f} s, {frames / fps:.2f} s are needed"}
        for name, clip in named
        if is_short(clip.seconds, frames, fps)
    ]
    fitting = {n: sum(not is_short(clip.seconds, n, fps) for clip in found) for n in FRAMES}
    return {
        "count": len(found),
        "total_seconds": round(sum(one.seconds for one in found), 2),
        "seconds": _histogram([one.seconds for one in found], (0.5, 1, 2, 3, 5, 8, 15, 30, 60, 300)),
        "rates": _histogram([one.fps for one in found], (6, 8, 10, 12, 15, 24, 25, 30, 50, 60)),
        "frames": frames,
        "rate": fps,
        "long_enough": [[str(n), number] for n, number in fitting.items()],
        "dropped": short,
    }


def _tokens(
    captions: Sequence[str], tokens: Callable[[list[str]], list[int]] | None, most: int
) -> dict[str, Any] | None:
    """Lengths of captions in tokens; None where no tokenizer was given."""
    if tokens is None or not captions:
        return None
    lengths = tokens(list(captions))
    return {
        "most": most,
        "longest": max(lengths),
        "truncated": sum(length > most for length in lengths),
        "share": round(sum(length > most for length in lengths) / len(lengths), 4),
        "lengths": _histogram(lengths, TOKENS),
    }


def _captions(captions: Sequence[str]) -> dict[str, Any]:
    """Lengths in words, most frequent words, how many captions are different."""
    lengths = [len(caption.split()) for caption in captions]
    words = Counter(
        word
        for caption in captions
        for word in set(re.findall(r"[^\W\d_][\w'’-]*", caption.lower()))
        if word not in STOP
    )
    repeated = Counter(captions).most_common(1)
    return {
        "different": len(set(captions)),
        "mean_words": round(buckets.mean(lengths), 2),
        "longest_words": max(lengths, default=0),
        "longest_letters": max(map(len, captions), default=0),
        "words": _histogram(lengths, LENGTHS),
        "frequent_words": [[word, number] for word, number in words.most_common(60)],
        "most_repeated": list(repeated[0]) if repeated and repeated[0][1] > 1 else None,
    }


def _histogram(values: Sequence[float], edges: Sequence[float]) -> list[list[Any]]:
    """[label, count] of the values up to each edge, and above the last; empty ends left out."""
    labels = [f"≤ {edge:g}" for edge in edges] + [f"> {edges[-1]:g}"]
    counts = [0] * len(labels)
    for value in values:
        counts[sum(value > edge for edge in edges)] += 1
    filled = [i for i, number in enumerate(counts) if number]
    if not filled:
        return []
    return [[labels[i], counts[i]] for i in range(filled[0], filled[-1] + 1)]


def _sheets(images: Sequence[survey.ImageInfo], plan: buckets.Buckets) -> list[tuple[str, list[Thumbnail]]]:
    sheets: dict[buckets.Size, list[Thumbnail]] = {shape: [] for shape in plan.shapes}
    for one in images:
        if one.thumbnail:
            caption = one.sample.captions[0] if one.sample.captions else ""
            shape = plan(one.size)
            wide = one.size[0] * shape[1] > one.size[1] * shape[0]
            cut = buckets.crop_waste(one.size, shape)
            sheets[shape].append(
                Thumbnail(
                    one.thumbnail, caption or printable(one.sample.name), *((cut, 0) if wide else (0, cut))
                )
            )
    return [(f"{w} × {h}", held) for (w, h), held in sheets.items() if held]
