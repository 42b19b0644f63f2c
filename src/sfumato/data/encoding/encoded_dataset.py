"""An encoded set reads training batches straight from mapped shards: no decoding, no copies but one.

Which picture variant, which caption and which draw of the posterior a sample shows is a function of
(seed, sample, epoch).
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
import xxhash
from torch import Tensor

from sfumato.data.sources.sample import TRAIN, Sample, SetAside
from sfumato.data.store import entries
from sfumato.data.store.index import EntryLocation
from sfumato.data.store.store import Store
from sfumato.theory import noise

T = TypeVar("T")
NO_LABEL = -1
NO_CAPTION = ("", "")
REMEMBERED = 4096  # captions whose tensors stay in memory


@dataclass(frozen=True)
class Item:
    """One sample in the store: where each variant of its picture and each of its captions lies."""

    sample: Sample
    pictures: tuple[EntryLocation, ...]
    captions: tuple[tuple[str, str], ...]  # (caption, its key or "")
    size: tuple[int, int] = (0, 0)  # of the picture itself; (0, 0) where nobody looked
    bucket: tuple[int, ...] = ()  # (width, height) in pixels
    companions: dict[str, tuple[EntryLocation, ...]] = field(
        default_factory=dict
    )  # one place for each variant
    null: str = ""  # key of the empty caption, where words are read beside the sample's picture

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the latents."""
        return next(one.shape for one in self.pictures[0].fields if one.name in ("latents", "mean"))

    @cached_property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """Height, width of the file's picture; top, left of the cut after scaling; height, width of the cut.

        What SDXL is told (arXiv:2307.01952, section 2.2). An unknown size counts as the cut's own.
        """
        width, height = self.bucket[:2]
        full_width, full_height = self.size if self.size[0] else (width, height)
        scale = max(width / full_width, height / full_height)
        top, left = round((full_height * scale - height) / 2), round((full_width * scale - width) / 2)
        return full_height, full_width, top, left, height, width


@dataclass
class Batch:
    """What one step trains on.

    ids: of the samples, 63 bits. latents [B, C, H, W] float32. conditions: tensors of each, not padded.
    companions: encodings of control pictures and the like by name, [B, …], cut and mirrored as the pictures
    are ("reference.tokens" where an encoder names its tensors); each sample's are in its conditions too,
    beside those of its caption. items: the samples themselves.
    """

    ids: list[int]
    latents: Tensor
    conditions: list[dict[str, Tensor]]
    captions: list[str]
    items: list[Item]
    companions: dict[str, Tensor] = field(default_factory=dict)

    @property
    def time_ids(self) -> Tensor:
        """How each picture was cut from its file [B, 6], see `Item.time_ids`."""
        return torch.tensor([item.time_ids for item in self.items])

    @property
    def labels(self) -> Tensor:
        """The numbers of their classes [B], NO_LABEL where a sample has none."""
        labels = [item.sample.label for item in self.items]
        return torch.tensor([NO_LABEL if one is None else one for one in labels])


