"""Control modules of our own networks: a ControlNet, an IP-Adapter, or a picture that the network reads.

Sources: Zhang et al. 2023, arXiv:2302.05543 (copied blocks, outputs that start at zero);
Ye et al. 2023, arXiv:2308.06721 (decoupled cross-attention); Brooks et al. 2023, arXiv:2211.09800 (the
source's latents as further channels). Of clips, control and source are clips too, read frame by frame of
the latents; the reference stays a picture.
"""

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.models.codecs.video import stacked
from sfumato.models.condition import Condition
from sfumato.models.control.base import ControlModule, Hook, weight_of
from sfumato.models.control.image_encoders import ImageConditionEncoder, ImageEncoder
from sfumato.models.interface import Denoiser, Model
from sfumato.models.networks.dit import DiT
from sfumato.models.networks.unet import UNet

Layer = TypeVar("Layer", bound=nn.Module)


def zeroed(layer: Layer) -> Layer:
    """The layer, its weights and bias 0."""
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    return layer


def patched(x: Tensor, size: int) -> Tensor:
    """[B, C, H, W] → [B, H/s·W/s, C·s·s]; of a clip [B, C, K, H, W] → [B·K, H/s·W/s, C·s·s]."""
    flat = x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x
    return F.pixel_unshuffle(flat, size).flatten(2).transpose(1, 2)


def resample_frames(control: Tensor, x: Tensor, name: str) -> Tensor:
    """A control [B, C, (K,) H, W] with as many latent frames as x [B, C, (K,) h, w]; a still one is repeated.

    Raises:
        Refused: a clip of another length.
    """
    if control.ndim == 4:
        return control
    frames = x.shape[2] if x.ndim == 5 else 1
    if control.shape[2] not in (1, frames):
        raise Refused(
            f"{name} has {control.shape[2]} latent frames, but {frames} are drawn. Give a clip as long as "
            "what is drawn, or a picture."
        )
    return control.expand(-1, -1, frames, -1, -1)


def control_pixels(control: Tensor, x: Tensor, name: str, deep: int) -> Tensor:
    """A control in bytes as pixels in [0, 1] with as many latent frames as x.

    A picture [B, 3, H, W] beside latents that stand for `deep` frames is a clip of one frame.
    """
    still = control.ndim == 4 and control.shape[1] == 3
    whole = control.repeat(1, deep, 1, 1) if still else control
    return resample_frames(whole.to(x.dtype) / 255, x, name)


def image_features(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] → bytes: what a control picture is stored as."""
    return pixels.clamp(-1, 1).add(1).mul(127.5).round().byte()


def pixels_of(deep: int) -> ImageConditionEncoder:
    """Pixels as they are, in bytes; of a clip, those of the `deep` frames of each latent together."""

    def encode(pixels: Tensor) -> Tensor:
        return image_features(pixels if pixels.ndim == 4 else stacked(pixels, deep).transpose(1, 2))

    of = f" of {deep} frames" if deep > 1 else ""
    return ImageConditionEncoder(encode, f"pixels in bytes 1{of}", moves=True)


class OwnControlNet(ControlModule):
    """Copies of the first blocks read the control picture; what they say is added, block by block, through
    layers that start at zero.

    `control` [B, 3, H, W] is the picture itself in bytes; none of it (all black) says nothing. Of a clip it
    is [B, 3·deep, K, H, W]: the frames that a latent stands for, laid on top of each other.
    """

    kind = "controlnet"

    def __init__(self, base: DiT, stride: int, layers: int = 0, name: str = "control", deep: int = 1) -> None:
        """stride, deep: pixels a side and frames that a latent stands for; layers: 0 for half the blocks."""
        super().__init__(name)
        depth, self.deep = len(base.blocks), deep
        if layers > depth:
            raise Refused(f"model.control_layers = {layers}, but the base has {depth} blocks. Say fewer.")
        self.stride, self.layers = stride, layers or (depth + 1) // 2
        self.side, width = stride * base.patch, base.width
        self.hint = nn.Sequential(
            nn.Linear(3 * deep * self.side**2, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in base.blocks[: self.layers])
        self.outs = nn.ModuleList(zeroed(nn.Linear(width, width)) for _ in range(self.layers))

    def config(self) -> dict[str, Any]:
        """Stride, layers, name; of clips also deep."""
        known = {"stride": self.stride, "layers": self.layers, "name": self.name}
        return known | ({"deep": self.deep} if self.deep > 1 else {})

    def encoder(self, model: Model) -> ImageConditionEncoder:
        """The pixels themselves, in bytes; of a clip, those of each latent together."""
        return pixels_of(self.deep)

    def hooks(self, base: Denoiser, x: Tensor, condition: Condition) -> Iterator[Hook]:
        """One on each of the first blocks."""
        assert isinstance(base, DiT)
        weight = weight_of(condition, self.name)
        control = control_pixels(condition[self.name], x, self.name, self.deep)
        hint = self.hint(patched(control, self.side)).unflatten(0, (len(x), -1)).flatten(1, 2)
        state: list[Tensor] = []

        def acting(index: int) -> Any:
            def add(block: nn.Module, given: tuple[Any, ...], answer: Tensor) -> Tensor:
                inside = state[-1] if index else given[0] + hint
                state.append(self.blocks[index](inside, *given[1:]))
                return answer + weight * self.outs[index](state[-1])

            return add

        return (Hook(base.blocks[i], acting(i)) for i in range(self.layers))


class OwnIPAdapter(ControlModule):
    """Attention to a picture's features beside the attention to the text: the same queries, keys and values
    of their own, values that start at zero.

    Two layers of self-attention read the features first. What they find on the whole joins the prompt's
    summary, which in our DiT paces every block and draws the canvas, through layers that start at zero.

    `reference` [B, L, D] holds the features; all zero says nothing.
    """

    kind = "ip-adapter"

    def __init__(self, base: DiT, image: ImageEncoder, name: str = "reference") -> None:
        super().__init__(name)
        width = base.width
        self.image = image
        self.enter = nn.Linear(image.width, width)
        layer = nn.TransformerEncoderLayer(
            width, base.heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.read = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.summary = zeroed(nn.Linear(width, width)) if hasattr(base, "pooled") else None
        self.sketch = zeroed(nn.Linear(width, 4 * width)) if base.canvas is not None else None
        self.keys = nn.ModuleList(nn.Linear(width, width) for _ in base.blocks)
        self.values = nn.ModuleList(zeroed(nn.Linear(width, width)) for _ in base.blocks)

    def config(self) -> dict[str, Any]:
        """The image encoder and the name."""
        return {"image": self.image.config(), "name": self.name}

    def encoder(self, model: Model) -> ImageConditionEncoder:
        """The image encoder's features."""
        return self.image.encoder(model)

    def unfreeze(self, base: Denoiser) -> None:
        """All but the image encoder."""
        self.requires_grad_(True)
        self.image.requires_grad_(False)

    def hooks(self, base: Denoiser, x: Tensor, condition: Condition) -> Iterator[Hook]:
        """Two on each block: one takes the queries, one adds what is seen."""
        assert isinstance(base, DiT)
        weight = weight_of(condition, self.name)
        features = self.read(self.enter(condition[self.name].to(x.dtype)))
        whole = features.mean(1)
        for layer, part in ((self.summary, "pooled"), (self.sketch, "canvas")):
            if layer is not None:
                place: Any = getattr(base, part)[1]
                more = weight * layer(whole)
                yield Hook(place, lambda layer, given, answer, more=more: answer + more)
        blocks: list[Any] = list(base.blocks)
        for block, keys, values in zip(blocks, self.keys, self.values, strict=True):
            held: list[Tensor] = []
            yield Hook(block.qkv, lambda layer, given, answer, held=held: held.append(answer))

            def look(
                layer: nn.Module,
                given: Any,
                named: Any,
                block: Any = block,
                keys: Any = keys,
                values: Any = values,
                held: list[Tensor] = held,
            ) -> Any:
                q = block.q_norm(block.split(held.pop(), 3)[0])
                k, v = block.k_norm(block.split(keys(features), 1)[0]), block.split(values(features), 1)[0]
                seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
                return (given[0] + weight * seen,), named

            yield Hook(block.out, look, before=True)


