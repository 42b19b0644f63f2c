"""Clips: a piece of a video as so many frames at a steady rate, whatever rate the file has.

The frame shown at a moment is the last one that began before it, so variable frame rates are no special
case. MP4, WebM and the like are read by PyAV, animated GIF and WebP by Pillow. The one reader of clips: data
sets and what `generate` is shown enter here.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sfumato.readers import media
from sfumato.readers.video_frames import PLAIN, FrameConversion, conversion_of, deinterlaced

if TYPE_CHECKING:
    from torch import Tensor

MOST_DECODED = 20_000  # frames decoded for one piece, at most
SEEK_FROM = 1.0  # seconds; what begins earlier is read from the beginning
NO_DELAY = 10  # milliseconds; a GIF's frame that asks for so few is shown for 100, as browsers do
QUICK_GIF = re.compile(rb"\x21\xf9\x04.\x01\x00.\x00", re.DOTALL)
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"  # none that names further files
SLACK = 1e-3  # seconds; rounding of time stamps


@dataclass(frozen=True)
class VideoInfo:
    """What a clip's head says; seconds is 0 where it does not tell.

    size as shown; begin: the first frame's time stamp. conversion: what the frames need. note: what earlier
    versions read otherwise, "" for most: it belongs to the store's keys.
    """

    size: tuple[int, int]
    seconds: float
    fps: float
    begin: float = 0.0
    conversion: FrameConversion = field(default=PLAIN, repr=False)
    note: str = ""


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
        size = media.size_of(source)
        return VideoInfo(size, seconds, len(frames) / max(seconds, 1e-9), note=animation_note(name, source))
    with _opened(source) as container:
        stream = _stream(container)
        first = next(_decoded(container), None)
        if first is None:
            raise media.Unreadable("a video without a frame")
        begin, frame = first
        conversion = conversion_of(frame, stream)
        seconds, is_own = _length(container, stream, begin)
        note = ", ".join(one for one in (conversion.words, "length of the video alone" * is_own) if one)
        size = conversion.size(frame.width, frame.height)
        return VideoInfo(size, seconds, float(stream.average_rate or 0), begin, conversion, note)


def animation_note(name: str, source: Path | bytes | Image.Image) -> str:
    """What of an animated picture earlier versions read otherwise: a GIF that asks for no delay."""
    if not name.lower().endswith(".gif") or isinstance(source, Image.Image):
        return ""
    data = source.read_bytes() if isinstance(source, Path) else source
    return "delays as browsers" if data.startswith(b"GIF8") and QUICK_GIF.search(data) else ""


def _length(container: Any, stream: Any, begin: float) -> tuple[float, bool]:
    """Seconds of a video, and whether they are measured because its container counts sound or a start too.

    Matroska and WebM tell only where the last of their streams ends, and they and AVI count from 0.
    """
    own, step = float((stream.duration or 0) * stream.time_base), 1 / float(stream.average_rate or 25)
    seconds = own or float(container.duration or 0) / 1e6
    if not seconds or (abs(begin) <= step and (own or len(container.streams) == 1)):
        return seconds, False
    own = _last_moment(container, stream, seconds) - begin
    return (own, True) if 0 < own < seconds - 1.5 * step else (seconds, False)


def _last_moment(container: Any, stream: Any, seconds: float) -> float:
    """When a stream's last frame ends, from its packets near the end; 0 if they do not tell."""
    import av.error

    step = 1 / float(stream.average_rate or 25)
    for place in (seconds, seconds / 2, 0.0):
        last = 0.0
        try:
            container.seek(int(place / stream.time_base), stream=stream)
            for packet in container.demux(stream):
                if packet.pts is not None:
                    length = float((packet.duration or 0) * stream.time_base) or step
                    last = max(last, float(packet.pts * stream.time_base) + length)
        except (av.error.FFmpegError, ValueError):
            continue
        if last:
            return last
    return 0.0


