"""A streamed set encodes pictures whenever they are shown and keeps none of it: for what no disk could hold.

It is read exactly as an encoded set is; captions, which are small, are kept. Which pictures are encoded
together follows from what is asked, so a run that was stopped goes on with the same numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato.data.encoding import views
from sfumato.data.encoding.encoded_dataset import EncodedDataset
from sfumato.data.encoding.views import EncodingOptions, EncodingTask
from sfumato.data.store import formats, shard
from sfumato.data.store.index import EntryLocation
from sfumato.errors import Failed
from sfumato.readers.media import to_pixels

Encoder = Callable[[Tensor], Tensor | Mapping[str, Tensor]]


@dataclass(frozen=True)
class LazyEntry(EntryLocation):
    """A place that is nowhere yet: view number `view` of a task, encoded when it is asked for."""

    task: EncodingTask | None = None
    view: int = 0


@dataclass
class StreamingDataset(EncodedDataset):
    """Samples that are encoded on the way to the training batch.

    encoders: by companion, "" for the pictures themselves; say: told of a picture that turned out broken.
    """

    options: EncodingOptions = field(default_factory=lambda: EncodingOptions(""))
    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    say: Callable[[str], None] = lambda sentence: None

    def _tensors(self, locations: list[EntryLocation], only: tuple[str, ...] = ()) -> dict[str, Tensor]:
        return formats.dequantize(self.encoded(locations, only))

    def encoded(self, locations: list[EntryLocation], only: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """These views, encoded together now: stacked by name, as a store would keep them.

        Raises:
            Failed: none of the pictures can be read any more.
        """
        wanted = [location for location in locations if isinstance(location, LazyEntry)]
        tasks = [location.task for location in wanted if location.task is not None]
        if any(location.fields != wanted[0].fields for location in wanted):
            raise ValueError(
                "the samples of a batch have latents of different shapes; take them from one bucket"
            )
        with ThreadPoolExecutor(max(1, self.options.threads)) as pool:
            decoded = list(pool.map(views.decode, tasks))
        sound = next((pieces for pieces in decoded if not isinstance(pieces, str)), None)
        for task, pieces in zip(tasks, decoded, strict=True):
            if isinstance(pieces, str):
                self.say(f"{task.sample.name} could not be shown, another stands in: {pieces}")
        if sound is None:
            raise Failed(f"No picture of a batch can be read any more: {tasks[0].sample.name}: {decoded[0]}")
        shown = [
            views.select_view(sound if isinstance(pieces, str) else pieces, location.view, self.options.flip)
            for location, pieces in zip(wanted, decoded, strict=True)
        ]
        named = run_encoder(self.encoders[tasks[0].companion], torch.stack(shown))
        stored = formats.quantize(named, self.options.pixels_format)
        return {name: x for name, x in stored.items() if not only or name.removesuffix(formats.SCALE) in only}


def run_encoder(encode: Encoder, pictures: Tensor) -> dict[str, Tensor]:
    """What an encoder says of pictures [B, 3, …] uint8: named tensors [B, …]."""
    with torch.no_grad():
        answer = encode(to_pixels(pictures))
    named = {"latents": answer} if isinstance(answer, Tensor) else dict(answer)
    return {name: tensor.detach().cpu() for name, tensor in named.items()}


def lazy_entries(
    tasks: Sequence[EncodingTask], options: EncodingOptions, encoders: Mapping[str, Encoder]
) -> tuple[dict[str, LazyEntry], dict[tuple[str, ...], str]]:
    """(places by key, reasons by the keys of tasks that cannot be shown); one sample a bucket is encoded.

    Raises:
        Failed: a whole bucket cannot be read.
    """
    layouts: dict[tuple[object, ...], tuple[shard.Field, ...]] = {}
    locations: dict[str, LazyEntry] = {}
    failed: dict[tuple[str, ...], str] = {}
    for task in tasks:
        kind = (task.companion, task.bucket)
        if kind not in layouts:
            pieces = views.decode(task)
            if isinstance(pieces, str):
                failed[task.keys] = pieces
                continue
            named = run_encoder(encoders[task.companion], views.select_view(pieces, 0, options.flip)[None])
            own = {name: tensor[0] for name, tensor in named.items()}
            layouts[kind] = shard.fields_of(formats.quantize(own, options.pixels_format))
        fields = layouts[kind]
        length = sum(one.length for one in fields)
        for view, one in enumerate(task.keys):
            locations[one] = LazyEntry("", 0, length, fields, task, view)
    return locations, failed