class EditSource(ControlModule):
    """A picture or clip to be edited: its latents as further channels, by a layer that starts at zero.

    `edit_source` [B, C, (K,) H, W]: latents of the source; the base learns along.
    """

    kind = "edit"
    trains_base = True

    def __init__(self, base: DiT, name: str = "edit_source") -> None:
        super().__init__(name)
        self.patch = base.patch
        self.enter = zeroed(nn.Linear(base.enter.in_features, base.width))

    def config(self) -> dict[str, Any]:
        """The name."""
        return {"name": self.name}

    def encoder(self, model: Model) -> ImageConditionEncoder:
        """The model's own codec."""
        return ImageConditionEncoder(model.encode, model.codec.fingerprint(), moves=True)

    def hooks(self, base: Denoiser, x: Tensor, condition: Condition) -> Iterator[Hook]:
        """One on the layer through which latents enter."""
        assert isinstance(base, DiT)
        weight = weight_of(condition, self.name)
        source = self.enter(
            patched(resample_frames(condition[self.name].to(x.dtype), x, self.name), self.patch)
        )
        yield Hook(base.enter, lambda layer, given, answer: answer + weight * source)


class ControlInput(ControlModule):
    """A control picture that the denoiser itself reads beside the noisy latents; all of it learns along.

    Convolutions over each latent's pixels, the last starting at zero, join the layer through which latents
    enter. `control` is as a ControlBranch reads it.
    """

    kind = "control"
    trains_base = True

    def __init__(self, base: DiT | UNet, stride: int, name: str = "control", deep: int = 1) -> None:
        """stride, deep: pixels a side and frames that a latent stands for."""
        super().__init__(name)
        self.stride, self.deep = stride, deep
        patch = base.patch if isinstance(base, DiT) else 1
        width = base.width if isinstance(base, DiT) else base.network.conv_in.out_channels
        self.read = nn.Sequential(
            nn.Conv2d(3 * deep * stride**2, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            zeroed(nn.Conv2d(width, width, patch, stride=patch)),
        )

    def config(self) -> dict[str, Any]:
        """Stride and name; of clips also deep."""
        known = {"stride": self.stride, "name": self.name}
        return known | ({"deep": self.deep} if self.deep > 1 else {})

    def encoder(self, model: Model) -> ImageConditionEncoder:
        """The pixels themselves, in bytes; of a clip, those of each latent together."""
        return pixels_of(self.deep)

    def hooks(self, base: Denoiser, x: Tensor, condition: Condition) -> Iterator[Hook]:
        """One on the layer through which latents enter."""
        control = control_pixels(condition[self.name], x, self.name, self.deep)
        flat = control.transpose(1, 2).flatten(0, 1) if control.ndim == 5 else control
        said = weight_of(condition, self.name) * self.read(F.pixel_unshuffle(flat, self.stride))
        if isinstance(base, DiT):
            said = said.flatten(2).transpose(1, 2)
        place: Any = base.enter if isinstance(base, DiT) else base.network.conv_in  # type: ignore[union-attr]
        yield Hook(place, lambda layer, given, answer: answer + said)
