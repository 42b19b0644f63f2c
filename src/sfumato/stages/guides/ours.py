"""Guides of our own DiT: a ControlNet, an IP-Adapter, and a source picture to be edited.

Sources: Zhang et al. 2023, arXiv:2302.05543 (copied blocks, outputs that start at zero);
Ye et al. 2023, arXiv:2308.06721 (decoupled cross-attention); Brooks et al. 2023, arXiv:2211.09800 (the
source's latents as further channels).
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.stages.dit import DiT
from sfumato.stages.image import Encoder, ImageEncoder
from sfumato.stages.interface import Condition, Denoiser, Model

from .guide import Guide, weight_of

Handle = torch.utils.hooks.RemovableHandle


def zeroed(layer: nn.Linear) -> nn.Linear:
    """The layer, its weights and bias 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def patched(x: Tensor, size: int) -> Tensor:
    """[B, C, H, W] → [B, H/s·W/s, C·s·s]."""
    return F.pixel_unshuffle(x, size).flatten(2).transpose(1, 2)


def shown(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] → bytes: what a control picture is stored as."""
    return pixels.clamp(-1, 1).add(1).mul(127.5).round().byte()


class ControlBranch(Guide):
    """Copies of the first blocks read the control picture; what they say is added, block by block, through
    layers that start at zero.

    `control` [B, 3, H, W] is the picture itself in bytes; none of it (all black) says nothing.
    """

    kind = "controlnet"

    def __init__(self, base: DiT, stride: int, layers: int = 0, name: str = "control") -> None:
        super().__init__(name)
        depth = len(base.blocks)
        self.stride, self.layers = stride, min(layers, depth) if layers else (depth + 1) // 2
        self.side, width = stride * base.patch, base.width
        self.hint = nn.Sequential(
            nn.Linear(3 * self.side**2, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in base.blocks[: self.layers])
        self.outs = nn.ModuleList(zeroed(nn.Linear(width, width)) for _ in range(self.layers))

    def config(self) -> dict[str, Any]:
        """Stride, layers, name."""
        return {"stride": self.stride, "layers": self.layers, "name": self.name}

    def encoder(self, model: Model) -> Encoder:
        """The pixels themselves, in bytes."""
        return Encoder(shown, "pixels in bytes 1")

    def hooks(self, base: Denoiser, x: Tensor, condition: Condition) -> Iterator[Handle]:
        """One on each of the first blocks."""
        assert isinstance(base, DiT)
        weight = weight_of(condition, self.name)
        hint = self.hint(patched(condition[self.name].to(x.dtype) / 255, self.side))
        state: list[Tensor] = []

        def acting(index: int) -> Any:
            def add(block: nn.Module, given: tuple[Any, ...], answer: Tensor) -> Tensor:
                inside = state[-1] if index else given[0] + hint
                state.append(self.blocks[index](inside, *given[1:]))
                return answer + weight * self.outs[index](state[-1])

            return add

        return (base.blocks[i].register_forward_hook(acting(i)) for i in range(self.layers))


class Looks(Guide):
    """Attention to a picture's features beside the attention to the text: the same queries, keys and values
    of their own, values that start at zero.

    `reference` [B, L, D] holds the features; all zero says nothing.
    """

    kind = "ip-adapter"

    def __init__(self, base: DiT, image: ImageEncoder, name: str = "reference") -> None:
        super().__init__(name)
        width = base.width
        self.image = image
        self.project = nn.Sequential(nn.Linear(image.width, width), nn.LayerNorm(width))
        self.keys = nn.ModuleList(nn.Linear(width, width) for _ in base.blocks)
        self.values = nn.ModuleList(zeroed(nn.Linear(width, width)) for _ in base.blocks)

    def config(self) -> dict[str, Any]:
        """The image encoder and the name."""
        return {"image": self.image.config(), "name": self.name}

    def encoder(self, model: Model) -> Encoder:
        """The image encoder's features."""
        return self.image.encoder(model)

    def free(self, base: Denoiser) -> None:
        """All but the image encoder."""
        self.requires_grad_(True)
        self.image.requires_grad_(False)

    def hooks(self, base: Denoiser, x: Tensor, condition: Condition) -> Iterator[Handle]:
        """Two on each block: one hears the queries, one adds what is seen."""
        assert isinstance(base, DiT)
        weight = weight_of(condition, self.name)
        features = self.project(condition[self.name].to(x.dtype))
        blocks: list[Any] = list(base.blocks)
        for block, keys, values in zip(blocks, self.keys, self.values, strict=True):
            held: list[Tensor] = []
            yield block.qkv.register_forward_hook(lambda layer, given, answer, held=held: held.append(answer))

            def look(
                layer: nn.Module, given: Any, block: Any = block, keys: Any = keys, values: Any = values,
                held: list[Tensor] = held,
            ) -> tuple[Tensor]:  # fmt: skip
                q = block.q_norm(block.split(held.pop(), 3)[0])
                k, v = block.k_norm(block.split(keys(features), 1)[0]), block.split(values(features), 1)[0]
                seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
                return (given[0] + weight * seen,)

            yield block.out.register_forward_pre_hook(look)


class Source(Guide):
    """A picture to be edited: its latents as further channels, through a layer that starts at zero.

    `edit_source` [B, C, H, W]: latents of the source; the base learns along.
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

    def encoder(self, model: Model) -> Encoder:
        """The model's own codec."""
        return Encoder(model.encode, model.codec.fingerprint())

    def hooks(self, base: Denoiser, x: Tensor, condition: Condition) -> Iterator[Handle]:
        """One on the layer through which latents enter."""
        assert isinstance(base, DiT)
        weight = weight_of(condition, self.name)
        source = self.enter(patched(condition[self.name].to(x.dtype), self.patch))
        yield base.enter.register_forward_hook(lambda layer, given, answer: answer + weight * source)
