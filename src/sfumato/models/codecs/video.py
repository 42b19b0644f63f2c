"""Codecs of clips: frames [B, 3, F, H, W] ↔ latents [B, C, K, h, w]; a picture is the case F = K = 1.

The first frame has a latent of its own and each later latent stands for `time_stride` frames, so
F = 1 + time_stride·(K − 1). Nothing looks ahead: a frame depends on its own past alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import Refused, one_of
from sfumato.models.codecs.image import ResidualCodec, zero
from sfumato.models.codecs.pretrained import PretrainedCodec, statistics
from sfumato.models.interface import KINDS, Codec, registered

VIDEO_AUTOENCODERS = (
    "AutoencoderKLWan", "AutoencoderKLLTXVideo", "AutoencoderKLHunyuanVideo", "AutoencoderKLCogVideoX",
    "AutoencoderKLMochi",
)  # fmt: skip


MOST_NUMBERS = 2**25
"""Numbers the principal components are computed from, at most: a quarter of a gigabyte."""


NARROW = -4.5
"""Log variance the posterior starts with: one as wide as of pictures drowns what moves, which is faint."""


class CausalCache(nn.Module):
    """What the group of frames before showed, added by two convolutions; starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(2 * width, width, 3, padding=1)
        self.second = zero(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor, count: int) -> Tensor:
        """[B·count, width, h, w] → the same; before the first, the scene stood still."""
        apart = x.unflatten(0, (-1, count))
        before = torch.cat((apart[:, :1], apart[:, :-1]), 1).flatten(0, 1)
        return x + self.second(F.silu(self.first(F.silu(torch.cat((x, before), 1)))))


