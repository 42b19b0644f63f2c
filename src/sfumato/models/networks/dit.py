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
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.models.condition import Condition
from sfumato.models.guidance_policy import GuidancePolicy
from sfumato.models.interface import Denoiser, registered
from sfumato.models.networks.packed_sequence import Group, PackedSequence, expand_to_tokens
from sfumato.models.networks.tokens import (
    Angles,
    apply_rotary,
    frame_features,
    position_features,
    rotary,
    rotary_in_time,
    sinusoidal_embedding,
)
from sfumato.models.networks.ulysses import Ulysses, check_heads


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, N, D] normalised over D, then x·(1 + scale) + shift with shift, scale [B, D] or [B, F, D]."""
    return torch.addcmul(
        expand_to_tokens(shift, x), F.layer_norm(x, x.shape[-1:]), 1 + expand_to_tokens(scale, x)
    )


@lru_cache(maxsize=128)
def _interpolation(coarse: int, fine: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[coarse, fine]: what each of `coarse` numbers in a row weighs in `fine` ones between them."""
    whole = torch.eye(coarse, dtype=torch.float64)
    return F.interpolate(whole[None], fine, mode="linear")[0].to(device, dtype)


def interpolate(x: Tensor, size: Sequence[int]) -> Tensor:
    """x [B, D, …] → [B, D, *size], linear between the numbers, as torch's: by a matrix for each axis.

    Torch's own adds its gradients on a GPU in an order of their arrival, so that no run could be repeated.
    """
    for axis, fine in enumerate(size, 2):
        if x.shape[axis] != fine:
            x = x.transpose(axis, -1) @ _interpolation(x.shape[axis], fine, x.device, x.dtype)
            x = x.transpose(axis, -1)
    return x


