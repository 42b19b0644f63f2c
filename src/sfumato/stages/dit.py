"""A diffusion transformer: patches of latents, attending to each other and to the text, told the time.

Source: Peebles & Xie 2023, arXiv:2212.09748 (adaLN-zero); QK-norm: arXiv:2302.05442;
squared ReLU: arXiv:2109.08668; rotary positions in two dimensions: arXiv:2104.09864, one half of each
head for rows, one for columns.
Image queries attend to image and text keys in one attention, as joint attention does (arXiv:2403.03206),
but the text stream itself stays as the encoder left it: only its keys and values are learned in each block.

What is ours: the canvas. From the prompt's summary a two-layer network draws a coarse grid of features
that is spread over the picture and added to the tokens. Near the noise, where the answer depends on the
prompt alone, that is the answer's sketch; it costs a hundredth of a block's work for each of its weights.

Clips are the same network with time as a third axis: tokens of all frames attend to each other, or
(factorised, arXiv:2401.03048) to their frame in one block and to their place in time in the next. A picture
is a clip of one frame. Frames may be told times of their own, as diffusion forcing asks (arXiv:2407.01392).
"""

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import Refused

from .interface import Condition, Denoiser


def along(told: Tensor, x: Tensor) -> Tensor:
    """What all tokens of x [B, N, D] are told: [B, D] → [B, 1, D]; of frames [B, F, D] → [B, N, D]."""
    return told[:, None] if told.ndim == 2 else told.repeat_interleave(x.shape[1] // told.shape[1], 1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, N, D] normalised over D, then x·(1 + scale) + shift with shift, scale [B, D] or [B, F, D]."""
    return torch.addcmul(along(shift, x), F.layer_norm(x, x.shape[-1:]), 1 + along(scale, x))


@lru_cache(maxsize=32)
def rotary(rows: int, columns: int, head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [rows·columns, head/2] of the angles that turn queries and keys."""
    frequencies = 100.0 ** -(torch.arange(head // 4, dtype=torch.float64) / (head // 4))
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
    angles = (places[:, :, None] * frequencies).flatten(1).float()
    return angles.cos().to(device), angles.sin().to(device)


@lru_cache(maxsize=32)
def rotary_in_time(
    frames: int, rows: int, columns: int, head: int, device: torch.device
) -> tuple[Tensor, Tensor]:
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


@lru_cache(maxsize=32)
def moments(frames: int, device: torch.device) -> Tensor:
    """When each frame is: [frames, 16] waves of 4 to 512 frames."""
    angles = torch.arange(frames)[:, None] * (math.pi / 2 / 2.0 ** torch.arange(8))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


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
    """Attention and a two-layer network, both gated by the time; the gates start at zero.

    `over` says what a token of a clip looks at: "all" tokens, those of its frame ("space"), or those of its
    place ("time"); and always at the text.
    """

    def __init__(self, width: int, heads: int, text: bool, over: str = "all"):
        super().__init__()
        self.heads, self.over = heads, over
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
        self,
        x: Tensor,
        text: Tensor | None,
        mask: Tensor | None,
        angles: tuple[Tensor, Tensor],
        frames: int,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, D] looks at itself and at text [B, L, D] where mask [B, L] allows.

        Where perturbed [B] is true each token sees itself alone (arXiv:2403.17377).
        """
        q, k, v = self.split(self.qkv(x), 3)
        own = v
        q, k = turn(self.q_norm(q), *angles), turn(self.k_norm(k), *angles)
        q, k, v = (self.gather(one, frames) for one in (q, k, v))
        groups = len(q) // len(x)
        if text is not None and self.text_kv is not None:
            text_k, text_v = self.split(self.text_kv(text), 2)
            k, v = (
                torch.cat((own, told.repeat_interleave(groups, 0) if groups > 1 else told), dim=2)
                for own, told in ((k, self.k_norm(text_k)), (v, text_v))
            )
            if mask is not None:
                mask = F.pad(mask, (q.shape[2], 0), value=True)[:, None, None]
                mask = mask.repeat_interleave(groups, 0) if groups > 1 else mask
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        seen = self.scatter(seen, frames, len(x))
        if perturbed is not None:
            seen = torch.where(perturbed.view(-1, 1, 1, 1), own, seen)
        return self.out(seen.transpose(1, 2).flatten(2))

    def gather(self, x: Tensor, frames: int) -> Tensor:
        """[B, heads, F·n, d] → those that look at each other: [B·F, …, n, d] or [B·n, …, F, d]."""
        if self.over == "all" or (frames == 1 and self.over == "space"):
            return x
        apart = x.unflatten(2, (frames, -1))
        return (apart.transpose(1, 2) if self.over == "space" else apart.permute(0, 3, 1, 2, 4)).flatten(0, 1)

    def scatter(self, x: Tensor, frames: int, batch: int) -> Tensor:
        """The inverse of `gather`, for a batch of so many."""
        if self.over == "all" or (frames == 1 and self.over == "space"):
            return x
        if self.over == "space":
            return x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(2, 3)
        return x.unflatten(0, (batch, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: Tensor | None,
        mask: Tensor | None,
        angles: tuple[Tensor, Tensor],
        frames: int = 1,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, D], time [B, D] or of each frame [B, F, D] → [B, N, D]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(time).chunk(6, dim=-1)
        seen = self.attend(modulate(x, shift_a, scale_a), text, mask, angles, frames, perturbed)
        x = torch.addcmul(x, along(gate_a, x), seen)
        hidden = F.relu(self.up(modulate(x, shift_m, scale_m))).square()
        return torch.addcmul(x, along(gate_m, x), self.down(hidden))


class DiT(Denoiser):
    """Latents [B, C, H, W], or of clips [B, C, F, H, W] → an answer of the same shape, given time and text.

    Args:
        channels: of the latents.
        width, depth, heads: of the transformer; width / heads must be a multiple of 4.
        patch: patch × patch latents become one token.
        canvas: sides of the grid that the summary is drawn on; 0 for none.
        text_width: D of the condition's `tokens`; 0 for an unconditional network.
        pooled_width: of its `pooled`; default the same.
        classes: of the condition's `labels`; a class's embedding takes the summary's place.
        clock_range: what the theory's clock says near the data and near the noise; mapped onto [0, 1000].
        frames: of the clips it is made for, in latents; 0 for a network of pictures.
        attention: "full", or "factorised": over the frame in one block, over time in the next.
    """

    kind = "dit"
    lora_targets = ("qkv", "text_kv", "out", "up", "down")
    perturbs = True

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
        frames: int = 0,
        attention: str = "full",
        classes: int = 0,
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
        self._config |= {"frames": frames, "attention": attention} if frames else {}
        self._config |= {"classes": classes} if classes else {}
        self.frames, self.frames_apart = frames, bool(frames)
        self.patch, self.width, self.heads, self.head = patch, width, heads, width // heads
        self.grain = patch
        self.clock_range = clock_range
        self.enter = nn.Linear(channels * patch * patch, width)
        self.place = nn.Linear(32, width)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        if text_width:
            self.text = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        self.label = nn.Embedding(classes + 1, width) if classes else None  # the last says nothing
        pooled_width = width if classes else pooled_width
        if text_width or classes:
            self.pooled = nn.Sequential(nn.LayerNorm(pooled_width), nn.Linear(pooled_width, width))
        self.moment = nn.Linear(16, width) if frames else None
        self.canvas, grid = None, (*((min(frames, canvas),) if frames else ()), canvas, canvas)
        if canvas and (text_width or classes):
            self.canvas = nn.Sequential(
                nn.LayerNorm(pooled_width),
                nn.Linear(pooled_width, 4 * width),
                nn.SiLU(),
                nn.Linear(4 * width, width * math.prod(grid)),
                nn.Unflatten(-1, (width, *grid)),
            )
        over = ("space", "time") if attention == "factorised" and frames else ("all", "all")
        self.blocks = nn.ModuleList(Block(width, heads, bool(text_width), over[i % 2]) for i in range(depth))
        self.last_modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, channels * patch * patch)
        for layer in (self.last_modulation, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def config(self) -> dict[str, Any]:
        """The arguments it was built with."""
        return self._config

    def summary(self, condition: Condition) -> Tensor | None:
        """What the condition says on the whole, [B, pooled_width]: its `pooled`, or its class's embedding."""
        if self.label is not None and "labels" in condition:
            return self.label(condition["labels"])
        return condition.get("pooled")

    def heard(self, clock: Tensor, condition: Condition) -> Tensor:
        """Time and the condition's summary in one vector: [B, width], of frames' own times [B, F, width]."""
        low, high = self.clock_range
        time = self.time(sinusoids((clock.flatten() - low) * (1000 / (high - low)), 256))
        time = time.unflatten(0, clock.shape)
        pooled = self.summary(condition)
        if pooled is None:
            return F.silu(time)
        told = self.pooled(pooled)
        return F.silu(time + (told if clock.ndim == 1 else told[:, None]))

    def forward(self, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x [B, C, (F,) H, W], clock [B] or [B, F], `tokens` [B, L, D], `mask` [B, L], `pooled` → as x.

        Raises:
            Refused: clips for a network of pictures.
        """
        if x.ndim == 5 and not self.frames:
            raise Refused("This DiT draws pictures, not clips. Train one on clips: set data.frames.")
        frames = x.shape[2] if x.ndim == 5 else 1
        flat = x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x
        rows, columns = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        patches = F.pixel_unshuffle(flat, self.patch).flatten(2).transpose(1, 2)
        tokens = self.enter(patches) + self.place(places(rows, columns, x.device).to(x.dtype))
        if self.moment is not None:
            when = self.moment(moments(frames, x.device).to(x.dtype))
            tokens = (tokens.unflatten(0, (-1, frames)) + when[:, None]).flatten(1, 2)
        pooled = self.summary(condition)
        if self.canvas is not None and pooled is not None:
            tokens = tokens + self.sketch(pooled, frames, rows, columns)
        time, angles = self.heard(clock, condition), self.angles(frames, rows, columns, x.device)
        text = self.text(condition["tokens"]) if "tokens" in condition else None
        mask = condition["mask"] if text is not None and "mask" in condition else None
        perturbed = condition.get("perturbed")
        middle = ((len(self.blocks) - 1) // 2, len(self.blocks) // 2)
        for index, block in enumerate(self.blocks):
            alone = perturbed if index in middle else None
            tokens = block(tokens, time, text, mask, angles, frames, alone)
        shift, scale = self.last_modulation(time).chunk(2, dim=-1)
        out = self.leave(modulate(tokens, shift, scale)).unflatten(1, (frames, -1)).flatten(0, 1)
        out = F.pixel_shuffle(out.transpose(1, 2).unflatten(-1, (rows, columns)), self.patch)
        return out.unflatten(0, (-1, frames)).transpose(1, 2) if x.ndim == 5 else out

    def sketch(self, pooled: Tensor, frames: int, rows: int, columns: int) -> Tensor:
        """The canvas [B, F·rows·columns, width] that the summary draws."""
        assert self.canvas is not None
        grid = self.canvas(pooled)
        if self.frames:
            return F.interpolate(grid, (frames, rows, columns), mode="trilinear").flatten(2).transpose(1, 2)
        return F.interpolate(grid, (rows, columns), mode="bilinear").flatten(2).transpose(1, 2)

    def angles(self, frames: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """What turns queries and keys: two axes for a network of pictures, three for one of clips."""
        if self.frames:
            return rotary_in_time(frames, rows, columns, self.head, device)
        return rotary(rows, columns, self.head, device)
