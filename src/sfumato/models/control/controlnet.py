"""ControlNets of pretrained families, by diffusers' own classes, begun from the base's weights.

A ControlNet is given what its base is given: a hook before the base's network hands the same arguments to the
ControlNet, and its residuals on to the base. How one class is made and called stands in its family's file, as
`Family.controlnet`; that of the UNets, which our own shares, stands here.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.models.condition import Condition
from sfumato.models.control.base import WEAK, ControlModule, Hook, weight_of
from sfumato.models.control.image_encoders import ImageConditionEncoder
from sfumato.models.control.own import image_features
from sfumato.models.interface import Denoiser, Model
from sfumato.models.load_network import load_network

Given = dict[str, Any]
CHANNELS = (16, 32, 96, 256)
"""Channels in which a UNet's ControlNet reads its picture, as diffusers': one more for each halving."""


class ControlNetAdapter(ABC):
    """How one of diffusers' ControlNet classes is made from its base, and called."""

    network: ClassVar[str]
    """The class of the base's network."""
    control: ClassVar[str]
    """The ControlNet's class."""
    reads_pixels: ClassVar[bool] = False
    """Whether the control is pixels in [0, 1]; else it is latents."""
    prompted_only: ClassVar[bool] = False
    """Whether the pipeline calls the ControlNet beside the prompt alone, and uses its answer twice."""
    shared_config: ClassVar[tuple[str, ...]] = ()
    """What base and ControlNet must have alike in their configs."""
    plain_config: ClassVar[Mapping[str, Any]] = {}
    """What we know how to feed; ControlNets that differ here read something else beside the picture."""
    encoding: ClassVar[str] = ""
    """What the control's latents are called in the store."""

    @abstractmethod
    def create(self, base: Any, layers: int, stride: int) -> nn.Module:
        """A ControlNet with the base's weights, and outputs that start at zero.

        Args:
            layers: blocks, 0 for the usual number; stride: pixels a side that a latent stands for.
        Raises:
            Refused: a number of layers or a stride that it cannot have.
        """

    @abstractmethod
    def residuals(
        self, net: Any, args: tuple[Any, ...], given: Given, control: Tensor, weight: float
    ) -> Given:
        """What the ControlNet adds to the base, as arguments of the base."""

    def check(self, net: Any, base: Any, folder: Path) -> None:
        """Raises Refused for a ControlNet of another base, or of a kind that reads more than a picture."""
        for name in self.shared_config:
            own, its = (one.config.get(name) for one in (net, base))
            if (list(own) if isinstance(own, tuple) else own) != (
                list(its) if isinstance(its, tuple) else its
            ):
                raise Refused(
                    f"{folder} was made for another base: its {name} is {own}, here it is {its}. Give a "
                    "ControlNet of this base."
                )
        for name, known in self.plain_config.items():
            if net.config.get(name, known) not in (known, None):
                raise Refused(
                    f"{folder} reads more than a picture ({name} = {net.config[name]}: one for inpainting, "
                    "for several kinds of controls, or the like), which sfumato does not feed. Give a plain "
                    "ControlNet."
                )

    def is_prompted_only(self, net: Any) -> bool:
        """Whether it is called beside the prompt alone."""
        return self.prompted_only or self.is_pooled(net)

    def is_pooled(self, net: Any) -> bool:
        """Whether it sees the picture on the whole only, and adds nothing beside a negative."""
        return bool(net.config.get("global_pool_conditions"))

    def encode(self, net: Any, model: Model, pixels: Tensor) -> Tensor:
        """The control as latents, as the pipeline encodes it."""
        return model.encode(pixels)

    def encoding_of(self, net: Any) -> str:
        """What tells the latents of `encode` from others of the same codec."""
        return self.encoding

    def copy_of(self, base: Any, layers: int, single: int | None = None) -> Any:
        """A ControlNet of so many layers with all the base's weights that it has a place for.

        diffusers' from_transformer takes sizes and depth from the caller, and one writes into the base's
        config; so config and weights are copied here.
        """
        import diffusers

        most = max(base.config["num_layers"], base.config.get("num_single_layers", 0))
        if layers > most:
            raise Refused(f"model.control_layers = {layers}, but the base has {most} blocks. Say fewer.")
        kind = getattr(diffusers, self.control)
        config = {**base.config, "num_layers": min(layers, base.config["num_layers"])}
        if single is not None:
            config["num_single_layers"] = min(single, base.config["num_single_layers"])
        net = kind.from_config(config)
        own = net.state_dict()
        taken = {
            name: weight
            for name, weight in base.state_dict().items()
            if name in own and own[name].shape == weight.shape
        }
        net.load_state_dict({**own, **taken})
        return net


