"""Image encoders: what an IP-Adapter sees of a reference picture."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.models.interface import Codec, Model
from sfumato.models.load_network import load_network
from sfumato.models.networks.tokens import position_features

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, where a folder says nothing of its own."""


@dataclass(frozen=True)
class ImageConditionEncoder:
    """How a picture that guides becomes a tensor of the condition.

    encode: pixels [B, 3, H, W] in [-1, 1] → [B, …]; fingerprint: changes whenever its answers would; size
    (width, height): what the picture is fitted to, None for the size of what is drawn. Where clips are drawn
    pixels are [B, 3, F, H, W]: of as many frames if it moves, else of one. silent: what stands beside a
    negative, [1, …]; by default zeros.
    """

    encode: Callable[[Tensor], Tensor]
    fingerprint: str
    size: tuple[int, int] | None = None
    moves: bool = False
    silent: Tensor | None = None


def first_frame(pixels: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] as they are; of clips [B, 3, F, H, W] their first frames."""
    return pixels if pixels.ndim == 4 else pixels[:, :, 0]


class ImageEncoder(nn.Module, ABC):
    """Pictures → features [B, L, D]; `width` is D, `size` what pictures are fitted to."""

    width: int
    size: tuple[int, int] | None = None

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain values from which `image_encoder` makes the same."""

    @abstractmethod
    def encoder(self, model: Model) -> ImageConditionEncoder:
        """How a reference becomes features."""


PLACE = 32
"""Numbers that say where in a picture a feature lies."""


class CodecFeatures(ImageEncoder):
    """Features for small models: patches of the codec's own latents, each with where it lies."""

    def __init__(self, channels: int, side: int, patch: int = 2) -> None:
        """channels, side: of the latents of a reference, a square of `side` latents."""
        super().__init__()
        self.channels, self.side, self.patch = channels, side, patch
        self.width = channels * patch * patch + PLACE

    def config(self) -> dict[str, Any]:
        """Which encoder, and its sizes."""
        return {"source": "codec", "channels": self.channels, "side": self.side, "patch": self.patch}

    def encoder(self, model: Model) -> ImageConditionEncoder:
        """Latents of a square picture, cut into patches."""

        def encode(pixels: Tensor) -> Tensor:
            latents = model.encode(first_frame(pixels))
            latents = latents[:, :, 0] if latents.ndim == 5 else latents
            seen = F.pixel_unshuffle(latents, self.patch)
            where = position_features(*seen.shape[-2:], seen.device).to(seen.dtype)
            return torch.cat((seen.flatten(2).transpose(1, 2), where.expand(len(seen), -1, -1)), dim=-1)

        side = self.side * model.codec.stride
        return ImageConditionEncoder(
            encode, f"{model.codec.fingerprint()} patches {self.patch}, placed", (side, side)
        )


class VisionFeatures(ImageEncoder):
    """CLIP, SigLIP or DINO from a local folder of transformers; frozen.

    Args:
        tokens: the features of all patches [B, L, D] instead of the summary [B, 1, D].
        layer: whose features: 0 the last, normalised; -2 the one before, as diffusers' pipelines take them.
        grey: beside a negative stand the features of a picture of the mean color, not zeros, as in
            diffusers' pipelines of UNets.
    """

    def __init__(self, folder: str, tokens: bool = False, layer: int = 0, grey: bool = False) -> None:
        super().__init__()
        self.folder, self.tokens, self.layer, self.grey = folder, tokens, layer, grey
        self.network, self.is_projected = vision_network(Path(folder).expanduser(), tokens)
        config = self.network.config
        side = int(config.image_size if isinstance(config.image_size, int) else config.image_size[0])
        self.size = (side, side)
        self.width = int(config.projection_dim if self.is_projected and not tokens else config.hidden_size)
        mean, std = statistics(Path(folder).expanduser())
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def config(self) -> dict[str, Any]:
        """The folder, and what of its answers is taken."""
        further = {"layer": self.layer} if self.layer else {}
        further |= {"grey": True} if self.grey else {}
        return {"source": self.folder, "tokens": self.tokens, **further}

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, (F,) H, W] in [-1, 1], of a clip its first frame → features [B, L, D]."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return self.features(((first_frame(pixels).to(mean) + 1) / 2 - mean) / std)

    def features(self, values: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] → features [B, L, D]."""
        answer = self.network(pixel_values=values, output_hidden_states=bool(self.layer))
        if self.layer:
            return answer.hidden_states[self.layer]
        if self.tokens:
            return answer.last_hidden_state
        pooled = answer.image_embeds if self.is_projected else answer.pooler_output
        return pooled[:, None]

    def encoder(self, model: Model) -> ImageConditionEncoder:
        """The network's features of a square picture of its own size."""
        weights = sum(float(one.double().sum()) for one in self.network.parameters())
        name = f"{type(self.network).__name__} {weights!r} {self.tokens}" + f" {self.layer}" * bool(
            self.layer
        )
        silent = None
        if self.grey:
            with torch.no_grad():
                silent = self.features(
                    self.get_buffer("mean").new_zeros(1, 3, *reversed(self.size or (0, 0)))
                )
        return ImageConditionEncoder(self, name, self.size, silent=silent)


def vision_network(folder: Path, tokens: bool = False) -> tuple[Any, bool]:
    """The vision half of a model in a local folder, and whether its summary is projected (CLIP's).

    Args:
        tokens: only the features of patches are read, no summary.

    Raises:
        Refused: no such folder, or nothing in it that sees.
    """
    from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection

    if not (folder / "config.json").is_file():
        raise Refused(
            f'model.image_encoder = "{folder}" holds no config.json. Give a folder that transformers '
            'saved (CLIP, SigLIP, DINO), or "codec".'
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if config.model_type in ("clip", "clip_vision_model"):
            return load_network(CLIPVisionModelWithProjection, folder), True
        network = load_network(AutoModel, folder, unused=["pooler"] if tokens else [])
    except Refused:
        raise
    except (OSError, ValueError) as problem:
        raise Refused(f"{folder} does not load as an image encoder: {problem}.") from problem
    return getattr(network, "vision_model", network), False


def statistics(folder: Path) -> tuple[Any, Any]:
    """Mean and deviation of the pixels that an encoder expects."""
    import json

    file = folder / "preprocessor_config.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return said.get("image_mean", MEAN), said.get("image_std", STD)


def image_encoder(source: str, codec: Codec, pixels: int, **known: Any) -> ImageEncoder:
    """The image encoder a recipe names: "codec", or a folder.

    Args:
        pixels: of a reference's side, for "codec".
    """
    if source == "codec":
        latents = int(known.get("side") or pixels // codec.stride)
        patch = int(known.get("patch") or (1 if latents % 2 else 2))
        return CodecFeatures(int(known.get("channels") or codec.latent_channels), latents, patch)
    return VisionFeatures(
        source, bool(known.get("tokens", False)), int(known.get("layer", 0)), bool(known.get("grey", False))
    )
