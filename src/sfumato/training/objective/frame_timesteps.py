"""Frames with times of their own: which are drawn apart, which are known, and a loss for the others.

Diffusion forcing (arXiv:2407.01392) gives every frame of a clip its own time. A known frame is one at the
data's end of time: shown clean, told so, and not asked for; trained that way, a model goes on from pictures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.models.interface import known_time
from sfumato.theory import Theory, noise
from sfumato.training.settings import TrainSettings

Density = Callable[[Theory, Tensor], Tensor]


@dataclass(frozen=True)
class FrameTimes:
    """How the times of a clip's frames are drawn.

    apart: each frame has its own, else all have one. first, last: share of clips whose first frame is known,
    and of those the share whose last is known too.
    """

    apart: bool = False
    first: float = 0.0
    last: float = 0.0

    @classmethod
    def of(cls, settings: TrainSettings) -> "FrameTimes":
        """As a recipe says."""
        return cls(
            settings.frame_timesteps == "independent", settings.first_frame_share, settings.last_frame_share
        )

    @property
    def is_plain(self) -> bool:
        """Whether all frames have one time and none is known."""
        return not self.apart and not self.first

    def __call__(
        self,
        theory: Theory,
        density: Density,
        t: Tensor,
        frames: int,
        seed: int,
        ids: Sequence[int],
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """t [b] of the clips → times [b, frames] of their frames, and which are known [b, frames]."""
        times = t[:, None].expand(-1, frames).clone()
        if self.apart:
            for frame in range(1, frames):
                u = noise.uniform(seed, ids, step=step, purpose=f"time of frame {frame}")
                times[:, frame] = density(theory, u).to(times)
        known = torch.zeros(times.shape, dtype=torch.bool)
        if frames > 1:
            known[:, 0] = noise.uniform(seed, ids, step=step, purpose="first frame") < self.first
            with_last = noise.uniform(seed, ids, step=step, purpose="last frame") < self.last
            known[:, -1] = known[:, 0] & with_last & (frames > 2)
        return torch.where(known.to(times.device), known_time(theory), times), known.to(times.device)


def by_frame(form: Callable[..., Tensor], x_0: Tensor, x_T: Tensor, t: Tensor) -> Tensor:
    """A theory's form (mix, target) of clips [b, C, F, h, w] whose frames have times [b, F]."""
    flat = [one.transpose(1, 2).flatten(0, 1) for one in (x_0, x_T)]
    return form(*flat, t.flatten()).unflatten(0, t.shape).transpose(1, 2)


def mean_of_unknown(error: Tensor, weight: Tensor, known: Tensor) -> Tensor:
    """Elementwise error [b, C, F, h, w], weighted by frame [b, F] → its mean over unknown frames [b]."""
    frames = error.mean((1, 3, 4)) * weight.to(error.dtype)
    is_unknown = (~known).to(error.dtype)
    return (frames * is_unknown).sum(1) / is_unknown.sum(1)