@dataclass
class EncodedDataset:
    """Samples whose encodings are in the store; reads batches of them.

    null holds the tensors of the empty caption; set_aside the files that could not be encoded; counts and
    notes say what `encode_to_store` did. labels: conditions say the class too, as `labels`.
    samples_posterior: show a new draw of the codec's posterior every epoch, not its mode. adds_time_ids:
    conditions say how each picture was cut, as `time_ids` [6] (`Item.time_ids`). text_locations: where the
    captions' encodings lie, by key.
    """

    store: Store
    items: list[Item]
    null: dict[str, Tensor] = field(default_factory=dict)
    set_aside: list[SetAside] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    labels: bool = False
    samples_posterior: bool = True
    caption_dropout: float = 0.0
    """Share shown without their caption, where words are read beside a picture and the empty one too."""
    adds_time_ids: bool = False
    text_locations: dict[str, EntryLocation] = field(default_factory=dict, repr=False)
    pixels: str = ""
    """Fingerprint of all pictures' files, companions' too; of streamed ones, of their lengths."""

    def __post_init__(self) -> None:
        self.ids = [item.sample.id for item in self.items]
        self.names = [item.sample.name for item in self.items]
        self.captions = [item.captions[0][0] if item.captions else "" for item in self.items]
        self.splits = [item.sample.split for item in self.items]
        self.buckets = [item.shape for item in self.items]
        self.repeats = [item.sample.repeat for item in self.items]
        self._one_view = all(len(item.pictures) <= 1 for item in self.items)
        self._one_caption = all(len(item.captions) <= 1 for item in self.items)
        bare = not any(item.companions or item.null for item in self.items)
        self._plain = self._one_view and self._one_caption and bare
        self._texts: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.items)

    @property
    def fields_to_read(self) -> tuple[str, ...]:
        """The tensors of a picture that are read, all if empty."""
        return () if self.samples_posterior else ("latents", "mean")

    def with_split(self, split: str) -> "EncodedDataset":
        """The part with that split, "train" or "held_out"."""
        return replace(self, items=[item for item in self.items if item.sample.split == split])

    @classmethod
    def concatenate(cls, parts: Sequence["EncodedDataset"]) -> "EncodedDataset":
        """The samples of all parts, one part after the other; everything else as in the last."""
        return replace(parts[-1], items=[item for part in parts for item in part.items])

    def read(self, indices: Sequence[int], seed: int = 0, epoch: int = 0) -> Batch:
        """The batch of these samples, which must be of one bucket.

        Raises:
            ValueError: they are of different shapes.
        """
        if len(indices) == 1 and self._plain and not (self.labels or self.adds_time_ids):
            return self._alone(indices[0], seed, epoch)
        items = [self.items[i] for i in indices]
        ids = [self.ids[i] for i in indices]
        chosen = [item.captions[0] if item.captions else NO_CAPTION for item in items]
        if not self._one_caption:
            some = _choose([item.captions for item in items], ids, seed, epoch, "caption")
            chosen = [one or NO_CAPTION for one in some]
        keys = [
            item.null if self._drops(item, sample, seed, epoch) else key
            for item, sample, (_, key) in zip(items, ids, chosen, strict=True)
        ]
        conditions = [self.condition(key) if key else {} for key in keys]
        locations = self.locations_of(indices, seed, epoch)
        latents = self._latents(locations.pop(""), ids, seed, epoch)
        companions: dict[str, Tensor] = {}
        for name, some in locations.items():
            tensors = self._tensors(some)
            companions |= {name if one == "latents" else f"{name}.{one}": x for one, x in tensors.items()}
        if companions:
            conditions = [
                {**own, **{name: tensor[row] for name, tensor in companions.items()}}
                for row, own in enumerate(conditions)
            ]
        batch = Batch(ids, latents, conditions, [words for words, _ in chosen], items, companions)
        for name, values in (
            ("labels", batch.labels if self.labels else None),
            ("time_ids", batch.time_ids.float() if self.adds_time_ids else None),
        ):
            if values is not None:
                pairs = zip(batch.conditions, values, strict=True)
                batch.conditions = [{**own, name: row} for own, row in pairs]
        return batch

    def _alone(self, index: int, seed: int, epoch: int) -> Batch:
        """One sample where samples have one view, one caption and nothing beside: the same, sooner."""
        item, ids = self.items[index], [self.ids[index]]
        words, key = item.captions[0] if item.captions else NO_CAPTION
        latents = self._latents([item.pictures[0]], ids, seed, epoch)
        return Batch(ids, latents, [self.condition(key) if key else {}], [words], [item])

    def _drops(self, item: Item, sample: int, seed: int, epoch: int) -> bool:
        """Whether an epoch shows the sample without its caption, where that is decided here."""
        if not item.null or not self.caption_dropout or item.sample.split != TRAIN:
            return False
        drawn = xxhash.xxh3_64_intdigest(f"{seed} {sample} {epoch} dropped".encode())
        return drawn < self.caption_dropout * 2**64

    def locations_of(self, indices: Sequence[int], seed: int, epoch: int) -> dict[str, list[EntryLocation]]:
        """Where the views lie that these samples show: of their pictures (""), and of each companion."""
        items = [self.items[i] for i in indices]
        if self._one_view and not items[0].companions:
            return {"": [item.pictures[0] for item in items]}
        ids = [self.ids[i] for i in indices]
        chosen = _choose([range(len(item.pictures)) for item in items], ids, seed, epoch, "variant")
        views = [view or 0 for view in chosen]
        pictures = [item.pictures[view] for item, view in zip(items, views, strict=True)]
        others = {
            name: [_turn(item.companions[name], view) for item, view in zip(items, views, strict=True)]
            for name in items[0].companions
        }
        return {"": pictures, **others}

    def _latents(self, locations: list[EntryLocation], ids: list[int], seed: int, epoch: int) -> Tensor:
        tensors = self._tensors(locations, self.fields_to_read)
        if len(tensors) == 1:
            return next(iter(tensors.values()))
        shape = tuple(tensors["mean"].shape[1:])
        return tensors["mean"] + tensors["std"] * noise.normal(shape, seed, ids, epoch, "posterior")

    def _tensors(self, locations: list[EntryLocation], only: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """The entries at these places, stacked by name: all their tensors, or `only` some."""
        return entries.read_batch(self.store, locations, only)

    def condition(self, key: str) -> dict[str, Tensor]:
        """The tensors of a caption's encoding; do not write into them."""
        found = self._texts.get(key)
        if found is None:
            location = self.text_locations.get(key) or self.store.locations("text", [key])[0]
            if location is None:
                raise KeyError(f"text/{key} is not in the store {self.store.root}")
            found = entries.read_one(self.store, location)
            if found is None:
                found = {name: one[0] for name, one in entries.read_batch(self.store, [location]).items()}
            self._texts[key] = found
            if len(self._texts) > REMEMBERED:
                self._texts.popitem(last=False)
        return found


def _choose(
    options: Sequence[Sequence[T]], ids: list[int], seed: int, epoch: int, purpose: str
) -> list[T | None]:
    """One of each sample's options."""
    if all(len(some) <= 1 for some in options):
        return [some[0] if some else None for some in options]
    return [
        some[xxhash.xxh3_64_intdigest(f"{seed} {one} {epoch} {purpose}".encode()) % len(some)]
        if some
        else None
        for some, one in zip(options, ids, strict=True)
    ]


def _turn(locations: tuple[EntryLocation, ...], view: int) -> EntryLocation:
    """A companion's variant for a picture's: a still beside a clip of many pieces has the same for each."""
    return locations[view % len(locations)]