class HeadNorm(nn.RMSNorm):
    """Root-mean-square norm of queries and keys, in the precision they come in.

    Under autocast they are narrower than the learned scale, which torch's fused kernel does not take.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., head] → the same, of mean square 1 times the scale."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


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
        self.q_norm, self.k_norm = (HeadNorm(width // heads, eps=1e-6) for _ in range(2))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.ulysses: Ulysses | None = None

    def split(self, x: Tensor, parts: int) -> list[Tensor]:
        """[B, N, parts·D] → parts tensors [B, heads, N, D/heads]."""
        return list(x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4))

    def attend(
        self,
        x: Tensor,
        text: Tensor | None,
        mask: Tensor | None,
        angles: Angles,
        frames: int,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, D] looks at itself and at text [B, L, D] where mask [B, L] allows.

        Where perturbed [B] is true each token sees itself alone (arXiv:2403.17377).
        """
        text_kv = self.text_keys_values(text)
        seen = self.joint_attention(
            *self.normalized_qkv(self.qkv(x), angles), text_kv, mask, frames, perturbed
        )
        return self.out(seen.transpose(1, 2).flatten(2))

    def normalized_qkv(self, qkv: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, 3D] → queries and keys, normalised and rotated, and values [B, heads, N, d]."""
        q, k, v = self.split(qkv, 3)
        return apply_rotary(self.q_norm(q), *angles), apply_rotary(self.k_norm(k), *angles), v

    def text_keys_values(self, text: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Text [B, L, D] → its keys and values [B, heads, L, d]; None for a network without text."""
        if text is None or self.text_kv is None:
            return None
        k, v = self.split(self.text_kv(text), 2)
        return self.k_norm(k), v

    def joint_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        text_kv: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        frames: int,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """Attention of q [B, heads, N, d] to k and v, and to the text's where mask [B, L] allows."""
        own_values, batch, among = v, len(q), self.ulysses
        if among is not None:
            q, k, v = (among.by_heads(one) for one in (q, k, v))
            text_kv = text_kv and (among.local_part(text_kv[0], 1), among.local_part(text_kv[1], 1))
        q, k, v = (self.gather(one, frames) for one in (q, k, v))
        groups = len(q) // batch
        if text_kv is not None:
            k, v = (
                torch.cat((image, text.repeat_interleave(groups, 0) if groups > 1 else text), dim=2)
                for image, text in zip((k, v), text_kv, strict=True)
            )
            if mask is not None:
                mask = F.pad(mask, (q.shape[2], 0), value=True)[:, None, None]
                mask = mask.repeat_interleave(groups, 0) if groups > 1 else mask
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        seen = self.scatter(seen, frames, batch)
        seen = seen if among is None else among.by_tokens(seen)
        return seen if perturbed is None else torch.where(perturbed.view(-1, 1, 1, 1), own_values, seen)

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
        angles: Angles | PackedSequence,
        frames: int = 1,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, D], time [B, D] or of each frame [B, F, D] → [B, N, D]."""
        if isinstance(angles, PackedSequence):
            return self.forward_packed(x, time, text, angles)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(time).chunk(6, dim=-1)
        seen = self.attend(modulate(x, shift_a, scale_a), text, mask, angles, frames, perturbed)
        x = torch.addcmul(x, expand_to_tokens(gate_a, x), seen)
        hidden = F.relu(self.up(modulate(x, shift_m, scale_m))).square()
        return torch.addcmul(x, expand_to_tokens(gate_m, x), self.down(hidden))

    def forward_packed(self, x: Tensor, time: Tensor, text: Tensor | None, packed: PackedSequence) -> Tensor:
        """As `forward`, of several shapes: x [1, N, D], time [T, D], text [1, M, D] → [1, N, D]."""
        parts = (one.chunk(6, dim=-1) for one in packed.split_vectors(self.modulation(time)))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = zip(*parts, strict=True)
        q, k, v = self.normalized_qkv(self.qkv(packed.modulate(x, shift_a, scale_a)), packed.angles)
        seen = self.packed_attention(q, k, v, self.text_keys_values(text), packed)
        x = packed.add_gated(x, gate_a, self.out(seen.transpose(1, 2).flatten(2)))
        hidden = F.relu(self.up(packed.modulate(x, shift_m, scale_m))).square()
        return packed.add_gated(x, gate_m, self.down(hidden))

    def packed_attention(
        self, q: Tensor, k: Tensor, v: Tensor, text_kv: tuple[Tensor, Tensor] | None, packed: PackedSequence
    ) -> Tensor:
        """Attention of q [1, heads, N, d] to their own sample's k and v, and its text's [1, heads, M, d]."""
        if packed.flex and self.over == "all":
            if text_kv is not None:
                k, v = (torch.cat((image, text), 2) for image, text in zip((k, v), text_kv, strict=True))
            return packed.attend(q, k, v)
        parts = zip(
            *(packed.split_heads(one) for one in (q, k, v)),
            packed.split_text(text_kv),
            packed.groups,
            strict=True,
        )
        return packed.join_heads(
            [self.joint_attention(a, b, c, text, g.mask, g.frames) for a, b, c, text, g in parts]
        )


@registered
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
        direct: whether what a token sees also enters its answer past all blocks, each channel times what the
            token says. The noise that a velocity is asked for fills every number; a token of about as many
            numbers as it has width cannot carry them beside its picture. arXiv:2511.13720 asks for the data
            instead; here any theory may be asked.
    """

    kind = "dit"
    lora_targets = ("qkv", "text_kv", "out", "up", "down")
    supports_packing = True
    guidance = GuidancePolicy(supports_perturbed_attention=True)

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
        direct: bool = False,
    ):
        super().__init__()
        pooled_width = text_width if pooled_width is None else pooled_width
        if width % (4 * heads):
            raise Refused(
                f"A DiT of width {width} cannot have {heads} heads: width / heads must divide by 4."
            )
        self._config = {
            "channels": channels,
            "width": width,
            "depth": depth,
            "heads": heads,
            "patch": patch,
            "canvas": canvas,
            "text_width": text_width,
            "pooled_width": pooled_width,
            "clock_range": list(clock_range),
        }
        self._config |= {"frames": frames, "attention": attention} if frames else {}
        self._config |= {"classes": classes} if classes else {}
        self._config |= {"direct": True} if direct else {}
        self.frames, self.frames_apart = frames, bool(frames)
        self.patch, self.width, self.heads, self.head = patch, width, heads, width // heads
        self.latent_multiple, self.clock_range = patch, clock_range
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
        self.gains, self.ulysses = (channels if direct else 0), None
        self.last_modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, channels * patch * patch + self.gains)
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

    def conditioning_vector(self, clock: Tensor, pooled: Tensor | None) -> Tensor:
        """Time and the condition's summary in one vector: [B, width], of frames' own times [B, F, width]."""
        time = self.timestep_embedding(clock.flatten()).unflatten(0, clock.shape)
        if pooled is None:
            return F.silu(time)
        summary = self.pooled(pooled)
        return F.silu(time + (summary if clock.ndim == 1 else summary[:, None]))

    def timestep_embedding(self, clock: Tensor) -> Tensor:
        """What a time [T] is to the blocks [T, width], before the condition's summary joins it."""
        low, high = self.clock_range
        return self.time(sinusoidal_embedding((clock - low) * (1000 / (high - low)), 256))

    def forward(self, x: Tensor | Sequence[Tensor], clock: Tensor | Sequence[Tensor], condition: Any) -> Any:
        """x [B, C, (F,) H, W], clock [B] or [B, F], `tokens` [B, L, D], `mask` [B, L], `pooled` → as x.

        Or lists of such batches, each of its own shape, which are computed as one sequence → a list as x.

        Raises:
            Refused: clips for a network of pictures.
        """
        if not isinstance(x, Tensor) or not isinstance(clock, Tensor):
            return self.forward_packed(list(x), list(clock), condition)
        frames, pooled = self.grid(x)[0], self.summary(condition)
        canvas = self.canvas(pooled) if self.canvas is not None and pooled is not None else None
        tokens = self.add_positions(self.enter(self.patchify(x)), x, canvas)
        time, angles = self.conditioning_vector(clock, pooled), self.angles(*self.grid(x), x.device)
        if self.ulysses is not None:
            tokens, time, angles = self.local_tokens(self.ulysses, tokens, time, angles)
        text = self.text(condition["tokens"]) if "tokens" in condition else None
        mask = condition["mask"] if text is not None and "mask" in condition else None
        if getattr(condition, "is_unpadded", False) and x.device.type != "cpu":
            mask = None  # with a mask no GPU takes its fastest attention; a CPU rounds otherwise without one
        perturbed = condition.get("perturbed")
        middle = ((len(self.blocks) - 1) // 2, len(self.blocks) // 2)
        for index, block in enumerate(self.blocks):
            alone = perturbed if index in middle else None
            tokens = block(tokens, time, text, mask, angles, frames, alone)
        out = self.leave(modulate(tokens, *self.last_modulation(time).chunk(2, dim=-1)))
        return self.unpatchify(out if self.ulysses is None else self.ulysses.gather(out, 1), x)

    def check_context_parallel(self, count: int) -> None:
        """Raises Refused unless so many processes can have as many heads each."""
        check_heads(self.heads, count)

    def enable_context_parallel(self, mesh: Any) -> None:
        """Let the processes of a mesh share each sample; None: no longer."""
        super().enable_context_parallel(mesh)
        self.ulysses = None if mesh is None else Ulysses(mesh.get_group("ulysses"))
        for block in self.blocks:
            block.ulysses = self.ulysses  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]

    def local_tokens(
        self, among: Ulysses, tokens: Tensor, time: Tensor, angles: Angles
    ) -> tuple[Tensor, Tensor, Angles]:
        """This process's tokens, their conditioning vectors, and their angles."""
        if time.ndim == 3 and time.shape[1] % among.count:  # a part begins within a frame
            time = time.repeat_interleave(tokens.shape[1] // time.shape[1], 1)
        time = among.local_part(time, 1) if time.ndim == 3 else time
        return (
            among.local_part(tokens, 1),
            time,
            (among.local_part(angles[0], 0), among.local_part(angles[1], 0)),
        )

    def forward_packed(
        self, xs: Sequence[Tensor], clocks: Sequence[Tensor], conditions: Sequence[Condition]
    ) -> list[Tensor]:
        """As `forward`, of batches of different shapes; what is not attention sees all of them at once."""
        packed = PackedSequence(
            [
                Group(len(x), *self.grid(x), self.angles(*self.grid(x), x.device), clock.ndim == 2, one)
                for x, clock, one in zip(xs, clocks, conditions, strict=True)
            ]
        )
        summaries = [one for one in map(self.summary, conditions) if one is not None]
        pooled = torch.cat(summaries) if summaries else None
        time = self.timestep_embedding(torch.cat([clock.flatten() for clock in clocks]))
        time = F.silu(time if pooled is None else time + packed.repeat_for_frames(self.pooled(pooled)))
        canvases: Sequence[Tensor | None] = [None] * len(xs)
        if self.canvas is not None and pooled is not None:
            canvases = packed.split_samples(self.canvas(pooled))
        entered = packed.split(self.enter(packed.join([self.patchify(x) for x in xs])))
        tokens = packed.join([self.add_positions(*one) for one in zip(entered, xs, canvases, strict=True)])
        text = self.text(packed.text_tokens) if packed.text_tokens is not None else None
        for block in self.blocks:
            tokens = block(tokens, time, text, None, packed)
        parts = (one.chunk(2, dim=-1) for one in packed.split_vectors(self.last_modulation(time)))
        shift, scale = zip(*parts, strict=True)
        out = packed.split(self.leave(packed.modulate(tokens, shift, scale)))
        return [self.unpatchify(*one) for one in zip(out, xs, strict=True)]

    def grid(self, x: Tensor) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens of x [B, C, (F,) H, W]."""
        if x.ndim == 5 and not self.frames:
            raise Refused("This DiT draws pictures, not clips. Train one on clips: set data.frames.")
        return (x.shape[2] if x.ndim == 5 else 1), x.shape[-2] // self.patch, x.shape[-1] // self.patch

    def patchify(self, x: Tensor) -> Tensor:
        """[B, C, (F,) H, W] → [B·F, rows·columns, C·patch²]."""
        flat = x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x
        return F.pixel_unshuffle(flat, self.patch).flatten(2).transpose(1, 2)

    def unpatchify(self, out: Tensor, x: Tensor) -> Tensor:
        """What leaves the tokens [B, N, …] → an answer of x's shape, and of x itself what their gains say."""
        frames, rows, columns = self.grid(x)
        out = out.unflatten(1, (frames, -1)).flatten(0, 1)
        out = out.transpose(1, 2).unflatten(-1, (rows, columns))
        drawn = F.pixel_shuffle(out[:, self.gains :], self.patch)
        if self.gains:
            gain = F.interpolate(out[:, : self.gains], scale_factor=self.patch)
            drawn = torch.addcmul(drawn, gain, x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x)
        return drawn.unflatten(0, (-1, frames)).transpose(1, 2) if x.ndim == 5 else drawn

    def add_positions(self, tokens: Tensor, x: Tensor, canvas: Tensor | None) -> Tensor:
        """Tokens [B, N, D] of x that know their places and moments, on the canvas [B, D, …] if any."""
        frames, rows, columns = self.grid(x)
        there = self.place(position_features(rows, columns, x.device).to(x.dtype))
        tokens = tokens.reshape(len(x), frames, rows * columns, -1) + there
        if self.moment is not None:
            tokens = tokens + self.moment(frame_features(frames, x.device).to(x.dtype))[:, None]
        tokens = tokens.flatten(1, 2)
        if canvas is None:
            return tokens
        size, way = ((frames, rows, columns), "trilinear") if self.frames else ((rows, columns), "bilinear")
        spread = (
            F.interpolate(canvas, size, mode=way) if x.device.type == "cpu" else interpolate(canvas, size)
        )
        return tokens + spread.flatten(2).transpose(1, 2)

    def angles(self, frames: int, rows: int, columns: int, device: torch.device) -> Angles:
        """What turns queries and keys: two axes for a network of pictures, three for one of clips."""
        if self.frames:
            return rotary_in_time(frames, rows, columns, self.head, device)
        return rotary(rows, columns, self.head, device)
