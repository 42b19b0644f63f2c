"""A view is one way a sample is shown to the encoder: fitted to its bucket, mirrored, a piece of a clip."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from sfumato.data.settings import DataSettings
from sfumato.data.sources.sample import Picture, Sample, SetAside
from sfumato.data.store.store import key
from sfumato.readers import clips, media

Size = tuple[int, int]
Bucket = tuple[int, ...]  # width, height in pixels, and frames where clips are wanted


@dataclass(frozen=True)
class EncodingOptions:
    """How samples are encoded.

    pixels, texts: fingerprints of the encoders. batch, texts_batch: pictures, captions in one call.
    shard: entries a shard holds at most, and so what a kill can cost. flip: also store mirrored pictures.
    frames > 0 takes clips of so many frames at `fps` a second (pictures are clips of one frame), in
    `clips_per_video` pieces each; of clips too short for that the most of `short_clip_frames` that they have.
    pixels_format, texts_format: see `formats`. threads decode while others encode.
    Not use_store: pictures are encoded whenever they are shown (see `streaming_dataset`).
    """

    pixels: str
    texts: str = ""
    batch: int = 16
    texts_batch: int = 64
    shard: int = 256
    flip: bool = False
    frames: int = 0
    fps: float = 8.0
    clips_per_video: int = 1
    short_clip_frames: tuple[float, ...] = ()
    pixels_format: str = "same"
    texts_format: str = "same"
    threads: int = 2
    use_store: bool = True

    @classmethod
    def of(cls, data: DataSettings, pixels: str = "", texts: str = "", **more: Any) -> Self:
        """With the frames that a recipe's [data] asks of clips."""
        return cls(
            pixels,
            texts,
            frames=data.frames,
            fps=data.fps,
            clips_per_video=data.clips_per_video,
            short_clip_frames=data.short_clip_frames,
            **more,
        )


@dataclass(frozen=True)
class Companion:
    """How a further picture of each sample is encoded.

    encode: pixels as for the samples themselves → a tensor [B, …] or named ones; fingerprint: changes
    whenever its answers would. of: the sample's companion it is made from, by default the one of its own
    name, "picture" for the sample's own picture. size (width, height): its own, the same for all; None cuts
    it exactly as its picture. without: the companion that is white where this picture becomes grey.
    """

    encode: Callable[[Tensor], Tensor | Mapping[str, Tensor]]
    fingerprint: str
    size: Size | None = None
    of: str = ""
    without: str = ""


@dataclass(frozen=True)
class EncodingTask:
    """One sample to be encoded: its bucket, its own size ((0, 0) if not looked at), one key for each view.

    content: changes whenever its picture's file, or what draws it, does.
    """

    sample: Sample
    bucket: Bucket
    size: Size
    keys: tuple[str, ...]
    pieces: tuple[clips.ClipSpan, ...] = ()
    companion: str = ""
    content: str = ""


def companion_task(
    task: EncodingTask, name: str, options: EncodingOptions, companion: Companion
) -> EncodingTask | SetAside:
    """The task of a sample's companion: the same cut, mirrored and cut into pieces alike."""
    sample = task.sample
    found = sample.companions.get(companion.of or name)
    if companion.of == "picture":
        other = replace(sample, name=f"{sample.name}: its {name} {sample.name}")
    elif found is None:
        return SetAside(sample.name, f"it has no {companion.of or name}")
    else:
        file, draw = (found, None) if isinstance(found, Path) else (None, found)
        ending = file.name if file else sample.name  # readers go by the ending
        other = replace(
            sample, name=f"{sample.name}: its {name} {ending}", file=file, picture=draw, content=""
        )
    if companion.without:
        cover = sample.companions.get(companion.without)
        if cover is None:
            return SetAside(sample.name, f"it has no {companion.without}")
        other = replace(other, file=None, picture=partial(mask_out, other, cover), content="")
    size = companion.size or (task.bucket[0], task.bucket[1])
    still = 1 if companion.size else task.bucket[-1]  # what is cut as its clip is also as long
    if task.pieces:  # as long as its clip
        options = replace(options, frames=task.pieces[0].frames, short_clip_frames=())
    planned = plan_task(other, size, replace(options, pixels=companion.fingerprint), still)
    if isinstance(planned, SetAside):
        return planned
    if options.frames and not companion.size and planned.bucket != task.bucket:
        return SetAside(sample.name, f"its {name} is a clip, but it is a picture")
    return replace(planned, companion=name)


