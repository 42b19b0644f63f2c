"""Media: whatever a picture file holds becomes plain RGB, upright and on white, or a reason why not.

The one reader of pictures: data sets, what `generate` is shown, masks and companions all enter here.

Nothing a file contains can hang or crash a run: sizes are looked at before pixels, and every failure of a
decoder becomes one sentence.
"""

from __future__ import annotations

import io
import warnings
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageOps

if TYPE_CHECKING:
    from torch import Tensor

warnings.filterwarnings("ignore", module=r"PIL\.")  # what is wrong with a file is said once, as its reason

PICTURES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".avif",
    ".tif",
    ".tiff",
    ".gif",
    ".bmp",
    ".jfif",
    ".jp2",
    ".ppm",
)
UNREAD = (
    ".heic", ".heif", ".jxl", ".svg", ".psd", ".psb", ".xcf", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf",
    ".orf", ".rw2", ".tga", ".exr", ".hdr", ".dds", ".ico", ".icns", ".eps", ".ai", ".pdf", ".qoi", ".pcx",
    ".jpe", ".jpf", ".j2k", ".jpx", ".jxr", ".apng", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
"""Pictures of kinds that are not read: they are set aside by name."""
CLIPS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")
UNREAD_CLIPS = (
    ".mpg", ".mpeg", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".3gp", ".3g2", ".wmv", ".asf", ".flv", ".f4v",
    ".ogv", ".ogm", ".rm", ".rmvb", ".divx", ".mxf", ".dv", ".h264", ".h265", ".hevc", ".y4m", ".mjpeg",
    ".mjpg",
)  # fmt: skip
"""Clips of kinds that are not read: they are set aside by name."""
TRANSFORM = "picture 1: upright, on white, sRGB, centre crop, Lanczos, large JPEGs by halves"
"""What `read_picture` and `center_crop_resize` do, as part of the store's keys; a change changes it."""
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "JPEG2000", "PPM")
"""What Pillow may take a file for, whatever its name says: no format that would start another program."""
MOST_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
THINNEST = 32  # longer side over shorter side
SMALLEST = 4  # pixels a side
SAME_COLOR = 3  # levels of 255 by which a profile may move colors and be taken for sRGB


class Unreadable(Exception):
    """A file that is no usable picture; the message is the reason, in a few words."""


def open_picture(source: Path | bytes | Image.Image, whole: bool = True) -> Image.Image:
    """The picture's first frame, not yet decoded, its size looked at; not `whole`: its head is enough.

    Raises:
        Unreadable: empty, no picture, too many pixels, or a strip.
    """
    if isinstance(source, Image.Image):
        return source
    try:
        if isinstance(source, Path):
            if not source.stat().st_size:
                source = b""
            elif whole:
                source = source.read_bytes()
    except OSError as problem:
        raise Unreadable(f"cannot be opened: {problem.strerror}") from problem
    if not source:
        raise Unreadable("the file is empty")
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except Image.DecompressionBombError as problem:
        raise Unreadable(_too_large(str(problem))) from problem
    except Exception as problem:  # decoders fail in every way there is; each is one reason
        raise Unreadable("no picture in any known format, or its head is broken") from problem
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise Unreadable(_too_large(f"{width}×{height} pixels"))
    if min(width, height) < SMALLEST or max(width, height) > THINNEST * min(width, height):
        raise Unreadable(f"a strip or dot of {width}×{height} pixels")
    return image


def _too_large(what: str) -> str:
    return f"too large to be decoded safely (more than {MOST_PIXELS // 1_000_000} megapixels): {what}"


def unread_kind(name: str) -> str:
    """Why a picture or clip of this name is not read; "" if it is, or is neither."""
    if name.lower().endswith(UNREAD):
        return "not a kind that is read; save it as PNG"
    return "not a kind that is read; save it as MP4" if name.lower().endswith(UNREAD_CLIPS) else ""


def size_of(source: Path | bytes | Image.Image) -> tuple[int, int]:
    """(width, height) as seen upright, from the file's head alone.

    Raises:
        Unreadable: see `open_picture`.
    """
    image = open_picture(source, whole=False)
    try:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # a broken EXIF block: the picture is taken as it lies
        turned = False
    turned &= image.format != "TIFF"  # Pillow tells a TIFF's size as seen upright already
    size = (image.height, image.width) if turned else image.size
    if isinstance(source, Path):
        image.close()
    return size


