"""Films: what a model of clips is shown, as frames of its size at its own rate.

A file's frame at a moment is the last that began before it, so that a clip of any rate, even or uneven, is as
fast as it is.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor

from sfumato.errors import Refused
from sfumato.stages.seeing import picture

SLACK = 1e-3  # seconds; rounding of time stamps


def still(picture: Image.Image, width: int, height: int) -> Tensor:
    """A picture cropped and scaled to this size, [3, H, W] in [-1, 1]."""
    image = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def film(shown: Any, width: int, height: int, frames: int, fps: float = 0.0) -> Tensor:
    """The first frames of a clip, cropped and scaled to this size, [3, F, H, W] in [-1, 1].

    Args:
        shown: uint8 [F, H, W, 3], the path of a video or an animation, or a picture, which stands still; the
            last frame of a clip that is too short is held.
        fps: a file is seen so many times a second, whatever rate it has; 0 takes its frames as they come.
    Raises:
        Refused: nothing of that kind.
    """
    if isinstance(shown, str | Path):
        images = frames_in(Path(shown).expanduser(), frames, fps)
    elif isinstance(shown, np.ndarray) and shown.dtype == np.uint8 and shown.ndim == 4:
        images = [Image.fromarray(frame) for frame in shown[:frames]]
    else:
        images = [picture(shown)]
    stills = [still(image.convert("RGB"), width, height) for image in images]
    return torch.stack(stills + stills[-1:] * (frames - len(stills)), 1)


def frames_in(path: Path, most: int, fps: float = 0.0) -> list[Image.Image]:
    """The first frames of a video or animation, or what it shows every 1/fps seconds; upright.

    Of a picture one.

    Raises:
        Refused: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return _paced(_animated(image), most, fps)
    except UnidentifiedImageError:
        pass
    except OSError as problem:
        raise Refused(f"{path} cannot be read: {problem.strerror or problem}.") from problem
    import av
    import av.error

    try:
        with av.open(str(path)) as container:
            found = _paced(_filmed(container), most, fps)
    except (av.error.FFmpegError, IndexError, ValueError) as problem:
        why = getattr(problem, "strerror", None) or problem
        raise Refused(f"{path} is neither a picture nor a video that can be read: {why}.") from problem
    if not found:
        raise Refused(f"{path} is a video without a frame.")
    return found


def _animated(image: Image.Image) -> Iterator[tuple[float, Image.Image]]:
    """(begin in seconds, frame) of an animated picture."""
    begin = 0.0
    for frame in ImageSequence.Iterator(image):
        yield begin, frame.convert("RGB")
        begin += (frame.info.get("duration") or 100) / 1000


def _filmed(container: Any) -> Iterator[tuple[float, Image.Image]]:
    """(begin in seconds, frame) of a video."""
    for index, frame in enumerate(container.decode(video=0)):
        turn = int(getattr(frame, "rotation", 0) or 0) % 360
        image = frame.to_image()
        when = frame.time if frame.time is not None else index / 25
        yield float(when), image.rotate(turn, expand=True) if turn else image


def _paced(timed: Iterator[tuple[float, Image.Image]], most: int, fps: float) -> list[Image.Image]:
    """The first `most` frames, or those shown at 0, 1/fps, 2/fps, … seconds; the last one is not held."""
    if not fps:
        return [image for _, image in islice(timed, most)]
    found: list[Image.Image] = []
    begin, shown = 0.0, None
    for when, image in timed:
        begin = when if shown is None else begin
        while shown is not None and len(found) < most and len(found) / fps + SLACK < when - begin:
            found.append(shown)
        if len(found) == most:
            return found
        shown = image
    return found if shown is None else [*found, shown]