def middle_frame(source: Path | bytes | Image.Image, known: VideoInfo) -> Image.Image:
    """A video's frame near its middle.

    Raises:
        media.Unreadable: with the reason.
    """
    import av.error

    with _opened(source) as container:
        if known.seconds:
            with suppress(av.error.FFmpegError):  # what cannot be sought is shown from its beginning
                container.seek(int((known.begin + known.seconds / 2) * 1e6))
        for _, frame in _decoded(container, known.conversion):
            return known.conversion(frame)
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
    import torch  # here: what only looks at clips does without, and answers at once

    known = video_info(name, source)
    needed = piece.frames / piece.fps
    if known.seconds and is_short(known.seconds, piece.frames, piece.fps):
        raise media.Unreadable(
            f"a clip of {known.seconds:.2f} s; {piece.frames} frames at {piece.fps:g} a second "
            f"need {needed:.2f} s"
        )
    start = piece.start(known.seconds)
    times = [start + index / piece.fps + SLACK for index in range(piece.frames)]

    def fit(image: Image.Image) -> Tensor:
        return media.center_crop_resize(image, width, height)

    if name.lower().endswith(media.CLIPS):
        frames = _read_video(source, known, times, fit)
    else:
        pictures = ((when, image) for when, image, _ in _animation(source, decode=True))
        frames = _sample_frames(times, pictures, 0.0, fit)
    if len(frames) < piece.frames:
        raise media.Unreadable(f"a clip that ends after {len(frames)} of the {piece.frames} frames asked for")
    return torch.stack(frames, 1)


def first_frames(path: Path, most: int, fps: float = 0.0) -> list[Image.Image]:
    """The first frames of a video or animation, or what it shows every 1/fps seconds; of a picture one.

    Raises:
        media.Unreadable: it is no video and no picture, or broken.
    """
    if not path.is_file():
        raise media.Unreadable("there is no such file")
    if not path.name.lower().endswith(media.CLIPS):
        try:
            media.open_picture(path, whole=False).close()
        except media.Unreadable as problem:
            if path.name.lower().endswith(media.PICTURES):
                raise
            try:
                return _first_of_video(path, most, fps)
            except media.Unreadable:
                raise problem from None
        frames = ((when, image) for when, image, _ in _animation(path, decode=True))
        return _paced(frames, most, fps, lambda image: image)
    return _first_of_video(path, most, fps)


def _first_of_video(path: Path, most: int, fps: float) -> list[Image.Image]:
    known = video_info(f"{path.name}{media.CLIPS[0]}", path)
    with _opened(path) as container:
        return _paced(_decoded(container, known.conversion), most, fps, known.conversion)


def _paced(
    timed: Iterator[tuple[float, Any]], most: int, fps: float, shown_as: Callable[[Any], Image.Image]
) -> list[Image.Image]:
    """The first `most` frames, or those shown at 0, 1/fps, 2/fps, … seconds; the last one is not held."""
    if not fps:
        return [shown_as(frame) for _, frame in islice(timed, most)]
    found: list[Image.Image] = []
    begin, shown = 0.0, None
    for when, frame in timed:
        begin = when if shown is None else begin
        while shown is not None and len(found) < most and len(found) / fps + SLACK < when - begin:
            found.append(shown_as(shown))
        if len(found) == most:
            return found
        shown = frame
    return found if shown is None else [*found, shown_as(shown)]


class _Astray(Exception):
    """A place in a file was not found by seeking; it is reached from the beginning."""


