"""Clips: a piece of a video as so many frames at a steady rate, whatever rate the file has.

The frame shown at a moment is the last one that began before it, so variable frame rates are no special
case. MP4, WebM and the like are read by PyAV, animated GIF and WebP by Pillow.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sfumato.data.sources import media

MOST_DECODED = 20_000  # frames looked at in one file, at most
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"  # none that names further files
SLACK = 1e-3  # seconds; rounding of time stamps


@dataclass(frozen=True)
class VideoInfo:
    """What a clip's head says; seconds is 0 where it does not tell."""

    size: tuple[int, int]
    seconds: float
    fps: float


@dataclass(frozen=True)
class ClipSpan:
    """Which frames: `frames` of them, `fps` a second, from segment `number` of `segments` evenly spread."""

    frames: int
    fps: float
    number: int = 0
    segments: int = 1

    @property
    def words(self) -> str:
        """As part of the store's keys."""
        return f"{self.frames} frames at {self.fps:g}/s, segment {self.number} of {self.segments}"

    def start(self, seconds: float) -> float:
        """When the piece begins, in a clip of so many seconds: a single one lies in the middle."""
        spare = max(0.0, seconds - self.frames / self.fps)
        return spare * (0.5 if self.segments == 1 else self.number / (self.segments - 1))


def is_clip(name: str, source: Path | bytes | Image.Image) -> bool:
    """Whether a source is a video or an animated picture."""
    if name.lower().endswith(media.CLIPS):
        return True
    if not name.lower().endswith((".gif", ".webp", ".png", ".avif")):
        return False
    try:
        return getattr(media.open_picture(source), "n_frames", 1) > 1
    except Exception:  # what is broken is no clip; reading it as a picture gives the reason
        return False


def video_info(name: str, source: Path | bytes | Image.Image) -> VideoInfo:
    """Size (upright), length and rate of a clip, from its head.

    Raises:
        media.Unreadable: with the reason.
    """
    if not name.lower().endswith(media.CLIPS):
        frames = list(_animation(source, decode=False))
        seconds = frames[-1][0] + frames[-1][2]
        return VideoInfo(media.size_of(source), seconds, len(frames) / max(seconds, 1e-9))
    with _opened(source) as container:
        stream = _stream(container)
        length = float(stream.duration * stream.time_base) if stream.duration else 0.0
        seconds = length or float(container.duration or 0) / 1e6
        fps = float(stream.average_rate or 0)
        width, height = stream.codec_context.width, stream.codec_context.height
        first = next(iter(_video(container)), None)
        if first is None:
            raise media.Unreadable("a video without a frame")
        turned = first[1].size != (width, height)
        return VideoInfo((height, width) if turned else (width, height), seconds, fps)


def middle_frame(source: Path | bytes | Image.Image, seconds: float) -> Image.Image:
    """A video's frame near its middle.

    Raises:
        media.Unreadable: with the reason.
    """
    with _opened(source) as container:
        if seconds:
            container.seek(int(seconds / 2 * 1e6))
        for _, image in _video(container):
            return image
    raise media.Unreadable("a video without a frame")


def is_short(seconds: float, frames: int, fps: float) -> bool:
    """Whether a clip of so many seconds ends before that many frames; half a frame's time is forgiven.

    A single frame every clip has.
    """
    return frames > 1 and seconds + 0.5 / fps + SLACK < frames / fps


def usable_frames(seconds: float, frames: int, fps: float, short_clip_frames: Sequence[float] = ()) -> int:
    """`frames`, or of a clip that is too short for them the most of `short_clip_frames` that it has.

    `frames` as well where it has none of them, or does not tell its seconds (0).
    """
    lengths = sorted({frames, *map(int, short_clip_frames)}, reverse=True)
    return next((one for one in lengths if not is_short(seconds, one, fps)), frames) if seconds else frames


def middle_clip(
    name: str,
    source: Path | bytes | Image.Image,
    frames: int,
    fps: float,
    short_clip_frames: Sequence[float] = (),
) -> ClipSpan:
    """The piece in the middle of a clip, of as many frames as `usable_frames` says.

    Raises:
        media.Unreadable: its head cannot be read.
    """
    known = video_info(name, source) if short_clip_frames else None
    return ClipSpan(usable_frames(known.seconds, frames, fps, short_clip_frames) if known else frames, fps)


