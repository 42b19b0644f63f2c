"""Latents laid out as sequences, for networks that take them so, and back.

Our latents are [B, C, H, W] or [B, C, F, H, W]; a network's tokens are [B, N, D].
"""

import torch
from torch import Tensor


def patches(x: Tensor, size: int = 2) -> Tensor:
    """[B, C, H, W] → [B, H/s·W/s, C·s·s], channels slowest."""
    return torch.nn.functional.pixel_unshuffle(x, size).flatten(2).transpose(1, 2)


def unpatched(tokens: Tensor, height: int, width: int, size: int = 2) -> Tensor:
    """The inverse of `patches`, for latents of this height and width."""
    grid = tokens.transpose(1, 2).unflatten(2, (height // size, width // size))
    return torch.nn.functional.pixel_shuffle(grid, size)


def grid_places(rows: int, columns: int, device: torch.device) -> Tensor:
    """(0, row, column) of every token of a picture, [rows·columns, 3] float32."""
    row, column = torch.meshgrid(
        torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1).float()
