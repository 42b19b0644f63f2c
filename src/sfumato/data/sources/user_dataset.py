"""A data set of one's own: `data.train = "file.py:name"`, anything with a length whose items are mappings.

Items are looked at once for their words; pictures are asked for again when they are encoded, several at a
time. A picture that is encoded already is not encoded again; it is known by its bytes or pixels, or, where
the data set says its `fingerprint`, by that and the item's name, which spares the asking.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from sfumato.data.sources.sample import Collection, Picture, Sample
from sfumato.errors import Refused
from sfumato.user_code import describe_error, load_user_object

FIELDS = ("picture", "caption", "name", "label", "split")
CONTRACT = (
    "A data set has len() and data[i] for i = 0, 1, …; an item is a mapping with `picture` (a path, a PIL "
    "image, uint8 [H, W, 3], or a function that gives one), `caption` (a text or several), and, as it likes, "
    "`name`, `label` (a number), `split` (train or held_out), further pictures by the names of "
    "data.condition_columns, and texts for data.template."
)


@dataclass(frozen=True)
class LazyPicture:
    """The picture of an item, asked for when it is wanted."""

    word: str
    items: Any
    index: int
    field: str

    def __call__(self) -> Image.Image | bytes:
        """The picture, or the bytes of its file."""
        return as_picture(item_of(self.word, self.items, self.index)[self.field], self.word, self.index)


def collection(word: str, companions: Sequence[str] = (), captioned: bool = True) -> Collection:
    """The samples of `file.py:name`: a data set, or what makes one when called without arguments.

    Args:
        companions: the fields that hold further pictures. captioned: whether captions are read.
    Raises:
        Refused: it is no data set, an item fails or is none, two have one name.
    """
    items: Any = load_user_object(word)
    if inspect.isclass(items) or (callable(items) and not hasattr(items, "__getitem__")):
        try:
            items = items()
        except Refused:
            raise
        except Exception as problem:
            raise Refused(f"data.train: {describe_error(word, problem)}. {CONTRACT}") from problem
    if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        raise Refused(f"data.train: {word} is a {type(items).__name__}. {CONTRACT}")
    count, own = len(cast(Any, items)), getattr(items, "fingerprint", "")
    if not count:
        raise Refused(f"data.train: {word} has no items.")
    fingerprint = str(own() if callable(own) else own)
    samples = [_sample(word, items, index, companions, captioned, fingerprint) for index in range(count)]
    names = [sample.name for sample in samples]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise Refused(f'data.train: two items of {word} have the name "{twice}". Give each its own, or none.')
    samples.sort(key=lambda sample: sample.name)
    return Collection(type(items).__name__, samples, classes=list(map(str, getattr(items, "classes", ()))))


def item_of(word: str, items: Any, index: int) -> Mapping[str, Any]:
    """The item of this number.

    Raises:
        Refused: asking for it fails, or it is none.
    """
    try:
        item = items[index]
    except Exception as problem:
        raise Refused(f"data.train: item {index} fails in {describe_error(word, problem)}") from problem
    if not isinstance(item, Mapping) or "picture" not in item:
        what = f"without `picture` (it has {', '.join(map(str, item))})" if isinstance(item, Mapping) else ""
        raise Refused(f"data.train: item {index} of {word} is a {type(item).__name__} {what}. {CONTRACT}")
    return item


def _sample(
    word: str, items: Any, index: int, companions: Sequence[str], captioned: bool, fingerprint: str
) -> Sample:
    item = item_of(word, items, index)
    picture, caption = item["picture"], item.get("caption", "") if captioned else ""
    captions = (caption,) if isinstance(caption, str) else tuple(caption) if _is_many(caption) else None
    if captions is None or not all(isinstance(text, str) for text in captions):
        raise Refused(f"data.train: the caption of item {index} of {word} is {caption!r}. {CONTRACT}")
    file = Path(picture).expanduser() if isinstance(picture, str | Path) else None
    name = str(item.get("name", f"{index:08d}{file.suffix if file else ''}"))
    split, label = item.get("split", ""), item.get("label")
    if split not in ("", "train", "held_out"):
        raise Refused(f'data.train: item {index} of {word} has the split "{split}"; say train or held_out.')
    if label is not None and int(label) < 0:
        raise Refused(f"data.train: item {index} of {word} has the label {label}; classes count from 0.")
    others: dict[str, Picture] = {
        field: Path(item[field])
        if isinstance(item[field], str | Path)
        else LazyPicture(word, items, index, field)
        for field in companions
        if field in item
    }
    extra = {
        k: str(v) for k, v in item.items() if k not in (*FIELDS, *others) and isinstance(v, str | int | float)
    }
    content = f"{fingerprint} {name}" if fingerprint and file is None else ""
    drawn = None if file is not None else LazyPicture(word, items, index, "picture")
    if drawn is not None:
        as_picture(picture, word, index, look=True)
    number = None if label is None else int(label)
    return Sample(
        name, captions or ("",), file, split, number, drawn, content, companions=others, extra=extra
    )


def _is_many(caption: Any) -> bool:
    return isinstance(caption, Iterable) and not isinstance(caption, Mapping)


def as_picture(picture: Any, word: str, index: int, look: bool = False) -> Image.Image | bytes:
    """What `media` can read of an item's picture.

    Args:
        look: only look whether it is one; a function is not called.
    Raises:
        Refused: it is none.
    """
    if callable(picture) and not isinstance(picture, Image.Image):
        return b"" if look else as_picture(picture(), word, index)
    if isinstance(picture, str | Path):
        return Path(picture).expanduser().read_bytes()
    if isinstance(picture, Image.Image | bytes):
        return picture
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise Refused(
            f"data.train: the picture of item {index} of {word} is a {type(picture).__name__} of "
            f"{array.dtype} {list(array.shape)}. {CONTRACT}"
        )
    return Image.fromarray(array)
