"""The autoencoder of a pretrained pipeline, and how its latents are normalised."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.models.interface import Codec

ALL = ("factor", "shift", "channels")


def statistics(vae: Any, heeded: Collection[str] = ALL) -> tuple[Tensor, Tensor]:
    """(shift, scale) [C, 1, 1] or [C, 1, 1, 1]: latents = (raw − shift) / scale.

    latents = (raw − mean)·factor/std per channel where the config has both, else (raw − shift)·factor; of
    these three (`ALL`) only what is heeded, for pipelines differ in what they look at.
    """
    config = vae.config
    factor = (config.get("scaling_factor") if "factor" in heeded else None) or 1.0
    channels = config.get("z_dim") or config["latent_channels"]
    axes = [1] * (3 if "3d" in " ".join(type(m).__name__.lower() for m in vae.modules()) else 2)
    measured = {**config, **dict(vae.named_buffers(recurse=False))} if "channels" in heeded else {}
    mean, std = measured.get("latents_mean"), measured.get("latents_std")
    if mean is not None and std is not None:
        shift = torch.as_tensor(mean, dtype=torch.float32).view(-1, *axes)
        return shift, torch.as_tensor(std, dtype=torch.float32).view(-1, *axes) / factor
    whole = torch.ones(channels, *axes)
    shift = (config.get("shift_factor") if "shift" in heeded else None) or 0.0
    return whole * shift, whole / factor


class PretrainedCodec(Codec):
    """A pipeline's autoencoder with its normalisation: latents = (raw − shift) / scale.

    Args:
        network: the autoencoder; shift, scale: [C, 1, …], as `statistics` reads them.
        stride, time_stride: pixels and frames a latent stands for.
        latent_multiple: sides must be multiples of this many latents.
        video: latents are [B, C, F, H, W].
        patch: raw latents are gathered patch × patch into channels before they are normalised.
    """

    kind = "pretrained codec"
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        network: nn.Module,
        shift: Tensor,
        scale: Tensor,
        stride: int,
        time_stride: int = 1,
        latent_multiple: int = 1,
        video: bool = False,
        patch: int = 1,
    ):
        super().__init__()
        self.network: Any = network
        self.stride, self.time_stride, self.latent_multiple = stride, time_stride, latent_multiple
        self.video, self.patch = video, patch
        self.of_clips = video
        self.latent_channels = len(shift)
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def config(self) -> dict[str, Any]:
        """The autoencoder's own config."""
        return {"class": type(self.network).__name__, **dict(self.network.config)}

    def raw(self, pixels: Tensor, noise: Tensor | None) -> Tensor:
        """The autoencoder's latents, gathered into patches: the mode, or with noise a sample."""
        mode, deviation = self.moments(pixels)
        return mode if noise is None or deviation is None else mode + deviation * noise.to(mode.dtype)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mode and deviation (None where it has none) of the posterior, gathered into patches."""
        answer = self.network.encode(pixels)
        if not hasattr(answer, "latent_dist"):
            plain = answer.latent if hasattr(answer, "latent") else answer.latents
            return self.gathered(plain), None
        return self.gathered(answer.latent_dist.mode()), self.gathered(answer.latent_dist.std)

    def distribution(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mode and deviation of the posterior, normalised."""
        mode, deviation = self.moments(pixels.unsqueeze(2) if self.video and pixels.ndim == 4 else pixels)
        return (mode - self.shift) / self.scale, None if deviation is None else deviation / self.scale

    def gathered(self, raw: Tensor) -> Tensor:
        """Raw latents with patches as channels."""
        return F.pixel_unshuffle(raw, self.patch) if self.patch > 1 else raw

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels [B, 3, H, W] (for video also [B, 3, F, H, W]) in [-1, 1] → normalised latents."""
        pixels = pixels.unsqueeze(2) if self.video and pixels.ndim == 4 else pixels
        return (self.raw(pixels, noise) - self.shift) / self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, not clamped, with as many axes as the latents."""
        flat = self.video and latents.ndim == 4
        raw = (latents.unsqueeze(2) if flat else latents) * self.scale + self.shift
        raw = F.pixel_shuffle(raw, self.patch) if self.patch > 1 else raw
        options: dict[str, Any] = {}
        if self.network.config.get("timestep_conditioning"):
            options["temb"] = raw.new_zeros(len(raw))
        pixels = self.network.decode(raw, **options).sample
        return pixels.squeeze(2) if flat else pixels

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        """[C, (F,) h, w] of the latents of pictures or clips of this size."""
        self.check_size(width, height)
        flat = (height // self.stride, width // self.stride)
        deep = ((frames - 1) // self.time_stride + 1,) if self.video else ()
        return self.latent_channels, *deep, *flat

    def pixel_size(self, shape: Sequence[int]) -> dict[str, int]:
        """Also the frames of clips."""
        frames = {"num_frames": (shape[1] - 1) * self.time_stride + 1} if len(shape) == 4 else {}
        return super().pixel_size(shape) | frames

    def check_size(self, width: int, height: int, name: str = "The picture") -> None:
        """Raises Refused unless the network can be asked about pictures of this size."""
        step = self.stride * self.latent_multiple
        if width % step or height % step:
            fit = [max(step, side // step * step) for side in (width, height)]
            raise Refused(
                f"{name} is {width}×{height}, but this model needs sides in multiples of {step}. "
                f"Choose {fit[0]}×{fit[1]}."
            )
