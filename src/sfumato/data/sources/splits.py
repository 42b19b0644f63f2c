"""Splits: which part of a data set a sample belongs to, from its path; one place for every kind of source.

A folder called train, validation, test or the like says so for all that lies in it, whatever folders lie
around or below; the name of a shard (val-000.tar, test.npz, data/validation-00000.parquet) likewise.
"""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from sfumato.data.sources.sample import HELD_OUT, TRAIN

SPLITS = {
    "train": TRAIN,
    "training": TRAIN,
    "test": HELD_OUT,
    "held_out": HELD_OUT,
    "held-out": HELD_OUT,
    "heldout": HELD_OUT,
    "validation": HELD_OUT,
    "valid": HELD_OUT,
    "val": HELD_OUT,
    "dev": HELD_OUT,
    "testing": HELD_OUT,
    "eval": HELD_OUT,
    "evaluation": HELD_OUT,
}
"""What a column `split`, a folder or a shard may be called, and what that means here."""
SHARDS = (".tar", ".npz", ".parquet", ".arrow")
BESIDE = {
    "data", "dataset", "set", "split", "images", "image", "imgs", "img", "pictures", "photos", "files",
    "videos", "clips", "x", "px",
}  # fmt: skip
"""Words that a folder's name may have beside its split: val2017, train-images, valid_64x64."""


def folder_split(name: str) -> str:
    """The split a folder's name says, "" for none: "val2017", "train-images", but not "test tube"."""
    words = [word for word in _words(name) if word not in BESIDE]
    return SPLITS.get(words[0], "") if len(words) == 1 else ""


def shard_split(name: str) -> str:
    """The split the name of an archive or table says, "" for none: "val-000.tar", "birds_test_1.npz"."""
    return next((SPLITS[word] for word in _words(PurePosixPath(name).stem) if word in SPLITS), "")


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", re.sub(r"held[-_ ]?out", "heldout", name.lower()))


def splits_of(paths: Sequence[str], classes: bool = False) -> list[tuple[str, str]]:
    """(split, path without what said it) of samples by their paths in a data set; "" where a path says none.

    The outermost folder or shard that says one decides. Where folders are classes, a folder is a split only
    if all beside it are, or train and a held-out part with classes below them lie side by side: a class may
    well be called "train".
    """
    beside: dict[tuple[str, ...], set[str]] = {}
    deep: set[tuple[str, ...]] = set()
    for path in paths:
        parts = PurePosixPath(path).parts
        for depth in range(len(parts) - 1):
            beside.setdefault(parts[:depth], set()).add(parts[depth])
            if depth:
                deep.add(parts[: depth - 1])
    known = {place: {folder_split(name) for name in names} for place, names in beside.items()}

    def counts(place: tuple[str, ...]) -> bool:
        sides = known[place]
        if not classes:
            return True
        if place in deep:
            return "" not in sides or {TRAIN, HELD_OUT} <= sides
        return "" not in sides and len(beside[place]) > 1

    found = []
    for path in paths:
        parts = PurePosixPath(path).parts
        split, rest = "", path
        for depth, name in enumerate(parts):
            if name.lower().endswith(SHARDS):
                split = shard_split(name)
            elif depth < len(parts) - 1 and folder_split(name) and counts(parts[:depth]):
                split, rest = folder_split(name), str(PurePosixPath(*parts[:depth], *parts[depth + 1 :]))
            if split:
                break
        found.append((split, rest))
    return found


def by_path(paths: Sequence[str], classes: bool = False) -> list[tuple[str, str]]:
    """`splits_of`, where a part that is held out makes all others train, and train alone says nothing."""
    found = splits_of(paths, classes)
    is_told = any(split == HELD_OUT for split, _ in found)
    return [((split or TRAIN) if is_told else "", rest) for split, rest in found]
