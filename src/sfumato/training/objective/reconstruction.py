"""Training a codec: the picture that comes back must be the picture that went in, through few numbers.

    loss = mean |x̂ − x| + e · mean |∇x̂ − ∇x| over scales + k · KL(latents ‖ standard normal)

The gradients at scales 1, 2, 4 ask for edges where they were; an L1 alone would blur them.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.models.interface import TrainableCodec
from sfumato.theory import noise
from sfumato.theory.definition import upload
from sfumato.training.objective.diffusion import Losses, Order, part_slice
from sfumato.training.objective.prefetch import Reader

SCALES = 3


class Pictures(Protocol):
    """Pictures of one size."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def names(self) -> Sequence[str]: ...

    def read(self, indices: Sequence[int]) -> Tensor:
        """The pictures [b, 3, H, W], or clips [b, 3, F, H, W], uint8, or float in [-1, 1]."""
        ...


class ReconstructionObjective:
    """The error of pictures that went through a codec and back.

    Args:
        codec: what is trained; pictures: on what; order: which of them a step takes.
        seed: of the noise in the latents.
        kl: weight k of the KL per latent number.
        edges: weight e of the gradients' error.
        flip: whether every other showing of a picture is mirrored.
    """

    def __init__(
        self,
        codec: TrainableCodec,
        pictures: Pictures,
        order: Order,
        seed: int,
        *,
        kl: float = 1e-3,
        edges: float = 1.0,
        flip: bool = False,
    ) -> None:
        self.codec, self.pictures, self.order, self.seed = codec, pictures, order, seed
        self.kl, self.edges, self.flip = kl, edges, flip
        self._reader: Reader[tuple[list[int], Tensor]] = Reader(self._read)

    def _read(self, step: int, part: int, parts: int) -> tuple[list[int], Tensor]:
        indices, _ = self.order.at(step)
        indices = [int(index) for index in indices[part_slice(len(indices), part, parts)]]
        return [self.pictures.ids[index] for index in indices], self.pictures.read(indices)

    def name_of(self, sample: int) -> str:
        """The file the picture came from."""
        ids = list(self.pictures.ids)
        return self.pictures.names[ids.index(sample)] if sample in ids else f"sample {sample}"

    def losses(self, step: int, part: int, parts: int) -> Losses:
        """The losses [b] of one part of the batch of `step`."""
        ids, pictures = self._reader(step, part, parts)
        device = next(self.codec.parameters()).device
        pixels = to_pixels(upload(pictures, device))
        if self.flip:
            mirrored = upload(noise.uniform(self.seed, ids, step=step, purpose="flip") < 0.5, device)
            pixels = torch.where(mirrored.view(-1, *[1] * (pixels.ndim - 1)), pixels.flip(-1), pixels)
        frames, height, width = (1, *pixels.shape[2:])[-3:]
        shape = self.codec.latent_shape(width, height, frames)
        drawn = upload(noise.normal(shape, self.seed, ids, step=step, purpose="codec"), device)
        again, kl = self.codec.reconstruct(pixels, drawn)
        error = reconstruction_error(again.float(), pixels, self.edges)
        per_number = kl.float() / math.prod(shape)
        return Losses(error + self.kl * per_number, ids, len(self.order.at(step)[0]))


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 → float in [-1, 1]; floats stay as they are."""
    return pictures.float().div_(127.5).sub_(1) if pictures.dtype == torch.uint8 else pictures


def reconstruction_error(again: Tensor, pixels: Tensor, edges: float = 1.0) -> Tensor:
    """Mean |x̂ − x| plus `edges` times that of the gradients at scales 1, 2, 4: [b]."""
    difference = again - pixels
    error = difference.abs().flatten(1).mean(1)
    if not edges:
        return error
    if pixels.ndim == 5:
        count = len(pixels)
        flat = [one.transpose(1, 2).flatten(0, 1) for one in (again, pixels)]
        return reconstruction_error(flat[0], flat[1], edges).unflatten(0, (count, -1)).mean(1)
    for scale in range(SCALES):
        if scale:
            if min(difference.shape[-2:]) < 4:
                break
            difference = F.avg_pool2d(difference, 2)
        across = difference.diff(dim=-1).abs().flatten(1).mean(1)
        down = difference.diff(dim=-2).abs().flatten(1).mean(1)
        error = error + edges / SCALES * (across + down)
    return error