def read_picture(source: Path | bytes | Image.Image, least: tuple[int, int] | None = None) -> Image.Image:
    """The picture as upright RGB: EXIF turned, alpha on white, 16 bits to 8, CMYK and profiles to sRGB.

    Of an animation the first frame. A JPEG much larger than `least` (width, height) is decoded at a half, a
    quarter or an eighth of its size, but not below twice `least`.

    Raises:
        Unreadable: with the reason.
    """
    image = open_picture(source)
    try:
        if least and image.format == "JPEG":
            side = 2 * max(least)
            image.draft(None, (side, side))
        image.load()
        profile = image.info.get("icc_profile")
        return _flatten_alpha(_to_srgb(_to_8_bit(_apply_exif_orientation(image)), profile))
    except Unreadable:
        raise
    except Exception as problem:  # decoders fail in every way there is; each is one reason
        reason = " ".join(str(problem).split())[:120] or type(problem).__name__
        raise Unreadable(f"its pixels cannot be decoded: {reason}") from problem


def _apply_exif_orientation(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block: the picture is taken as it lies
        return image


def conversion_of(source: Path | bytes | Image.Image) -> str:
    """What `read_picture` converts though `TRANSFORM` does not tell, from the head: it belongs to the key.

    "" for all but pictures whose profile earlier versions left aside.

    Raises:
        Unreadable: see `open_picture`.
    """
    image = open_picture(source, whole=False)
    profile = image.info.get("icc_profile")
    clear = "transparency" in image.info  # a color that is clear was lost beside a profile
    found = bool(profile) and (
        clear if _always_applied(image.mode, profile) else _is_applied(image.mode, profile)
    )
    if isinstance(source, Path):
        image.close()
    return "its profile applied" if found else ""


def _always_applied(mode: str, profile: bytes) -> bool:
    """Whether a profile is applied without a look at what it does, as in every version."""
    return mode in ("RGB", "CMYK") and b"sRGB" not in profile[:4096]


def _is_applied(mode: str, profile: bytes) -> bool:
    """Whether an embedded profile is for pictures of this mode, and is not sRGB itself."""
    if mode in ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA"):
        return _change(profile, "RGB") > SAME_COLOR
    if mode.startswith(("L", "I", "F")) and mode != "LAB":
        return _change(profile, "L") > SAME_COLOR
    return mode == "CMYK" and _always_applied(mode, profile)


@lru_cache(maxsize=64)
def _change(profile: bytes, mode: str) -> int:
    """By how many levels, of 255, a profile moves colors at most; 0 if it is broken or of another mode."""
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    grid = steps[:, None] if mode == "L" else np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 9, 3)
    colors = Image.fromarray(grid)
    found = _convert(colors, profile)
    return int(np.abs(np.asarray(found, int) - np.asarray(colors.convert("RGB"), int)).max())


def _convert(image: Image.Image, profile: bytes) -> Image.Image:
    """RGB, CMYK or grey turned into sRGB; a profile that is broken or of another kind is ignored."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        turned = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        return turned if turned is not None else image.convert("RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Apply an embedded color profile, whatever holds the colors; one that is broken is ignored.

    What is clear stays clear, and a profile that moves no color by more than SAME_COLOR levels is sRGB.
    """
    if not profile or not (_always_applied(image.mode, profile) or _is_applied(image.mode, profile)):
        return image
    if image.mode == "CMYK" or (image.mode in ("RGB", "L") and "transparency" not in image.info):
        return _convert(image, profile)
    clear = image.convert("LA" if image.mode in ("L", "LA", "La") else "RGBA")
    plain = clear.convert("L" if clear.mode == "LA" else "RGB")
    turned = _convert(plain, profile)
    turned.putalpha(clear.getchannel("A"))
    return turned


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Modes of more than 8 bits as "L": 16 bits divided by 257, floats taken in [0, 1] or else [0, 255]."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise Unreadable("it holds values that are not numbers")
    if image.mode == "F":
        values = values * 255 if values.max() <= 1 else values
    elif image.mode != "I" or values.max() > 255:
        values = values / 257
    return Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8))


def _flatten_alpha(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        clear = image.convert("RGBA")
        white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, clear).convert("RGB")
    return image.convert("RGB")


def center_crop_box(size: tuple[int, int], width: int, height: int) -> tuple[float, float, float, float]:
    """The centred part (left, top, right, bottom) of a picture of `size` with the shape width × height."""
    full_width, full_height = size
    scale = min(full_width / width, full_height / height)
    # of its own shape a picture is taken whole, and rounding must not reach past its sides
    wide, high = min(width * scale, full_width), min(height * scale, full_height)
    left, top = (full_width - wide) / 2, (full_height - high) / 2
    return left, top, min(left + wide, full_width), min(top + high, full_height)


def center_crop_resize(image: Image.Image, width: int, height: int) -> Tensor:
    """The picture cropped centrally and scaled to width × height, uint8 [3, height, width]."""
    if image.size != (width, height):
        box = center_crop_box(image.size, width, height)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    import torch  # here: what only looks at pictures does without, and answers at once

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def to_pixels(picture: Tensor) -> Tensor:
    """uint8 0 … 255 → float32 −1 … 1, any shape."""
    return picture.float() / 127.5 - 1
