"""Codecs: pixels ↔ latents that a denoiser can afford to look at.

Latents are normalised by a shift and a scale per channel, so that theories may take data of unit variance.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.models.interface import Codec, TrainableCodec, registered


@registered
class PixelCodec(Codec):
    """The identity: latents are pixels, of three channels or of one (grey)."""

    kind, stride, latent_channels, reach = "pixels", 1, 3, (0, 0)

    def __init__(self, grey: bool = False):
        super().__init__()
        if grey:
            self.latent_channels = 1

    def config(self) -> dict[str, Any]:
        """Whether they are grey."""
        return {"grey": True} if self.latent_channels == 1 else {}

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """The pixels, or their mean over colours."""
        return pixels.mean(1, keepdim=True) if self.latent_channels == 1 else pixels

    def decode(self, latents: Tensor) -> Tensor:
        """The pixels, always of three channels."""
        return latents.expand(-1, 3, *latents.shape[2:]) if self.latent_channels == 1 else latents


class NormalizedCodec(TrainableCodec):
    """What trained codecs share: raw latents with a diagonal normal posterior, normalised afterwards.

    A subclass gives `posterior` and `decode_raw`; shift and scale are fixed by `fit_normalization`.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, stride: int, latent_channels: int):
        super().__init__()
        self.stride, self.latent_channels = stride, latent_channels
        self.register_buffer("shift", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("scale", torch.ones(latent_channels, 1, 1))

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B, C, h, w] of the raw latents."""
        raise TypeError(f"{type(self).__name__} gives no posterior")

    def decode_raw(self, raw: Tensor) -> Tensor:
        """Pixels from raw latents."""
        raise TypeError(f"{type(self).__name__} does not decode")

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """The posterior's mode, or a sample of it; normalised."""
        mean, log_variance = self.posterior(pixels)
        raw = mean if noise is None else mean + (log_variance / 2).exp() * noise
        return (raw - self.shift) / self.scale

    def distribution(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation of the posterior, normalised."""
        mean, log_variance = self.posterior(pixels)
        return (mean - self.shift) / self.scale, (log_variance / 2).exp() / self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, not clamped."""
        return self.decode_raw(latents * self.scale + self.shift)

    def reconstruct(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels painted from a sample of the posterior, and its KL to the standard normal [B]."""
        mean, log_variance = self.posterior(pixels)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return self.decode_raw(mean + (log_variance / 2).exp() * noise), kl.flatten(1).sum(1)

    def prepare(self, pixels: Tensor) -> None:
        """Random weights need no look at the data."""

    @torch.no_grad()
    def fit_normalization(self, pixels: Tensor) -> None:
        """Shift and scale per channel from the posterior's means on pixels [N, 3, H, W]."""
        means = torch.cat([self.posterior(part)[0] for part in pixels.split(32)])
        means = means.movedim(1, 0).flatten(1)
        self.shift.copy_(means.mean(1).view_as(self.shift))
        self.scale.copy_(means.std(1).clamp(min=1e-6).view_as(self.scale))


class Refine(nn.Module):
    """Two convolutions beside a shortcut; starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(width, width, 3, padding=1),
            zero(nn.Conv2d(width, width, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, h, w] → the same."""
        return x + self.second(F.silu(self.first(F.silu(x))))


def zero(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer, answering 0 for now."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


@registered
class ResidualCodec(NormalizedCodec):
    """Principal components of patches as the shortcut, convolutions for what they miss.

    The shortcut is fitted in a second and already draws recognisable pictures; training starts there
    instead of at noise. Residual autoencoding: arXiv:2410.10733, with averaging for a shortcut.
    The posterior starts wide, so that the convolutions learn to clean up latents that are a little wrong,
    as a denoiser's are.

    Args:
        stride: a patch of stride × stride pixels becomes one latent; even, at least 2.
        latent_channels: numbers in a latent, at most 3·stride².
        width: channels of the convolutions at half the stride.
        deep: pictures laid on top of each other, so that a pixel has 3·deep colors.
    """

    kind = "residual"
    reach = (6, 0)
    linear_in: Tensor
    linear_out: Tensor
    average: Tensor

    def __init__(self, stride: int = 8, latent_channels: int = 16, width: int = 32, deep: int = 1):
        if stride % 2 or stride < 2 or latent_channels > 3 * deep * stride**2:
            most = 3 * deep * stride**2
            raise Refused(
                f"A codec of stride {stride} with {latent_channels} channels cannot be: the stride must be "
                f"even, and a patch of {stride}×{stride} pixels holds {most}. Take model.codec_stride 4 or 8."
            )
        super().__init__(stride, latent_channels)
        self._config = {"stride": stride, "latent_channels": latent_channels, "width": width}
        half, patch = stride // 2, 3 * deep * stride**2
        self.linear_in = nn.Parameter(torch.randn(latent_channels, patch) / patch**0.5)
        self.linear_out = nn.Parameter(torch.randn(patch, latent_channels) / latent_channels**0.5)
        self.register_buffer("average", torch.zeros(patch))
        self.log_variance = nn.Parameter(torch.full((latent_channels, 1, 1), -2.5))
        self.see = nn.Sequential(
            nn.Conv2d(3 * deep * half**2, width, 3, padding=1),
            Refine(width),
            nn.Conv2d(width, 2 * width, 2, stride=2),
            Refine(2 * width),
            zero(nn.Conv2d(2 * width, latent_channels, 1)),
        )
        self.draw = nn.Sequential(
            nn.Conv2d(latent_channels, 4 * width, 3, padding=1),
            Refine(4 * width),
            nn.PixelShuffle(2),
            Refine(width),
            Refine(width),
            zero(nn.Conv2d(width, 3 * deep * half**2, 3, padding=1)),
        )

    def config(self) -> dict[str, Any]:
        """The arguments it was built with."""
        return self._config

    def prepare(self, pixels: Tensor) -> None:
        """Fit the shortcut: the patches' principal components, each scaled to the root of its deviation.

        Half-way between whitening, which would blow up the faintest detail, and leaving it unlearnably faint.
        """
        self.fit(pixels)

    def fit(self, pixels: Tensor) -> None:
        """Fit the shortcut to pictures [N, colors, H, W]."""
        with torch.no_grad():
            patches = F.pixel_unshuffle(pixels.double(), self.stride).movedim(1, -1).flatten(0, -2)
            average = patches.mean(0)
            centred = patches - average
            values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
            values = values.flip(0)[: self.latent_channels].clamp(min=1e-8)
            vectors = vectors.flip(1)[:, : self.latent_channels]
            spread = values**0.25
            self.average.copy_(average)
            self.linear_in.copy_((vectors / spread).T)
            self.linear_out.copy_(vectors * spread)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, C, h, w] from shortcut and convolutions; one log variance per channel."""
        patches = F.pixel_unshuffle(pixels, self.stride) - self.average[:, None, None]
        seen = self.see(F.pixel_unshuffle(pixels, self.stride // 2))
        mean = F.conv2d(patches, self.linear_in[:, :, None, None]) + seen
        return mean, self.log_variance.expand_as(mean)

    def decode_raw(self, raw: Tensor) -> Tensor:
        """Shortcut plus convolutions."""
        patches = F.conv2d(raw, self.linear_out[:, :, None, None], self.average)
        return F.pixel_shuffle(patches, self.stride) + F.pixel_shuffle(self.draw(raw), self.stride // 2)

    @torch.no_grad()
    def fit_normalization(self, pixels: Tensor) -> None:
        """Shift per channel, one scale for all: strong components stay stronger than faint ones."""
        super().fit_normalization(pixels)
        self.scale.fill_(self.scale.square().mean().sqrt().item())


@registered
class AutoencoderCodec(NormalizedCodec):
    """diffusers' AutoencoderKL or AutoencoderTiny, new or from a folder.

    Args:
        architecture: which of the two; config: its own arguments, by its own names.
    """

    kind = "autoencoder"

    def __init__(self, architecture: Literal["AutoencoderKL", "AutoencoderTiny"], **config: Any):
        import diffusers

        network = getattr(diffusers, architecture).from_config(config)
        levels = len(
            config["block_out_channels" if architecture == "AutoencoderKL" else "encoder_block_out_channels"]
        )
        super().__init__(2 ** (levels - 1), config["latent_channels"])
        self._config = {"architecture": architecture, **config}
        self.network = network

    def config(self) -> dict[str, Any]:
        """The class and its arguments."""
        return self._config

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """AutoencoderKL's own; AutoencoderTiny has a narrow one of fixed width."""
        if self._config["architecture"] == "AutoencoderKL":
            posterior = self.network.encode(pixels).latent_dist
            return posterior.mean, posterior.logvar
        mean = self.network.encode(pixels).latents
        return mean, torch.full_like(mean, -6.0)

    def decode_raw(self, raw: Tensor) -> Tensor:
        """The decoder's pixels."""
        return self.network.decode(raw).sample

    @classmethod
    def small(
        cls, architecture: Literal["AutoencoderKL", "AutoencoderTiny"], stride: int, channels: int, width: int
    ):
        """A small new one of the given stride (a power of two), latent channels, and first-level width."""
        levels = stride.bit_length()
        if stride != 2 ** (levels - 1):
            raise Refused(
                f"model.codec_stride = {stride} is no power of two, as {architecture} needs. Choose 4 or 8."
            )
        if architecture == "AutoencoderTiny":
            widths = [width] * levels
            return cls(
                architecture,
                in_channels=3,
                out_channels=3,
                latent_channels=channels,
                encoder_block_out_channels=widths,
                decoder_block_out_channels=widths,
                num_encoder_blocks=[1] * levels,
                num_decoder_blocks=[1] * levels,
            )
        widths = [width * min(2**level, 4) for level in range(levels)]
        return cls(
            architecture,
            in_channels=3,
            out_channels=3,
            latent_channels=channels,
            block_out_channels=widths,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            norm_num_groups=min(8, width),
            layers_per_block=1,
        )
