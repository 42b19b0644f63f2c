"""Latents as sequences of tokens: patches of them and back, and where each token is (rotary angles)."""

import math
from functools import lru_cache

import torch
from torch import Tensor

# ----------------------------------------------------------------
# Where tokens are: the angles that turn queries and keys, waves over the picture and over time.
#
# Rotary positions: arXiv:2104.09864; of pictures one half of each head is for rows and one for columns, of
# clips a quarter of the pairs tells time.


Angles = tuple[Tensor, Tensor]
"""Cosines and sines [N, head/2] of the angles of N tokens."""


@lru_cache(maxsize=128)
def rotary(rows: int, columns: int, head: int, device: torch.device) -> Angles:
    """Cosines and sines [rows·columns, head/2] of the angles that turn queries and keys."""
    frequencies = 100.0 ** -(torch.arange(head // 4, dtype=torch.float64) / (head // 4))
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
    angles = (places[:, :, None] * frequencies).flatten(1).float()
    return angles.cos().to(device), angles.sin().to(device)


@lru_cache(maxsize=128)
def rotary_in_time(frames: int, rows: int, columns: int, head: int, device: torch.device) -> Angles:
    """Cosines and sines [frames·rows·columns, head/2]: a quarter of the pairs tells time."""
    pairs = head // 2
    of_time = 2 * max(1, pairs // 8) if pairs >= 4 else 0
    shares = (of_time, (pairs - of_time) // 2, (pairs - of_time) // 2)
    counts = (torch.arange(frames), torch.arange(rows), torch.arange(columns))
    whole = torch.cartesian_prod(*counts).double()
    parts = [
        whole[:, axis, None] * 100.0 ** -(torch.arange(share, dtype=torch.float64) / max(1, share))
        for axis, share in enumerate(shares)
    ]
    angles = torch.cat(parts, 1).float()
    return angles.cos().to(device), angles.sin().to(device)


@lru_cache(maxsize=128)
def frame_features(frames: int, device: torch.device) -> Tensor:
    """When each frame is: [frames, 16] waves of 4 to 512 frames."""
    angles = torch.arange(frames)[:, None] * (math.pi / 2 / 2.0 ** torch.arange(8))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


@lru_cache(maxsize=128)
def position_features(rows: int, columns: int, device: torch.device) -> Tensor:
    """Where each token lies in the picture: [rows·columns, 32] waves over [-1, 1], the longer side's span."""
    longest = max(rows, columns)
    centres = [(torch.arange(count) + 0.5 - count / 2) * (2 / longest) for count in (rows, columns)]
    angles = torch.cartesian_prod(*centres)[:, :, None] * (math.pi / 2 * 2.0 ** torch.arange(8) / 2)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).flatten(1).to(device)


def apply_rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [B, heads, N, head]: each pair (first half, second half) turned by its angle."""
    cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cosine - b * sine, a * sine + b * cosine), dim=-1)


def sinusoidal_embedding(clock: Tensor, width: int) -> Tensor:
    """clock [B] in about [0, 1000] → [B, width], periods from 2π to 2π·10⁴."""
    frequencies = torch.exp(-math.log(1e4) * torch.arange(width // 2, device=clock.device) / (width // 2))
    angles = clock.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(clock.dtype)


# ----------------------------------------------------------------
# Latents laid out as sequences, for networks that take them so, and back.
#
# Our latents are [B, C, H, W] or [B, C, F, H, W]; a network's tokens are [B, N, D].


def patchify(x: Tensor, size: int = 2) -> Tensor:
    """[B, C, H, W] → [B, H/s·W/s, C·s·s], channels slowest."""
    return torch.nn.functional.pixel_unshuffle(x, size).flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor, height: int, width: int, size: int = 2) -> Tensor:
    """The inverse of `patchify`, for latents of this height and width."""
    grid = tokens.transpose(1, 2).unflatten(2, (height // size, width // size))
    return torch.nn.functional.pixel_shuffle(grid, size)


def position_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """(0, row, column) of every token of a picture, [rows·columns, 3] float32."""
    row, column = torch.meshgrid(
        torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1).float()
