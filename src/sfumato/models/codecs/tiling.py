"""Decoding in pieces: tiles in space and chunks in time, so that memory does not grow with the clip.

Our own codecs look a known way around a latent. A piece is decoded with so much of its surroundings and cut
to itself, so the result is that of decoding the whole. The autoencoders of diffusers blend overlapping tiles
by their own rules, which are switched on here.
"""

import inspect
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor

from sfumato.errors import Refused
from sfumato.models.interface import Codec


@dataclass(frozen=True)
class Tiling:
    """How large a piece is: `tile` pixels a side, `frames` of a clip at once; 0 for the whole."""

    tile: int = 0
    frames: int = 0

    def __bool__(self) -> bool:
        return bool(self.tile or self.frames)


USUAL_TILE, USUAL_FRAMES = 256, 16


def usual(codec: Codec) -> Tiling:
    """Pieces small enough for any device, that this codec takes."""
    network = getattr(codec, "network", None)
    chunks = hasattr(network, "tile_sample_min_num_frames") or hasattr(network, BATCH)
    chunked = codec.of_clips and codec.time_stride > 1 and (network is None or chunks)
    return Tiling(max(USUAL_TILE, 4 * codec.stride), max(USUAL_FRAMES, codec.time_stride) if chunked else 0)


def can_tile(codec: Codec) -> bool:
    """Whether a codec decodes in pieces at all."""
    return codec.reach is not None or hasattr(getattr(codec, "network", None), "enable_tiling")


def decode_tiled(codec: Codec, latents: Tensor, pieces: Tiling) -> Tensor:
    """Pixels of latents [B, C, (K,) h, w], not clamped, decoded piece by piece.

    Raises:
        Refused: the codec looks everywhere and has no tiling of its own; a piece smaller than a latent.
    """
    network = getattr(codec, "network", None)
    if hasattr(network, "enable_tiling"):
        return _by_its_own(codec, network, latents, pieces)
    if codec.reach is None:
        raise Refused("This codec sees the whole picture at once and cannot decode in tiles. Leave tile out.")
    if pieces.tile and pieces.tile < codec.stride:
        raise Refused(
            f"tile = {pieces.tile}, but a latent of this codec covers {codec.stride} pixels a side."
        )
    clip = latents if latents.ndim == 5 else latents[:, :, None]
    count, height, width = clip.shape[-3:]
    whole: Tensor | None = None
    for times, rows, columns in product(
        _chunks(count, codec, pieces), _tiles(height, codec, pieces), _tiles(width, codec, pieces)
    ):
        part = clip[:, :, times.seen, rows.seen, columns.seen]
        pixels = codec.decode(part if latents.ndim == 5 else part[:, :, 0])
        pixels = pixels if pixels.ndim == 5 else pixels[:, :, None]
        if whole is None:
            frames = 1 + (count - 1) * codec.time_stride
            size = (frames, height * codec.stride, width * codec.stride)
            whole = pixels.new_empty(*pixels.shape[:2], *size)
        whole[:, :, times.into, rows.into, columns.into] = pixels[:, :, times.kept, rows.kept, columns.kept]
    assert whole is not None
    return whole if latents.ndim == 5 else whole[:, :, 0]


@dataclass(frozen=True)
class _Piece:
    """Along one axis: the latents that are seen, which of their pixels are kept, and where those go."""

    seen: slice
    kept: slice
    into: slice


def _tiles(latents: int, codec: Codec, pieces: Tiling) -> list[_Piece]:
    assert codec.reach is not None
    size, around = (pieces.tile // codec.stride or latents), codec.reach[0]
    found = []
    for begin in range(0, latents, size):
        end = min(begin + size, latents)
        low, high = max(0, begin - around), min(latents, end + around)
        kept = slice((begin - low) * codec.stride, (end - low) * codec.stride)
        found.append(_Piece(slice(low, high), kept, slice(begin * codec.stride, end * codec.stride)))
    return found


def _chunks(latents: int, codec: Codec, pieces: Tiling) -> list[_Piece]:
    """Chunks see enough of their past; the first latent that is seen gives a single frame."""
    assert codec.reach is not None
    step = codec.time_stride
    size = max(1, pieces.frames // step) if pieces.frames else latents
    before = max(codec.reach[1], int(step > 1))
    found = []
    for begin in range(0, latents, size):
        end = min(begin + size, latents)
        low = max(0, begin - before)
        first, last = (0 if begin == 0 else 1 + (begin - 1) * step), 1 + (end - 1) * step
        shift = 0 if low == 0 else low * step
        found.append(_Piece(slice(low, end), slice(first - shift, last - shift), slice(first, last)))
    return found


def _by_its_own(codec: Codec, network: Any, latents: Tensor, pieces: Tiling) -> Tensor:
    """Decode with the tiling of a diffusers autoencoder switched on, and off again."""
    before = {name: value for name, value in vars(network).items() if name.startswith(("tile_", "use_"))}
    before |= {name: value for name, value in vars(network).items() if name == BATCH}
    try:
        if pieces.tile:
            _tile(codec, network, pieces.tile)
        if pieces.frames:
            _chunk(codec, network, pieces.frames)
        return codec.decode(latents)
    finally:
        vars(network).update(before)


BATCH = "num_latent_frames_batch_size"


def _tile(codec: Codec, network: Any, tile: int) -> None:
    multiple = 4 * codec.stride
    if tile % multiple:
        raise Refused(
            f"tile = {tile}, but {type(network).__name__} takes tiles in multiples of {multiple}. "
            f"Choose {max(multiple, tile // multiple * multiple)}."
        )
    taken = inspect.signature(network.enable_tiling).parameters
    named = {f"tile_sample_min_{side}": tile for side in ("height", "width")}
    named |= {f"tile_sample_stride_{side}": tile * 3 // 4 for side in ("height", "width")}
    named |= {f"tile_overlap_factor_{side}": 0.25 for side in ("height", "width")}
    network.enable_tiling(**{name: value for name, value in named.items() if name in taken})
    if hasattr(network, "tile_sample_min_size"):
        network.tile_sample_min_size, network.tile_latent_min_size = tile, tile // codec.stride


def _chunk(codec: Codec, network: Any, frames: int) -> None:
    step, name = codec.time_stride, type(network).__name__
    if frames < step or not codec.of_clips:
        raise Refused(f"{name} decodes at least {step} frames at once: choose chunk = {step} or more.")
    if hasattr(network, "tile_sample_min_num_frames"):
        whole = max(2, frames // step) * step
        network.use_framewise_decoding, network.tile_sample_min_num_frames = True, whole
        network.tile_sample_stride_num_frames = max(step, whole * 3 // 4 // step * step)
    elif hasattr(network, BATCH):
        network.use_framewise_decoding = True
        setattr(network, BATCH, max(2, frames // step))
    elif name != "AutoencoderKLWan":  # which decodes latent by latent whatever is said
        raise Refused(f"{name} cannot decode in chunks of frames. Leave chunk out.")
