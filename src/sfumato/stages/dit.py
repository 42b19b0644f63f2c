"""A diffusion transformer: patches of latents, attending to each other and to the text, told the time.

Source: Peebles & Xie 2023, arXiv:2212.09748 (adaLN-zero); QK-norm: arXiv:2302.05442;
squared ReLU: arXiv:2109.08668; rotary positions in two dimensions: arXiv:2104.09864, one half of each
head for rows, one for columns.
Image queries attend to image and text keys in one attention, as joint attention does (arXiv:2403.03206),
but the text stream itself stays as the encoder left it: only its keys and values are learned in each block.

What is ours: the canvas. From the prompt's summary a two-layer network draws a coarse grid of features
that is spread over the picture and added to the tokens. Near the noise, where the answer depends on the
prompt alone, that is the answer's sketch; it costs a hundredth of a block's work for each of its weights.
"""

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import Refused

from .interface import Condition, Denoiser


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, N, D] normalised over D, then x·(1 + scale) + shift with shift, scale [B, D]."""
    return torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:]), 1 + scale[:, None])


@lru_cache(maxsize=32)
def rotary(rows: int, columns: int, head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [rows·columns, head/2] of the angles that turn queries and keys."""
    frequencies = 100.0 ** -(torch.arange(head // 4, dtype=torch.float64) / (head // 4))
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
    angles = (places[:, :, None] * frequencies).flatten(1).float()
    return angles.cos().to(device), angles.sin().to(device)


@lru_cache(maxsize=32)
def places(rows: int, columns: int, device: torch.device) -> Tensor:
    """Where each token lies in the picture: [rows·columns, 32] waves over [-1, 1], the longer side's span."""
    longest = max(rows, columns)
    centres = [(torch.arange(count) + 0.5 - count / 2) * (2 / longest) for count in (rows, columns)]
    angles = torch.cartesian_prod(*centres)[:, :, None] * (math.pi / 2 * 2.0 ** torch.arange(8) / 2)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).flatten(1).to(device)


def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [B, heads, N, head]: each pair (first half, second half) turned by its angle."""
    cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cosine - b * sine, a * sine + b * cosine), dim=-1)


def sinusoids(clock: Tensor, width: int) -> Tensor:
    """clock [B] in about [0, 1000] → [B, width], periods from 2π to 2π·10⁴."""
    frequencies = torch.exp(-math.log(1e4) * torch.arange(width // 2, device=clock.device) / (width // 2))
    angles = clock.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(clock.dtype)


class Block(nn.Module):
    """Attention and a two-layer network, both gated by the time; the gates start at zero."""

    def __init__(self, width: int, heads: int, text: bool):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.text_kv = nn.Linear(width, 2 * width) if text else None
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads, eps=1e-6), nn.RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def split(self, x: Tensor, parts: int) -> list[Tensor]:
        """[B, N, parts·D] → parts tensors [B, heads, N, D/heads]."""
        return list(x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4))

    def attend(
        self, x: Tensor, text: Tensor | None, mask: Tensor | None, angles: tuple[Tensor, Tensor]
    ) -> Tensor:
        """x [B, N, D] looks at itself and at text [B, L, D] where mask [B, 1, 1, N + L] allows."""
        q, k, v = self.split(self.qkv(x), 3)
        q, k = turn(self.q_norm(q), *angles), turn(self.k_norm(k), *angles)
        if text is not None and self.text_kv is not None:
            text_k, text_v = self.split(self.text_kv(text), 2)
            k, v = torch.cat((k, self.k_norm(text_k)), dim=2), torch.cat((v, text_v), dim=2)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(seen.transpose(1, 2).flatten(2))

    def forward(
        self, x: Tensor, time: Tensor, text: Tensor | None, mask: Tensor | None, angles: tuple[Tensor, Tensor]
    ) -> Tensor:
        """x [B, N, D], time [B, D] → [B, N, D]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(time).chunk(6, dim=-1)
        x = torch.addcmul(x, gate_a[:, None], self.attend(modulate(x, shift_a, scale_a), text, mask, angles))
        hidden = F.relu(self.up(modulate(x, shift_m, scale_m))).square()
        return torch.addcmul(x, gate_m[:, None], self.down(hidden))


class DiT(Denoiser):
    """Latents [B, C, H, W] → an answer of the same shape, given time and text.

    Args:
        channels: of the latents.
        width, depth, heads: of the transformer; width / heads must be a multiple of 4.
        patch: patch × patch latents become one token.
        canvas: sides of the grid that the summary is drawn on; 0 for none.
        text_width: D of the condition's `tokens`; 0 for an unconditional network.
        pooled_width: of its `pooled`; default the same.
        clock_range: what the theory's clock says near the data and near the noise; mapped onto [0, 1000].
    """

    kind = "dit"

    def __init__(
        self,
        channels: int,
        width: int = 256,
        depth: int = 8,
        heads: int = 4,
        patch: int = 1,
        canvas: int = 4,
        text_width: int = 384,
        pooled_width: int | None = None,
        clock_range: tuple[float, float] = (0.0, 1000.0),
    ):
        super().__init__()
        pooled_width = text_width if pooled_width is None else pooled_width
        if width % (4 * heads):
            raise Refused(
                f"A DiT of width {width} cannot have {heads} heads: width / heads must divide by 4."
            )
        self._config = {
            "channels": channels, "width": width, "depth": depth, "heads": heads, "patch": patch,
            "canvas": canvas, "text_width": text_width, "pooled_width": pooled_width,
            "clock_range": list(clock_range),
        }  # fmt: skip
        self.patch, self.width, self.head = patch, width, width // heads
        self.clock_range = clock_range
        self.enter = nn.Linear(channels * patch * patch, width)
        self.place = nn.Linear(32, width)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        if text_width:
            self.text = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
            self.pooled = nn.Sequential(nn.LayerNorm(pooled_width), nn.Linear(pooled_width, width))
        self.canvas = None
        if canvas and text_width:
            self.canvas = nn.Sequential(
                nn.LayerNorm(pooled_width),
                nn.Linear(pooled_width, 4 * width),
                nn.SiLU(),
                nn.Linear(4 * width, width * canvas * canvas),
                nn.Unflatten(-1, (width, canvas, canvas)),
            )
        self.blocks = nn.ModuleList(Block(width, heads, bool(text_width)) for _ in range(depth))
        self.last_modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, channels * patch * patch)
        for layer in (self.last_modulation, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def config(self) -> dict[str, Any]:
        """The arguments it was built with."""
        return self._config

    def heard(self, clock: Tensor, condition: Condition) -> Tensor:
        """Time and the condition's summary in one vector [B, width]."""
        low, high = self.clock_range
        time = self.time(sinusoids((clock - low) * (1000 / (high - low)), 256))
        return F.silu(time + self.pooled(condition["pooled"])) if "pooled" in condition else F.silu(time)

    def forward(self, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x [B, C, H, W], clock [B], `tokens` [B, L, D], `mask` [B, L], `pooled` [B, D] → [B, C, H, W]."""
        rows, columns = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        patches = F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)
        tokens = self.enter(patches) + self.place(places(rows, columns, x.device).to(x.dtype))
        if self.canvas is not None and "pooled" in condition:
            sketch = F.interpolate(self.canvas(condition["pooled"]), (rows, columns), mode="bilinear")
            tokens = tokens + sketch.flatten(2).transpose(1, 2)
        time, angles = self.heard(clock, condition), rotary(rows, columns, self.head, x.device)
        text = self.text(condition["tokens"]) if "tokens" in condition else None
        mask = None
        if text is not None and "mask" in condition:
            mask = F.pad(condition["mask"], (rows * columns, 0), value=True)[:, None, None]
        for block in self.blocks:
            tokens = block(tokens, time, text, mask, angles)
        shift, scale = self.last_modulation(time).chunk(2, dim=-1)
        out = self.leave(modulate(tokens, shift, scale))
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(-1, (rows, columns)), self.patch)