def _read_video(
    source: Path | bytes | Image.Image,
    known: VideoInfo,
    times: list[float],
    fit: Callable[[Image.Image], Tensor],
) -> list[Tensor]:
    """The frames shown at these moments, found by seeking where that is exact, else from the beginning."""
    target = known.begin + times[0] - SLACK
    soon = 3 / (known.fps or 25) if known.conversion.is_interlaced else 0.0  # its neighbours are needed too
    for back in (soon, 5.0, None) if times[0] > SEEK_FROM else (None,):
        try:
            with _opened(source) as container:
                place = None if back is None else max(known.begin, target - back)
                frames = _decoded(container, known.conversion, place)
                found = _sample_frames(
                    times,
                    frames,
                    known.begin,
                    lambda frame: fit(known.conversion(frame)),
                    target if place else None,
                )
        except (_Astray, media.Unreadable):
            if back is None:
                raise
            continue
        if len(found) == len(times) or back is None:
            return found
    raise AssertionError("the last attempt returns or raises")


def _sample_frames(
    times: list[float],
    frames: Iterator[tuple[float, Any]],
    begin: float,
    fit: Callable[[Any], Tensor],
    target: float | None = None,
) -> list[Tensor]:
    """The frame shown at each moment after `begin`; the last is held for half a frame's time at most.

    Raises:
        _Astray: the first frame comes after the moment `target` that was sought, or frames are damaged.
        media.Unreadable: too many frames lie before these moments.
    """
    found: list[Tensor] = []
    shown: Any = None
    last, step = 0.0, 0.0
    for looked, (when, frame) in enumerate(frames):
        if target is not None and (
            (shown is None and when > target + SLACK) or _is_damaged(frame, when, target)
        ):
            raise _Astray
        when -= begin
        if shown is not None and times[len(found)] < when:
            fitted = fit(shown)
            while len(found) < len(times) and times[len(found)] < when:
                found.append(fitted)
        if len(found) == len(times):
            return found
        if looked > MOST_DECODED:
            raise media.Unreadable(
                f"its piece begins after frame {MOST_DECODED:,}, and the file cannot be searched; "
                "cut it into shorter ones"
            )
        step, last = (step, when) if shown is None else (max(step, when - last), when)
        shown = frame
    if shown is not None and len(found) < len(times) and times[len(found)] <= last + 1.5 * step + SLACK:
        fitted = fit(shown)
        while len(found) < len(times) and times[len(found)] <= last + 1.5 * step + SLACK:
            found.append(fitted)
    return found


def _is_damaged(frame: Any, when: float, target: float) -> bool:
    """Whether a decoder says of a frame that is shown that it lacks what it is made from."""
    return when + SLACK >= target and bool(getattr(frame, "is_corrupt", False))


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
            wait = image.info.get("duration") or 100
            length = (100 if image.format == "GIF" and wait <= NO_DELAY else wait) / 1000
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


def _decoded(
    container: Any, conversion: FrameConversion = PLAIN, place: float | None = None
) -> Iterator[tuple[float, Any]]:
    """(time stamp in seconds, frame) of a video, from the key frame before the moment `place` on.

    Raises:
        media.Unreadable: frames cannot be decoded.
        _Astray: the place cannot be sought.
    """
    import av
    import av.error

    stream = _stream(container)
    stream.thread_type = "NONE"  # one thread: the pool decodes several files at once
    try:
        if place is not None:
            container.seek(int(place / stream.time_base), stream=stream)
        frames = _with_decoder(container, stream, conversion.decoder)
        frames = deinterlaced(frames, stream) if conversion.is_interlaced else frames
        for index, frame in enumerate(frames):
            if frame.time is None and place is not None:
                raise _Astray
            yield float(index / float(stream.average_rate or 25) if frame.time is None else frame.time), frame
    except (av.error.FFmpegError, ValueError) as problem:
        raise media.Unreadable(f"its frames cannot be decoded: {_short(problem)}") from problem


def _with_decoder(container: Any, stream: Any, decoder: str) -> Iterator[Any]:
    """The frames of a stream, by the decoder of this name; "" for the usual one."""
    import av

    if not decoder:
        yield from container.decode(stream)
        return
    context: Any = av.CodecContext.create(decoder, "r")
    context.thread_type = "NONE"
    for packet in container.demux(stream):
        yield from context.decode(packet)
