"""Pictures and clips as files that say what they show: PNG, MP4 (H.264), animated WebP, numbered frames.

The words ride along where each format keeps them: text chunks of PNG, EXIF of WebP, tags of MP4.
`read_metadata` reads them back.
"""

import io
import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfumato.errors import MALFORMED, Refused, one_of, parse_object
from sfumato.readers import clips, media

PICTURE_KINDS = ("png", "webp")
CLIP_KINDS = ("mp4", "webp", "frames")
DEFAULT_FPS = 8.0
DESCRIPTION = 0x010E  # EXIF: ImageDescription
CRF = "14"  # visually lossless
BT709, LIMITED = 1, 1


def is_clip(drawn: Any) -> bool:
    """Whether what `generate` drew is a clip [F, H, W, 3] rather than a picture."""
    return isinstance(drawn, np.ndarray)


def kinds_of(drawn: Any) -> tuple[str, ...]:
    """The kinds of file it can become; the first is the usual one."""
    return CLIP_KINDS if is_clip(drawn) else PICTURE_KINDS


def contents(drawn: Any, kind: str, said: Mapping[str, Any], fps: float = DEFAULT_FPS) -> dict[str, bytes]:
    """What to write, by the ending of each file's name: one file, or one for each frame.

    Args:
        drawn: a PIL picture, or a clip uint8 [F, H, W, 3].
        kind: one of `kinds_of(drawn)`.
        said: plain values to write into the file; "prompt" becomes its title.
        fps: frames a second of a clip.
    Raises:
        Refused: a kind this cannot become, or a rate that is none.
    """
    one_of("--format", kind, kinds_of(drawn))
    if not is_clip(drawn):
        return {f".{kind}": png(drawn, said) if kind == "png" else webp([drawn], said, fps)}
    check_fps(fps)
    if kind == "frames":
        return {f"/{i:05d}.png": png(Image.fromarray(frame), said) for i, frame in enumerate(drawn)}
    if kind == "mp4":
        return {".mp4": mp4(drawn, said, fps)}
    return {".webp": webp([Image.fromarray(frame) for frame in drawn], said, fps)}


def check_fps(fps: float) -> float:
    """Raises Refused for a rate that no clip has."""
    if not 0 < fps <= 240:
        raise Refused(f"A clip of {fps:g} frames a second cannot be shown. Choose --fps between 1 and 120.")
    return fps


def png(picture: Image.Image, said: Mapping[str, Any]) -> bytes:
    """A picture as PNG."""
    info, file = PngInfo(), io.BytesIO()
    if said:
        info.add_itxt("Description", str(said.get("prompt") or ""))
        info.add_itxt("sfumato", json.dumps(dict(said), ensure_ascii=False))
    picture.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def webp(
    frames: list[Image.Image], said: Mapping[str, Any], fps: float, quality: int = 90, lossless: bool = False
) -> bytes:
    """Frames as an endless animation, one frame as a picture; lossy at a high quality."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[DESCRIPTION] = json.dumps(dict(said))  # EXIF text is ASCII, and so is this
    moving: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "loop": 0}
    moving |= {"duration": [round((i + 1) * 1000 / fps) - round(i * 1000 / fps) for i in range(len(frames))]}
    frames[0].save(
        file,
        "WEBP",
        quality=quality,
        lossless=lossless,
        method=4,
        exif=exif,
        **(moving if len(frames) > 1 else {}),
    )
    return file.getvalue()


def mp4(clip: np.ndarray, said: Mapping[str, Any], fps: float) -> bytes:
    """A clip as H.264 in MP4, BT.709; odd sides repeat their last line, as 4:2:0 needs even ones.

    Raises:
        Refused: this PyAV was built without an H.264 encoder.
    """
    import av

    if "libx264" not in av.codecs_available:
        raise Refused(
            "This PyAV has no H.264 encoder (libx264). Ask for --format webp, or install av's wheel."
        )
    clip = np.pad(clip, [(0, 0), (0, clip.shape[1] % 2), (0, clip.shape[2] % 2), (0, 0)], mode="edge")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"movflags": "use_metadata_tags"}) as container:
        container.metadata.update({"title": str(said.get("prompt") or ""), "sfumato": json.dumps(dict(said))})
        stream: Any = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": CRF, "preset": "medium"}
        )
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], "yuv420p"
        stream.thread_count = 1
        code = stream.codec_context
        code.color_primaries = code.color_trc = code.colorspace = BT709
        code.color_range = LIMITED
        for frame in clip:
            shown = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
            container.mux(stream.encode(shown.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())
    return file.getvalue()


def read_metadata(path: Path | str) -> dict[str, Any]:
    """What a file written here says it shows; empty if it says nothing.

    Raises:
        Refused: no file of a kind that is written here.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".mp4":
            import av

            with av.open(str(path), options={"format_whitelist": clips.CONTAINERS}) as container:
                return parse_object(container.metadata.get("sfumato", "{}"))
        with Image.open(path, formats=media.FORMATS) as picture:
            text = getattr(picture, "text", {}).get("sfumato") or picture.getexif().get(DESCRIPTION) or "{}"
        return parse_object(text)
    except (SyntaxError, *MALFORMED) as problem:  # Pillow calls a broken PNG a SyntaxError
        raise Refused(f"{path} says nothing that can be read: {problem}") from problem
