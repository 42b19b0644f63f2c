"""Encoding: the frozen networks see every picture and every caption once, and the store keeps what they say.

The work is cut into chunks before it begins, in an order that depends on nothing but the samples; a chunk
becomes one shard, and batches never cross chunks. So a killed encode loses its open chunk alone, and the same
command completes the store with the very bytes an undisturbed run would have written.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby, islice
from typing import TypeVar

import torch
from torch import Tensor

from sfumato.data.encoding import streaming_dataset, views, workers
from sfumato.data.encoding.encode_plan import (
    EncodePlan,
    Progress,
    companion_reason,
    plan_encoding,
    prefetch,
    threads,
)
from sfumato.data.encoding.encoded_dataset import EncodedDataset, Item
from sfumato.data.encoding.streaming_dataset import StreamingDataset
from sfumato.data.encoding.views import Companion, EncodingOptions, EncodingTask, Size
from sfumato.data.sources.sample import Sample, SetAside
from sfumato.data.store import formats
from sfumato.data.store.index import EntryLocation
from sfumato.data.store.leases import Owner
from sfumato.data.store.store import Store
from sfumato.errors import Failed, Refused

T = TypeVar("T")
R = TypeVar("R")
Pixels = Callable[[Tensor], Tensor | Mapping[str, Tensor]]
Texts = Callable[[list[str]], list[dict[str, Tensor]]]

MEASURED = 64  # entries of which the error of a smaller number format is measured


@dataclass
class _Run:
    """What one call of `encode_to_store` has found so far."""

    store: Store
    options: EncodingOptions
    progress: Progress
    part: tuple[int, int] = (0, 1)
    set_aside: list[SetAside] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)

    def quantize(self, kind: str, tensors: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
        """The tensors as they are stored; of the first entries of a kind it is measured what that costs."""
        if form != "same" and len(costs := self.errors.setdefault(f"{kind} as {form}", [])) < MEASURED:
            costs.append(formats.quantization_error(tensors, form))
        return formats.quantize(tensors, form)

    def count(self, what: str, number: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + number

    def share(self, items: list[T]) -> list[T]:
        """Those of the chunks (or keys) that this process takes."""
        return items[self.part[0] :: self.part[1]]


def encode_to_store(
    store: Store,
    samples: Sequence[Sample],
    bucket_of: Size | Callable[[Size], Size],
    encode_pixels: Pixels,
    encode_captions: Texts | None,
    options: EncodingOptions,
    progress: Progress | None = None,
    part: tuple[int, int] = (0, 1),
    patience: float = 600.0,
    companions: Mapping[str, Companion] | None = None,
    owner: Owner | None = None,
    prompt_image: Callable[[Sample], str] | None = None,
) -> EncodedDataset:
    """Encode what the store lacks of these samples, verify what it has, and return them ready to be read.

    Args:
        bucket_of: (width, height) that pictures are fitted to: one, or a function of a picture's size.
        encode_pixels: pixels [B, 3, H, W] (clips [B, 3, F, H, W]) in [−1, 1] → latents [B, …], or a
            posterior's {"mean", "std"}.
        encode_captions: captions → one dict of tensors each; None for a model without text.
        progress: called with (done, total, phase).
        part: (rank, world) where several processes or machines fill the store; each encodes every world-th
            shard, waits for the others (while shards come, and `patience` seconds more) and takes over from
            those that died.
        companions: which further pictures of the samples ("control", "mask", …) to encode too, and how.
        prompt_image: the content of the picture that a sample's words are read beside, where they are;
            captions are then asked as `encode_plan.text_key` writes them.
        owner: the run that all this is for; while its folder exists, the entries are not collected.
    Returns:
        The set, its `set_aside` naming every sample that could not be used, its `notes` what was repaired.
    Raises:
        Refused: no sample is left. Failed: the disk is full (what was stored stays valid).
    """
    run = _Run(store, options, progress or (lambda done, total, phase: None), part)
    work = plan_encoding(
        samples, bucket_of, options, companions or {}, encode_captions is not None, run.progress, prompt_image
    )
    run.set_aside, pictures, texts = work.set_aside, work.pictures, work.texts
    encoders = {"": encode_pixels, **{name: one.encode for name, one in (companions or {}).items()}}
    owners = {one: task.sample.name for task in pictures for one in task.keys}
    if owner is not None:
        _hold(run, owner, work)
    mine = workers.begin(store.root, workers.name_of([*owners, *texts.values()]), *part)
    _repair(run, "pixels", owners if options.use_store else {})
    _repair(run, "text", {one: f'the caption "{caption}"' for caption, one in texts.items()})
    kept = pictures if options.use_store else []
    failed = _fill_pictures(run, kept, encoders)
    if encode_captions is not None:
        _fill_texts(run, texts, encode_captions)
    if part[1] > 1:
        failed = workers.wait_for_others(mine, failed, patience, run.progress)
        store.refresh()
        run.part = (0, 1)
        failed |= _fill_pictures(run, [task for task in kept if task.keys not in failed], encoders)
        if encode_captions is not None:
            _fill_texts(run, texts, encode_captions)
    if options.use_store:
        locations = dict(zip(owners, store.locations("pixels", list(owners)), strict=True))
        return _gather(run, work, locations, failed)
    return _streaming_dataset(run, work, options, encoders)


def _streaming_dataset(
    run: _Run, work: EncodePlan, options: EncodingOptions, encoders: Mapping[str, Pixels]
) -> StreamingDataset:
    """The set of a collection whose pictures are encoded when they are asked for."""
    entries, failed = streaming_dataset.lazy_entries(work.pictures, options, encoders)
    found = vars(_gather(run, work, entries, failed))
    named = {one.name: found[one.name] for one in fields(EncodedDataset)}
    return StreamingDataset(**named, options=options, encoders=encoders)


def _hold(run: _Run, owner: Owner, work: EncodePlan) -> None:
    """Keep what the owner needs from being collected, where that can be written down."""
    try:
        run.store.hold(owner, work.keys(run.options), [run.options.pixels, run.options.texts])
    except Refused as problem:
        run.notes.append(f"The store does not know that this run needs it: {problem}")


def _repair(run: _Run, kind: str, owners: Mapping[str, str]) -> None:
    """Verify the stored ones among the keys; take damaged ones out, so that they are encoded again."""
    damaged = run.store.verify(kind, run.share(sorted(owners)))
    for one in damaged:
        whose = owners.get(one.key, "all its samples")
        run.notes.append(f"damaged: {whose} in shard {kind}/{one.shard}: {one.reason}; encoded again.")
    run.count("damaged", len(damaged))
    if damaged:
        run.store.drop(kind, damaged)


def _fill_pictures(
    run: _Run, tasks: Sequence[EncodingTask], encoders: Mapping[str, Pixels]
) -> dict[tuple[str, ...], str]:
    """Encode the pictures that the store lacks, chunk by chunk; returns the reasons of those that failed."""
    options = run.options
    first = {task.keys: task for task in reversed(tasks)}  # equal pictures are encoded once
    ordered = sorted(first.values(), key=lambda task: (task.companion, task.bucket, task.keys))
    stored = run.store.has("pixels", [one for task in ordered for one in task.keys])
    chunks = [
        [task for task in chunk if not stored.issuperset(task.keys)]
        for _, members in groupby(ordered, key=lambda task: (task.companion, task.bucket))
        for chunk in _cut(list(members), options.shard)
    ]
    run.count("pictures_stored_before", len(ordered) - sum(map(len, chunks)))
    chunks = run.share(chunks)
    total = sum(map(len, chunks))
    failed: dict[tuple[str, ...], str] = {}
    done = 0
    with threads(options.threads) as pool:
        decoded = prefetch(
            pool, views.decode, (task for chunk in chunks for task in chunk), 3 * options.batch
        )
        for chunk in chunks:
            entries: dict[str, Mapping[str, Tensor]] = {}
            for group in _cut(chunk, options.batch):
                pieces = list(islice(decoded, len(group)))
                failed |= _encode_group(group, pieces, encoders[group[0].companion], run, stored, entries)
                done += len(group)
                run.progress(done, total, "pictures")
            if entries:
                run.store.commit("pixels", entries)
    run.count("pictures_encoded", total - len(failed))
    return failed


def _encode_group(
    group: Sequence[EncodingTask],
    decoded: Sequence[list[Tensor] | str],
    encode: Pixels,
    run: _Run,
    stored: Container[str],
    entries: dict[str, Mapping[str, Tensor]],
) -> dict[tuple[str, ...], str]:
    """Encode one batch into `entries`, every view not yet stored; returns why some failed."""
    options = run.options
    pairs = list(zip(group, decoded, strict=True))
    failed = {task.keys: pieces for task, pieces in pairs if isinstance(pieces, str)}
    sound = [(task, pieces) for task, pieces in pairs if not isinstance(pieces, str)]
    for view in range(len(group[0].keys)):
        wanted = [(task, pieces) for task, pieces in sound if task.keys[view] not in stored]
        if not wanted:
            continue
        with torch.no_grad():
            answer = encode(
                views.to_batch([views.select_view(pieces, view, options.flip) for _, pieces in wanted])
            )
        given = {"latents": answer} if isinstance(answer, Tensor) else answer
        named = {name: tensor.detach().cpu() for name, tensor in given.items()}
        finite = [torch.isfinite(tensor).flatten(1).all(1).tolist() for tensor in named.values()]
        for row, (task, _) in enumerate(wanted):
            if all(each[row] for each in finite):
                own = {name: tensor[row] for name, tensor in named.items()}
                entries[task.keys[view]] = run.quantize("pixels", own, options.pixels_format)
            else:
                failed[task.keys] = "its encoding is not finite"
    return failed


def _fill_texts(run: _Run, texts: Mapping[str, str], encode: Texts) -> None:
    """Encode the captions that the store lacks, those of like length together."""
    options = run.options
    ordered = sorted(texts, key=lambda caption: (len(caption), caption))
    stored = run.store.has("text", texts.values())
    chunks = [
        [caption for caption in chunk if texts[caption] not in stored]
        for chunk in _cut(ordered, options.shard)
    ]
    run.count("captions_stored_before", len(ordered) - sum(map(len, chunks)))
    chunks = run.share(chunks)
    total, done = sum(map(len, chunks)), 0
    run.count("captions_encoded", total)
    for chunk in chunks:
        entries: dict[str, Mapping[str, Tensor]] = {}
        for group in _cut(chunk, options.texts_batch):
            with torch.no_grad():
                run_encoder = encode(list(group))
            for caption, answer in zip(group, run_encoder, strict=True):
                if not all(bool(torch.isfinite(tensor).all()) for tensor in answer.values()):
                    raise Failed(
                        f'The encoding of the caption "{caption}" is not finite; use a wider precision.'
                    )
                own = {name: tensor.detach().cpu() for name, tensor in answer.items()}
                entries[texts[caption]] = run.quantize("text", own, options.texts_format)
            done += len(group)
            run.progress(done, total, "captions")
        if entries:
            run.store.commit("text", entries)


def _gather(
    run: _Run,
    work: EncodePlan,
    by_key: Mapping[str, EntryLocation | None],
    failed: Mapping[tuple[str, ...], str],
) -> EncodedDataset:
    """The samples whose encodings are all there, in the order they were given."""
    texts = work.texts
    others: dict[str, dict[str, EncodingTask]] = {}
    for (sample, name), other in work.companion_tasks.items():
        others.setdefault(sample, {})[name] = other
    items = []
    for task in work.tasks:
        own = others.get(task.sample.name, {})
        reasons = [(one.sample.name, failed[one.keys]) for one in (task, *own.values()) if one.keys in failed]
        if reasons:
            where = SetAside(*reasons[0])
            run.set_aside.append(SetAside(task.sample.name, companion_reason(task, where)))
            continue
        captions = tuple((caption, work.text(task.sample, caption)) for caption in task.sample.captions)
        with_them = {name: _locations(other, by_key) for name, other in own.items()}
        null = work.text(task.sample, "") if work.prompt_images else ""
        pictures = _locations(task, by_key)
        items.append(Item(task.sample, pictures, captions, task.size, task.bucket, with_them, null))
    if not items:
        reasons = "; ".join(sorted({one.reason for one in run.set_aside})[:3]) or "there were none"
        raise Refused(f"No picture is left to train on: {reasons}. Look at them with: sfumato data DIR")
    null = formats.dequantize(run.store.get("text", texts[""])) if "" in texts else {}
    labels = not texts and any(task.sample.label is not None for task in work.tasks)
    for what, found in run.errors.items():
        rms = sum(one**2 for one in found) / len(found)
        run.notes.append(f"stored {what}: relative error {rms**0.5:.2%}, measured on {len(found)}.")
    run.count("samples", len(items))
    run.count("set_aside", len(run.set_aside))
    found = zip(texts.values(), run.store.locations("text", list(texts.values())), strict=True)
    text_locations = {one: location for one, location in found if location is not None}
    return EncodedDataset(
        run.store,
        items,
        null,
        run.set_aside,
        run.counts,
        run.notes,
        labels,
        text_locations=text_locations,
        pixels=work.fingerprint,
    )


def _locations(task: EncodingTask, by_key: Mapping[str, EntryLocation | None]) -> tuple[EntryLocation, ...]:
    return tuple(location for location in map(by_key.get, task.keys) if location is not None)


def _cut(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive pieces of at most `size`."""
    return (items[at : at + size] for at in range(0, len(items), size))
