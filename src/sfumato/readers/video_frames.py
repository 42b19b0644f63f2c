"""Video frames: what a decoder gives becomes the RGB picture that a player shows.

Pixels that are not square are stretched, the display matrix is obeyed (turned and mirrored), what is clear
lies on white, HDR becomes SDR, interlaced fields become whole frames.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from sfumato.readers import media

PQ, HLG = 16, 18  # transfer characteristics of ITU-T H.273
REFERENCE_WHITE = 203.0  # cd/m², shown as the white of SDR (ITU-R BT.2408)
HLG_PEAK = 1000.0  # cd/m² of the display that HLG is shown on (ITU-R BT.2100)
BT2020_TO_BT709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]],
    np.float32,
)
"""Linear light of one primaries in the other's (ITU-R BT.2087)."""
BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)


@dataclass(frozen=True)
class FrameConversion:
    """What a video's frames need to look as they should.

    pixel_aspect: a pixel's width over its height. turns: mirrored and turned so, in order. angle: degrees
    where it is no right angle. transfer: PQ or HLG, 0 for SDR. decoder: the one that knows what is clear, ""
    for the usual.
    """

    pixel_aspect: Fraction = Fraction(1)
    turns: tuple[Image.Transpose, ...] = ()
    is_mirrored: bool = False
    angle: float = 0.0
    transfer: int = 0
    is_clear: bool = False
    is_interlaced: bool = False
    decoder: str = ""

    @property
    def words(self) -> str:
        """What earlier versions did not do, as part of the store's keys; "" for plain videos."""
        said = [
            f"pixels {self.pixel_aspect}" if self.pixel_aspect != 1 else "",
            "mirrored" if self.is_mirrored else "",
            {PQ: "PQ to sRGB", HLG: "HLG to sRGB"}.get(self.transfer, ""),
            "on white" if self.is_clear else "",
            "deinterlaced" if self.is_interlaced else "",
        ]
        return ", ".join(one for one in said if one)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) as shown of a frame that is stored with this size."""
        wide = max(1, round(width * self.pixel_aspect))
        swapped = sum(turn == Image.Transpose.TRANSPOSE for turn in self.turns) % 2
        return (height, wide) if swapped else (wide, height)

    def __call__(self, frame: Any) -> Image.Image:
        """A decoded frame as RGB."""
        if self.transfer:
            image = hdr_to_srgb(frame.to_ndarray(format="rgb48le"), self.transfer)
        elif self.is_clear:
            image = media.read_picture(Image.fromarray(frame.to_ndarray(format="rgba")))
        else:
            image = frame.to_image()
        if self.pixel_aspect != 1:
            wide = max(1, round(image.width * self.pixel_aspect))
            image = image.resize((wide, image.height), Image.Resampling.LANCZOS)
        for turn in self.turns:
            image = image.transpose(turn)
        return image.rotate(self.angle, expand=True) if self.angle else image


PLAIN = FrameConversion()
"""What most videos need: nothing."""


def conversion_of(frame: Any, stream: Any) -> FrameConversion:
    """What the frames of a stream need, from its head and its first frame.

    Raises:
        media.Unreadable: sizes that no player would show.
    """
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    aspect = aspect if aspect > 0 else Fraction(1)
    wide, high = round(frame.width * aspect), frame.height
    if max(wide, high) > media.THINNEST * min(wide, high) or wide * high > media.MOST_PIXELS:
        raise media.Unreadable(f"a strip: {frame.width}×{high} pixels of shape {aspect} are {wide}×{high}")
    turns, mirrored, angle = turns_of(frame)
    transfer = int(getattr(frame, "color_trc", 0) or getattr(stream.codec_context, "color_trc", 0) or 0)
    decoder = clear_decoder(stream)
    return FrameConversion(
        aspect,
        turns,
        mirrored,
        angle,
        transfer if transfer in (PQ, HLG) else 0,
        bool(decoder) or any(part.is_alpha for part in frame.format.components),
        bool(getattr(frame, "interlaced_frame", False)),
        decoder,
    )


def turns_of(frame: Any) -> tuple[tuple[Image.Transpose, ...], bool, float]:
    """How a frame is mirrored and turned, whether it is mirrored, and an angle where it is no right one.

    The display matrix of ISO 14496-12 sends (x, y) to (a·x + c·y, b·x + d·y).
    """
    data = next((one for one in frame.side_data if "DISPLAYMATRIX" in str(one.type)), None)
    if data is None or len(bytes(data)) < 36:
        return (), False, 0.0
    a, b, _, c, d = (int(one) for one in np.frombuffer(bytes(data), "<i4")[:5])
    straight, across = abs(a) + abs(d), abs(b) + abs(c)
    if min(straight, across) > 0.02 * max(straight, across):
        return (), False, float(int(getattr(frame, "rotation", 0) or 0) % 360)
    swapped = across > straight
    left, up = (c < 0, b < 0) if swapped else (a < 0, d < 0)
    turns = [Image.Transpose.TRANSPOSE] * swapped
    turns += [Image.Transpose.FLIP_LEFT_RIGHT] * left + [Image.Transpose.FLIP_TOP_BOTTOM] * up
    return tuple(turns), a * d - b * c < 0, 0.0


def clear_decoder(stream: Any) -> str:
    """The decoder that reads what is clear in a VP8 or VP9 stream, which the usual one leaves out.

    Raises:
        media.Unreadable: this PyAV lacks it.
    """
    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name, "")
    tags = {key.lower(): value for key, value in stream.metadata.items()}
    if not name or tags.get("alpha_mode") != "1":
        return ""
    import av

    if name not in av.codecs_available:
        raise media.Unreadable(f"it is clear in places, and this PyAV has no {name} to read where")
    return name


def deinterlaced(frames: Iterator[Any], stream: Any) -> Iterator[Any]:
    """Whole frames of interlaced ones (yadif), at their own times."""
    import av.filter

    graph = av.filter.Graph()
    source = graph.add_buffer(template=stream)
    weave, sink = graph.add("yadif", "mode=send_frame:parity=auto:deint=interlaced"), graph.add("buffersink")
    source.link_to(weave)
    weave.link_to(sink)
    graph.configure()
    for frame in frames:
        source.push(frame)
        yield from _pulled(sink)
    source.push(None)
    yield from _pulled(sink)


def _pulled(sink: Any) -> Iterator[Any]:
    import av.error

    while True:
        try:
            yield sink.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


def hdr_to_srgb(codes: np.ndarray, transfer: int) -> Image.Image:
    """BT.2020 codes uint16 [H, W, 3] as sRGB: reference white becomes white, what is brighter is white too.

    Source: ITU-R BT.2100 (both transfers), BT.2408 (203 cd/m² is reference white).
    """
    light = _light(transfer)[codes]
    if transfer == HLG:
        light *= ((light @ BT2020_LUMA)[..., None]) ** 0.2 * (HLG_PEAK / REFERENCE_WHITE)
    light = np.clip(light @ BT2020_TO_BT709.T, 0, 1)
    return Image.fromarray(_encoded()[(light * 65535 + 0.5).astype(np.uint16)])


@lru_cache(maxsize=2)
def _light(transfer: int) -> np.ndarray:
    """Light of each code of 65,536: of PQ over reference white, of HLG the scene's in [0, 1]."""
    code = np.linspace(0, 1, 65536)
    if transfer == PQ:
        power = code ** (1 / 78.84375)
        linear = np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)
        light = linear ** (1 / 0.1593017578125) * (10000 / REFERENCE_WHITE)
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
    return light.astype(np.float32)


@lru_cache(maxsize=1)
def _encoded() -> np.ndarray:
    """The sRGB level of each of 65,536 amounts of light."""
    light = np.linspace(0, 1, 65536)
    code = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (code * 255 + 0.5).astype(np.uint8)