class UNetControlNet(ControlNetAdapter):
    """UNets: pixels, residuals of every level and of the middle."""

    network = "UNet2DConditionModel"
    control = "ControlNetModel"
    reads_pixels = True
    shared_config = (
        "block_out_channels", "cross_attention_dim", "in_channels", "layers_per_block", "addition_embed_type",
        "projection_class_embeddings_input_dim",
    )  # fmt: skip
    plain_config: ClassVar[Mapping[str, Any]] = {"conditioning_channels": 3}

    def create(self, base: Any, layers: int, stride: int) -> nn.Module:
        """A ControlNet with the base's weights, and outputs that start at zero.

        Raises:
            Refused: layers are asked for (it has all of the base's first half), or another stride of latents.
        """
        if layers:
            raise Refused(
                f"model.control_layers = {layers}: a UNet's ControlNet copies all of its first half. Leave "
                "it out."
            )
        from diffusers.models.controlnets.controlnet import ControlNetModel

        halvings = stride.bit_length() - 1
        if 2**halvings != stride or halvings >= len(CHANNELS):
            raise Refused(
                f"A latent of this model stands for {stride}×{stride} pixels; a UNet's ControlNet reads its "
                "picture in 1, 2, 4 or 8."
            )
        return ControlNetModel.from_unet(base, conditioning_embedding_out_channels=CHANNELS[: halvings + 1])

    def residuals(
        self, net: Any, args: tuple[Any, ...], given: Given, control: Tensor, weight: float
    ) -> Given:
        """What the ControlNet adds to the base, as arguments of the base."""
        named = dict(zip(("sample", "timestep"), args, strict=False))
        shared = {name: given[name] for name in ("class_labels", "added_cond_kwargs") if name in given}
        down, mid = net(
            **named,
            encoder_hidden_states=given["encoder_hidden_states"],
            controlnet_cond=control,
            conditioning_scale=weight,
            guess_mode=self.is_pooled(net),
            return_dict=False,
            **shared,
        )
        return {"down_block_additional_residuals": list(down), "mid_block_additional_residual": mid}


def adapter_of(base: Denoiser) -> ControlNetAdapter:
    """How a ControlNet of this base is made and called: its family says it, of our own UNet the one above.

    Raises:
        Refused: diffusers has no ControlNet that we can call for it.
    """
    network = type(base.backbone).__name__
    found: ControlNetAdapter | None = UNetControlNet() if base.family is None else base.family.controlnet
    if found is None or found.network != network:
        known = ", ".join(one.network for one in ControlNetAdapter.__subclasses__())
        raise Refused(f"There is no ControlNet for a {network}; there are for {known} and for our own DiT.")
    return found