@registered
class ClipCodec(ResidualCodec):
    """The residual codec of pictures on groups of frames, with a memory of the group before.

    `time_stride` frames are laid on top of each other, and the patches of such a stack have principal
    components as the patches of a picture do: shortcut and convolutions are the picture codec's. The first
    frame is a stack of itself. Each half recalls the stack before, so nothing looks ahead.

    Args:
        stride, latent_channels, width: as for pictures.
        time_stride: frames in a group; 1 keeps every frame apart.
    """

    kind = "clip"
    reach, of_clips = (7, 2), True

    def __init__(self, stride: int = 8, latent_channels: int = 24, width: int = 32, time_stride: int = 2):
        if time_stride < 1:
            raise Refused(f"model.codec_time_stride = {time_stride}: a latent stands for at least one frame.")
        super().__init__(stride, latent_channels, width, time_stride)
        self.time_stride = time_stride
        self._config = {**self._config, "time_stride": time_stride}
        self.log_variance.data.fill_(NARROW)
        self.shift, self.scale = self.shift[..., None], self.scale[..., None]
        see, draw = list(self.see), list(self.draw)
        self.see = nn.Sequential(*see[:4], CausalCache(2 * width), see[4])
        self.draw = nn.Sequential(
            *draw[:2], CausalCache(4 * width), *draw[2:4], CausalCache(width), *draw[4:]
        )

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        """[C, K, h, w] of a clip of this size.

        Raises:
            Refused: the frames are not 1 + a multiple of time_stride.
        """
        return self.latent_channels, self.latent_frames(frames), *super().latent_shape(width, height)[1:]

    def stacked(self, pixels: Tensor) -> Tensor:
        """Frames [B, 3, F, H, W] → groups [B, K, 3·time_stride, H, W], the first one of copies."""
        self.latent_frames(pixels.shape[2])
        return stacked(pixels, self.time_stride)

    def prepare(self, pixels: Tensor) -> None:
        """Fit the shortcut to clips [N, 3, F, H, W], a spread of their groups where there are many."""
        stacks = self.stacked(pixels).flatten(0, 1)
        self.fit(stacks[:: max(1, stacks.numel() // MOST_NUMBERS)])

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, C, K, h, w] from shortcut and convolutions; one log variance per channel."""
        stacks = self.stacked(pixels if pixels.ndim == 5 else pixels[:, :, None])
        count, flat = stacks.shape[1], stacks.flatten(0, 1)
        patches = F.pixel_unshuffle(flat, self.stride) - self.average[:, None, None]
        seen = through(self.see, F.pixel_unshuffle(flat, self.stride // 2), count)
        mean = F.conv2d(patches, self.linear_in[:, :, None, None]) + seen
        mean = mean.unflatten(0, (-1, count)).transpose(1, 2)
        return mean, self.log_variance[:, None].expand_as(mean)

    def decode_raw(self, raw: Tensor) -> Tensor:
        """Shortcut plus convolutions: [B, C, K, h, w] → [B, 3, F, H, W]."""
        count, flat = raw.shape[2], raw.transpose(1, 2).flatten(0, 1)
        patches = F.conv2d(flat, self.linear_out[:, :, None, None], self.average)
        drawn = through(self.draw, flat, count)
        stacks = F.pixel_shuffle(patches, self.stride) + F.pixel_shuffle(drawn, self.stride // 2)
        frames = stacks.unflatten(0, (-1, count)).unflatten(2, (self.time_stride, 3))
        return frames.permute(0, 3, 1, 2, 4, 5).flatten(2, 3)[:, :, self.time_stride - 1 :]

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, not clamped, with as many axes as the latents."""
        return super().decode(latents) if latents.ndim == 5 else super().decode(latents[:, :, None])[:, :, 0]


def stacked(pixels: Tensor, deep: int) -> Tensor:
    """Frames [B, 3, 1 + deep·(K − 1), H, W] → groups [B, K, 3·deep, H, W], the first one of copies."""
    first = pixels[:, :, :1].expand(-1, -1, deep - 1, -1, -1)
    whole = torch.cat((first, pixels), 2).unflatten(2, (-1, deep))
    return whole.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)


def through(layers: nn.Sequential, x: Tensor, count: int) -> Tensor:
    """The layers one after the other on [B·count, …]; those that recall are told the count."""
    for layer in layers:
        x = layer(x, count) if isinstance(layer, CausalCache) else layer(x)
    return x


@registered
class FramewiseCodec(Codec):
    """A codec of pictures on every frame by itself: nothing is saved in time, every frame stays exact.

    Args:
        inner: the codec, or the {"kind", "config"} of one.
    """

    kind, of_clips = "framewise", True

    def __init__(self, inner: Codec | dict[str, Any]):
        super().__init__()
        if not isinstance(inner, Codec):
            made = KINDS[inner["kind"]](**inner["config"])
            assert isinstance(made, Codec)
            inner = made
        self.inner = inner
        self.stride, self.latent_channels, self.reach = inner.stride, inner.latent_channels, inner.reach

    def config(self) -> dict[str, Any]:
        """Kind and config of the codec of pictures."""
        return {"inner": {"kind": self.inner.kind, "config": self.inner.config()}}

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        """[C, F, h, w] of a clip of this size."""
        channels, *flat = self.inner.latent_shape(width, height)
        return channels, self.latent_frames(frames), *flat

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Every frame's latents [B, C, F, h, w]; noise as they are."""
        pixels = pixels if pixels.ndim == 5 else pixels[:, :, None]
        drawn = None if noise is None else noise.transpose(1, 2).flatten(0, 1)
        latents = self.inner.encode(pixels.transpose(1, 2).flatten(0, 1), drawn)
        return latents.unflatten(0, (len(pixels), -1)).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Every frame's pixels, not clamped."""
        if latents.ndim == 4:
            return self.inner.decode(latents)
        pixels = self.inner.decode(latents.transpose(1, 2).flatten(0, 1))
        return pixels.unflatten(0, (len(latents), -1)).transpose(1, 2)


@registered
class VideoAutoencoderCodec(PretrainedCodec):
    """One of diffusers' video autoencoders, from its own config.

    Args:
        architecture: its class; config: its own arguments, by its own names.
    """

    kind = "video autoencoder"

    def __init__(self, architecture: str, **config: Any):
        import diffusers

        one_of("codec", architecture, VIDEO_AUTOENCODERS)
        network = getattr(diffusers, architecture).from_config(config)
        shift, scale = (one.clone() for one in statistics(network))
        super().__init__(network, shift, scale, *strides(network), video=True)
        self._config = {"architecture": architecture, **config}

    def measure(self) -> None:
        """Read the normalisation again: some keep it among their weights."""
        for own, known in zip((self.shift, self.scale), statistics(self.network), strict=True):
            own.copy_(known)

    def config(self) -> dict[str, Any]:
        """The class and its arguments."""
        return self._config


def strides(network: Any) -> tuple[int, int]:
    """(pixels a side, frames) that a latent of a video autoencoder stands for."""
    config = network.config
    space = vars(network).get("spatial_compression_ratio") or config.get("scale_factor_spatial")
    time = vars(network).get("temporal_compression_ratio") or config.get("scale_factor_temporal")
    if space is None:
        space = 2 ** (len(config["block_out_channels"]) - 1)
    return int(space), int(time or config.get("temporal_compression_ratio") or 4)
