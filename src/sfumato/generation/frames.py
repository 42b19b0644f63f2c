"""Frames of a clip: some are known, and more may be wanted than the network sees at once.

Known frames are shown to the network clean, with a time of their own, and come out as they went in. Long clips
are asked for in windows that overlap; where several answer, the answer is their mean, each counting more
towards its middle (MultiDiffusion, arXiv:2302.08113, along time).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import Refused
from sfumato.stages.interface import Condition, known_time
from sfumato.theory import Theory

Ask = Callable[[Tensor, Tensor, Condition], Tensor]
Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Known:
    """Latents of known frames: latents [B, C, K, h, w] where `which` [K] is true, anything elsewhere."""

    latents: Tensor
    which: Tensor

    def shown(self, ask: Ask, theory: Theory) -> Ask:
        """`ask` with the known frames in place of the noisy ones; also for a doubled batch."""
        clean = known_time(theory)

        def answer(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            times = t.reshape(-1, 1).expand(len(x_t), x_t.shape[2]).clone()
            times[:, self.which.to(times.device)] = clean
            latents = self.latents.to(x_t).repeat(len(x_t) // len(self.latents), 1, 1, 1, 1)
            return ask(torch.where(self.place(x_t), latents, x_t), times, condition)

        return answer

    def held(self, denoise: Denoise, theory: Theory) -> Denoise:
        """`denoise` that answers for known frames what leads exactly to them."""

        def answer(x_t: Tensor, t: Tensor) -> Tensor:
            latents = self.latents.to(x_t)
            moments = torch.as_tensor(t, dtype=torch.float64, device=x_t.device).expand(len(x_t))
            a, s = (one.view(-1, 1, 1, 1, 1).to(x_t) for one in theory.data(moments))
            target = theory.target(latents, (x_t - a * latents) / s, moments)
            return torch.where(self.place(x_t), target, denoise(x_t, t))

        return answer

    def place(self, x: Tensor) -> Tensor:
        """Where the known frames are, [1, 1, K, 1, 1]."""
        return self.which.to(x.device).view(1, 1, -1, 1, 1)


@dataclass(frozen=True)
class Windows:
    """Pieces of `size` latent frames that overlap by `overlap`, the last one moved back to the end."""

    size: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise Refused(
                f"Windows of {self.size} latent frames cannot overlap by {self.overlap}: choose less than "
                f"{self.size}."
            )

    def pieces(self, frames: int) -> list[slice]:
        """Where the windows lie in so many latent frames."""
        if frames <= self.size:
            return [slice(0, frames)]
        starts = [*range(0, frames - self.size, self.size - self.overlap), frames - self.size]
        return [slice(start, start + self.size) for start in starts]

    def weights(self, frames: int) -> Tensor:
        """How much each frame of a window counts: a triangle, nowhere 0."""
        rising = torch.arange(1, frames + 1, dtype=torch.float32)
        return torch.minimum(rising, rising.flip(0))

    def asked(self, ask: Ask) -> Ask:
        """`ask` in windows: x_t [B, C, K, h, w] of any K, t [B] or [B, K]."""

        def answer(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            pieces = self.pieces(x_t.shape[2])
            if len(pieces) == 1:
                return ask(x_t, t, condition)
            total, counted = torch.zeros_like(x_t), torch.zeros(x_t.shape[2], device=x_t.device)
            for piece in pieces:
                times = t[:, piece] if torch.is_tensor(t) and t.ndim == 2 else t
                weight = self.weights(self.size).to(x_t)
                total[:, :, piece] += ask(x_t[:, :, piece], times, condition) * weight.view(-1, 1, 1)
                counted[piece] += weight
            return total / counted.view(-1, 1, 1).to(x_t)

        return answer