class ControlNet(ControlModule):
    """One of diffusers' ControlNets beside the network it was made for.

    `control` is pixels [B, 3, H, W] in bytes (UNets) or latents as the base's.
    """

    kind = "controlnet"

    def __init__(
        self, base: Denoiser, layers: int = 0, name: str = "control", folder: str = "", stride: int = 8
    ) -> None:
        """layers: blocks, 0 for the usual number; folder: of a trained one, in diffusers' format; stride:
        pixels a side that a latent stands for.
        """
        super().__init__(name)
        network: Any = base.backbone
        self.adapter, self.layers, self.folder = adapter_of(base), layers, folder
        self.net: Any = (
            self.load_trained(Path(folder).expanduser(), network)
            if folder
            else self.adapter.create(network, layers, stride)
        )

    def load_trained(self, folder: Path, network: nn.Module) -> Any:
        """A trained ControlNet from its folder.

        Raises:
            Refused: it is none, or one for another base.
        """
        import diffusers

        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if said.get("_class_name") != self.adapter.control:
            raise Refused(
                f"{folder} holds a {said.get('_class_name')}, but this base needs a {self.adapter.control}."
            )
        kind = getattr(diffusers, self.adapter.control)
        net = load_network(kind, folder)
        self.adapter.check(net, network, folder)
        return net

    def config(self) -> dict[str, Any]:
        """Layers and name; the folder, where it was trained elsewhere."""
        return {"layers": self.layers, "name": self.name, "folder": self.folder}

    def encoder(self, model: Model) -> ImageConditionEncoder:
        """Pixels in bytes, or latents as the pipeline makes them."""
        if self.adapter.reads_pixels:
            return ImageConditionEncoder(image_features, "pixels in bytes 1")
        name = f"{model.codec.fingerprint()} {self.adapter.encoding_of(self.net)}"
        return ImageConditionEncoder(lambda pixels: self.adapter.encode(self.net, model, pixels), name)

    def hooks(self, base: Denoiser, x: Tensor, condition: Condition) -> Iterator[Hook]:
        """One before the base's network."""
        network: Any = base.backbone
        weight, control = weight_of(condition, self.name), condition[self.name].to(x.dtype)
        control = control / 255 if self.adapter.reads_pixels else control
        weak = condition.get(WEAK)
        prompted_only = weak is not None and self.adapter.is_prompted_only(self.net)
        rows = int((~weak).sum()) if weak is not None and prompted_only else len(x)
        negative_weight = 0.0 if self.adapter.is_pooled(self.net) else 1.0

        def add(network: nn.Module, args: tuple[Any, ...], given: Given) -> tuple[Any, Given]:
            if rows < len(x):
                own = {name: first_rows(value, rows, len(x)) for name, value in given.items()}
                own_args = tuple(first_rows(value, rows, len(x)) for value in args)
                added = self.adapter.residuals(self.net, own_args, own, control[:rows], weight)
                added = {name: with_negatives(value, negative_weight) for name, value in added.items()}
            else:
                added = self.adapter.residuals(self.net, args, given, control, weight)
            added = {name: add_residuals(given.get(name), value) for name, value in added.items()}
            return args, {**given, **added}

        yield Hook(network, add, before=True)


def first_rows(value: Any, rows: int, size: int) -> Any:
    """The first rows of what has one for each sample of a batch of `size`; positions [N, 3] have none."""
    if isinstance(value, dict):
        return {name: first_rows(one, rows, size) for name, one in value.items()}
    if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == 3:
        return value
    return value[:rows] if isinstance(value, Tensor | list) and len(value) == size else value


def with_negatives(answers: Any, negative_weight: float) -> Any:
    """Answers beside the prompts, and as often `negative_weight` times the same beside the negatives."""
    if isinstance(answers, Tensor):
        return torch.cat([answers, negative_weight * answers])
    return [torch.cat([one, negative_weight * one]) for one in answers]


def add_residuals(before: Any, more: Any) -> Any:
    """Residuals of one ControlNet and of another.

    Raises:
        Refused: they have different numbers of blocks.
    """
    if before is None:
        return more
    if isinstance(more, Tensor):
        return before + more
    if len(before) != len(more):
        raise Refused(
            f"ControlNets of {len(before)} and {len(more)} blocks cannot act together on one base: which "
            "block of the base takes them depends on their number. Use ControlNets of one depth."
        )
    return [one + other for one, other in zip(before, more, strict=True)]


def write(module: ControlNet, folder: Path) -> None:
    """The ControlNet as diffusers writes it."""
    module.net.save_pretrained(folder, safe_serialization=True)