def read_frames(
    name: str, source: Path | bytes | Image.Image, piece: ClipSpan, width: int, height: int
) -> Tensor:
    """The frames of a piece fitted to width × height, uint8 [3, frames, height, width].

    Raises:
        media.Unreadable: no video, broken, or too short.
    """
    known = video_info(name, source)
    needed = piece.frames / piece.fps
    if known.seconds and is_short(known.seconds, piece.frames, piece.fps):
        raise media.Unreadable(
            f"a clip of {known.seconds:.2f} s; {piece.frames} frames at {piece.fps:g} a second "
            f"need {needed:.2f} s"
        )
    start = piece.start(known.seconds)
    times = [start + index / piece.fps + SLACK for index in range(piece.frames)]
    if name.lower().endswith(media.CLIPS):
        with _opened(source) as container:
            frames = _sample_frames(times, _video(container))
    else:
        frames = _sample_frames(times, ((when, image) for when, image, _ in _animation(source, decode=True)))
    if len(frames) < piece.frames:
        raise media.Unreadable(f"a clip that ends after {len(frames)} of the {piece.frames} frames asked for")
    return torch.stack([media.center_crop_resize(frame, width, height) for frame in frames], 1)


def _sample_frames(times: list[float], frames: Iterator[tuple[float, Image.Image]]) -> list[Image.Image]:
    """The frame shown at each moment; the last frame is held for half a frame's time at most."""
    found: list[Image.Image] = []
    shown: Image.Image | None = None
    begin, last, step = None, 0.0, 0.0
    for looked, (when, image) in enumerate(frames):
        begin = when if begin is None else begin
        when -= begin
        while shown is not None and len(found) < len(times) and times[len(found)] < when:
            found.append(shown)
        if len(found) == len(times) or looked > MOST_DECODED:
            return found
        shown, step, last = image, max(step, when - last), when
    while shown is not None and len(found) < len(times) and times[len(found)] <= last + 1.5 * step + SLACK:
        found.append(shown)
    return found


def _animation(
    source: Path | bytes | Image.Image, decode: bool
) -> Iterator[tuple[float, Image.Image, float]]:
    """(begin, frame, length) in seconds of an animated picture's frames."""
    image = media.open_picture(source)
    begin = 0.0
    try:
        for index in range(min(getattr(image, "n_frames", 1), MOST_DECODED)):
            image.seek(index)
            image.load()
            length = (image.info.get("duration") or 100) / 1000
            yield begin, media.read_picture(image.copy()) if decode else image, length
            begin += length
    except media.Unreadable:
        raise
    except Exception as problem:  # decoders fail in every way there is; each is one reason
        raise media.Unreadable(f"its frames cannot be decoded: {problem}") from problem


def _opened(source: Path | bytes | Image.Image) -> Any:
    import av
    import av.error

    if isinstance(source, Image.Image):
        raise media.Unreadable("a picture where a video was expected")
    if isinstance(source, bytes) and not source:
        raise media.Unreadable("the file is empty")
    try:
        place = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        return av.open(place, metadata_errors="replace", options={"format_whitelist": CONTAINERS})
    except (av.error.FFmpegError, OSError, ValueError) as problem:
        raise media.Unreadable(f"no video in any known format: {_short(problem)}") from problem


def _short(problem: Exception) -> str:
    return str(getattr(problem, "strerror", None) or problem)[:100]


def _stream(container: Any) -> Any:
    if not container.streams.video:
        raise media.Unreadable("there is no video in it")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise media.Unreadable("its video is of no known kind")
    return stream


def _video(container: Any) -> Iterator[tuple[float, Image.Image]]:
    """(begin in seconds, frame) of a video, upright."""
    import av
    import av.error

    stream = _stream(container)
    stream.thread_type = "NONE"  # one thread: the pool decodes several files at once
    try:
        for index, frame in enumerate(container.decode(stream)):
            when = frame.time if frame.time is not None else index / float(stream.average_rate or 25)
            image = frame.to_image()
            turn = int(getattr(frame, "rotation", 0) or 0) % 360
            yield float(when), image.rotate(turn, expand=True) if turn else image
    except (av.error.FFmpegError, ValueError) as problem:
        raise media.Unreadable(f"its frames cannot be decoded: {_short(problem)}") from problem