def mask_out(sample: Sample, cover: Picture) -> Image.Image:
    """The sample's picture, grey where the cover is white."""
    image = media.read_picture(sample.source())
    white = media.read_picture(cover() if callable(cover) else cover).convert("L").resize(image.size, 0)
    image.paste((127, 127, 127), mask=white.point([255 * (value > 127) for value in range(256)]))
    return image


def plan_task(
    sample: Sample, bucket_of: Size | Callable[[Size], Size], options: EncodingOptions, still: int = 1
) -> EncodingTask | SetAside:
    """The task of a sample, or why it can have none; where clips are wanted a picture is `still` frames."""
    video = sample.name.lower().endswith(media.CLIPS)
    if video and not options.frames:
        return SetAside(sample.name, "a clip; this model is trained on pictures")
    try:
        source = (
            None if sample.content and not callable(bucket_of) and not options.frames else sample.source()
        )
        if isinstance(source, Path) and not video and options.use_store:
            source = source.read_bytes()
        content = sample.content_hash(source) if options.use_store else _state_of_file(sample)
        clip = bool(options.frames) and source is not None and clips.is_clip(sample.name, source)
        size, frames, note = (0, 0), options.frames, ""
        if source is not None and clip and (video or callable(bucket_of) or options.short_clip_frames):
            known = clips.video_info(sample.name, source)
            frames = clips.usable_frames(known.seconds, frames, options.fps, options.short_clip_frames)
            size, note = known.size, known.note
        elif source is not None and clip:
            note = clips.animation_note(sample.name, source)
        elif source is not None:
            size, note = media.size_of(source), media.conversion_of(source)
    except (media.Unreadable, OSError) as problem:
        return SetAside(sample.name, reason_of(problem))
    bucket: Bucket = bucket_of(size) if callable(bucket_of) else bucket_of
    transform = f"{media.TRANSFORM}{note and f' ({note})'} to {bucket[0]}x{bucket[1]}"
    pieces: tuple[clips.ClipSpan, ...] = ()
    if options.frames:
        bucket = (*bucket, frames if clip else still)
        transform += f", standing still for {still} frames" if still > 1 and not clip else ""
    if clip:
        pieces = tuple(
            clips.ClipSpan(frames, options.fps, i, options.clips_per_video)
            for i in range(options.clips_per_video)
        )
    views = [f"{transform}, {piece.words}" for piece in pieces] or [
        f"{transform}{', a clip' * bool(options.frames)}"
    ]
    if options.flip:
        views = [view for plain in views for view in (plain, f"{plain} mirrored")]
    keys = tuple(key(content, view, options.pixels, options.pixels_format) for view in views)
    return EncodingTask(sample, bucket, size, keys, pieces, content=content)


def _state_of_file(sample: Sample) -> str:
    """Of a picture that is not read before it is shown: its name and, of a file, how long it is."""
    return sample.name if sample.file is None else f"{sample.name}, {sample.file.stat().st_size} bytes"


def decode(task: EncodingTask) -> list[Tensor] | str:
    """The sample's pieces fitted to its bucket, uint8 [3, H, W] or [3, F, H, W], or why not."""
    width, height, *frames = task.bucket
    try:
        source = task.sample.source()
        if task.pieces:
            return [
                clips.read_frames(task.sample.name, source, piece, width, height) for piece in task.pieces
            ]
        still = media.center_crop_resize(media.read_picture(source, (width, height)), width, height)
        return [still[:, None].expand(-1, frames[0], -1, -1) if frames else still]
    except (media.Unreadable, OSError) as problem:
        return reason_of(problem)


def select_view(pieces: list[Tensor], view: int, flip: bool) -> Tensor:
    """What the encoder sees as view number `view`: uint8 like the piece."""
    if not flip:
        return pieces[view]
    return pieces[view // 2].flip(-1) if view % 2 else pieces[view // 2]


def to_batch(pictures: list[Tensor]) -> Tensor:
    """Pixels [B, 3, …] in [−1, 1] of pictures [3, …] uint8."""
    return media.to_pixels(torch.stack(pictures))


def reason_of(problem: Exception) -> str:
    """What went wrong, for the list of files set aside."""
    if isinstance(problem, OSError):
        return f"cannot be opened: {problem.strerror or problem}"
    return str(problem)
