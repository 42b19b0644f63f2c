"""ControlNets of pretrained families, by diffusers' own classes, begun from the base's weights.

A ControlNet hears what its base hears: a hook before the base's network hands the same arguments to the
ControlNet, and its answers on to the base. What differs from class to class is in the dialects below.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.models.condition import Condition
from sfumato.models.control.base import WEAK, ControlModule, Hook, weight_of
from sfumato.models.control.image_encoders import ImageConditionEncoder
from sfumato.models.control.own import image_features
from sfumato.models.interface import Denoiser, Model
from sfumato.models.networks.tokens import patchify

Given = dict[str, Any]
SEEN = (16, 32, 96, 256)
"""Channels in which a UNet's ControlNet sees its picture, as diffusers': one more for each halving."""


class ControlNetAdapter:
    """How one ControlNet class is made from its base, and asked. The default is the UNets'."""

    network = "UNet2DConditionModel"
    control = "ControlNetModel"
    pixels = True
    """Whether the control is pixels in [0, 1]; else it is latents."""
    prompted_only = False
    """Whether the pipeline asks the ControlNet beside the prompt alone, and uses its answer twice."""
    alike: tuple[str, ...] = (
        "block_out_channels", "cross_attention_dim", "in_channels", "layers_per_block", "addition_embed_type",
        "projection_class_embeddings_input_dim",
    )  # fmt: skip
    """What base and ControlNet must have alike in their configs."""
    usual: Mapping[str, Any] = {"conditioning_channels": 3}
    """What we know how to feed; ControlNets that differ here read something else beside the picture."""

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
        if 2**halvings != stride or halvings >= len(SEEN):
            raise Refused(
                f"A latent of this model stands for {stride}×{stride} pixels; a UNet's ControlNet reads its "
                "picture in 1, 2, 4 or 8."
            )
        return ControlNetModel.from_unet(base, conditioning_embedding_out_channels=SEEN[: halvings + 1])

    def ask(self, net: Any, args: tuple[Any, ...], given: Given, control: Tensor, weight: float) -> Given:
        """What the ControlNet hands to the base, as arguments."""
        named = dict(zip(("sample", "timestep"), args, strict=False))
        heard = {name: given[name] for name in ("class_labels", "added_cond_kwargs") if name in given}
        down, mid = net(
            **named,
            encoder_hidden_states=given["encoder_hidden_states"],
            controlnet_cond=control,
            conditioning_scale=weight,
            guess_mode=self.is_pooled(net),
            return_dict=False,
            **heard,
        )
        return {"down_block_additional_residuals": list(down), "mid_block_additional_residual": mid}

    def check(self, net: Any, base: Any, folder: Path) -> None:
        """Raises Refused for a ControlNet of another base, or of a kind that reads more than a picture."""
        for name in self.alike:
            own, its = (one.config.get(name) for one in (net, base))
            if (list(own) if isinstance(own, tuple) else own) != (
                list(its) if isinstance(its, tuple) else its
            ):
                raise Refused(
                    f"{folder} was made for another base: its {name} is {own}, here it is {its}. Give a "
                    "ControlNet of this base."
                )
        for name, known in self.usual.items():
            if net.config.get(name, known) not in (known, None):
                raise Refused(
                    f"{folder} reads more than a picture ({name} = {net.config[name]}: one for inpainting, "
                    "for several kinds of controls, or the like), which sfumato does not feed. Give a plain "
                    "ControlNet."
                )

    def is_prompted_only(self, net: Any) -> bool:
        """Whether it is asked beside the prompt alone."""
        return self.prompted_only or self.is_pooled(net)

    def is_pooled(self, net: Any) -> bool:
        """Whether it sees the picture on the whole only, and says nothing beside a negative."""
        return bool(net.config.get("global_pool_conditions"))

    def latents(self, net: Any, model: Model, pixels: Tensor) -> Tensor:
        """The control as latents, as the pipeline encodes it."""
        return model.encode(pixels)

    def begun(self, control: str, base: Any, layers: int, single: int | None = None) -> Any:
        """A ControlNet of so many layers with all the base's weights that it has a place for.

        diffusers' from_transformer takes sizes and depth from the caller, and one writes into the base's
        config; so config and weights are copied here.
        """
        import diffusers

        most = max(base.config["num_layers"], base.config.get("num_single_layers", 0))
        if layers > most:
            raise Refused(f"model.control_layers = {layers}, but the base has {most} blocks. Say fewer.")
        kind = getattr(diffusers, control)
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


class SD3(ControlNetAdapter):
    """Latents beside the noise's; by InstantX's convention (the default) without summary and shift."""

    network = "SD3Transformer2DModel"
    control = "SD3ControlNetModel"
    pixels = False
    alike = (
        "attention_head_dim",
        "num_attention_heads",
        "in_channels",
        "patch_size",
        "pooled_projection_dim",
    )
    usual: Mapping[str, Any] = {"extra_conditioning_channels": 0}

    def create(self, base: Any, layers: int, stride: int) -> nn.Module:
        """Half the blocks unless said otherwise."""
        return self.begun(self.control, base, layers or -(-base.config["num_layers"] // 2))

    def ask(self, net: Any, args: tuple[Any, ...], given: Given, control: Tensor, weight: float) -> Given:
        """Residuals of the blocks."""
        pooled, tokens = given["pooled_projections"], given["encoder_hidden_states"]
        blocks = net(
            hidden_states=given["hidden_states"],
            timestep=given["timestep"],
            controlnet_cond=control,
            encoder_hidden_states=None if net.config.joint_attention_dim is None else tokens,
            pooled_projections=torch.zeros_like(pooled) if self.is_mute(net) else pooled,
            conditioning_scale=weight,
            return_dict=False,
        )[0]
        return {"block_controlnet_hidden_states": list(blocks)}

    def is_mute(self, net: Any) -> bool:
        """Whether it hears no summary."""
        return bool(net.config.force_zeros_for_pooled_projection)

    def latents(self, net: Any, model: Model, pixels: Tensor) -> Tensor:
        """Without the shift for one that hears no summary."""
        latents, codec = model.encode(pixels), model.codec
        return (
            latents + codec.get_buffer("shift") / codec.get_buffer("scale") if self.is_mute(net) else latents
        )


class Flux(ControlNetAdapter):
    """Packed latents; residuals of double and single blocks."""

    network = "FluxTransformer2DModel"
    control = "FluxControlNetModel"
    pixels = False
    prompted_only = True
    alike = (
        "attention_head_dim", "num_attention_heads", "in_channels", "joint_attention_dim", "guidance_embeds",
        "pooled_projection_dim",
    )  # fmt: skip
    usual: Mapping[str, Any] = {"num_mode": None, "conditioning_embedding_channels": None}

    def create(self, base: Any, layers: int, stride: int) -> nn.Module:
        """A fifth of the blocks of each kind unless said otherwise, as diffusers' script has it."""
        double, single = base.config["num_layers"], base.config["num_single_layers"]
        net = self.begun(self.control, base, layers or -(-double // 5), layers or -(-single // 5))
        for part in (net.controlnet_x_embedder,):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
        return net

    def ask(self, net: Any, args: tuple[Any, ...], given: Given, control: Tensor, weight: float) -> Given:
        """Residuals of both kinds of blocks."""
        names = (
            "hidden_states", "timestep", "pooled_projections", "encoder_hidden_states", "txt_ids", "img_ids"
        )  # fmt: skip
        heard = {name: given[name] for name in names}
        guidance = given.get("guidance") if net.config.guidance_embeds else None
        double, single = net(
            **heard,
            guidance=guidance,
            controlnet_cond=patchify(control),
            conditioning_scale=weight,
            return_dict=False,
        )
        found = {"controlnet_block_samples": double, "controlnet_single_block_samples": single}
        return {name: list(value) for name, value in found.items() if value is not None}


class QwenImage(ControlNetAdapter):
    """Packed latents; residuals of the blocks."""

    network = "QwenImageTransformer2DModel"
    control = "QwenImageControlNetModel"
    pixels = False
    prompted_only = True
    alike = ("attention_head_dim", "num_attention_heads", "in_channels", "joint_attention_dim")
    usual: Mapping[str, Any] = {"extra_condition_channels": 0}

    def create(self, base: Any, layers: int, stride: int) -> nn.Module:
        """A twelfth of the blocks unless said otherwise (5 of 60)."""
        net = self.begun(self.control, base, layers or -(-base.config["num_layers"] // 12))
        nn.init.zeros_(net.controlnet_x_embedder.weight)
        nn.init.zeros_(net.controlnet_x_embedder.bias)
        return net

    def ask(self, net: Any, args: tuple[Any, ...], given: Given, control: Tensor, weight: float) -> Given:
        """Residuals of the blocks."""
        names = (
            "hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_mask", "img_shapes"
        )  # fmt: skip
        blocks = net(
            **{name: given.get(name) for name in names},
            controlnet_cond=patchify(control.squeeze(2)),
            conditioning_scale=weight,
            return_dict=False,
        )
        return {"controlnet_block_samples": list(blocks)}


DIALECTS: dict[str, ControlNetAdapter] = {
    one.network: one for one in (ControlNetAdapter(), SD3(), Flux(), QwenImage())
}
"""By the class of the base's network."""


def dialect_of(network: nn.Module) -> ControlNetAdapter:
    """The dialect of a base's network.

    Raises:
        Refused: diffusers has no ControlNet that we speak to for it.
    """
    found = DIALECTS.get(type(network).__name__)
    if found is None:
        raise Refused(
            f"There is no ControlNet for a {type(network).__name__}; there are for {', '.join(DIALECTS)} and "
            "for our own DiT."
        )
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
        self.dialect, self.layers, self.folder = dialect_of(network), layers, folder
        self.net: Any = (
            self.opened(Path(folder).expanduser(), network)
            if folder
            else self.dialect.create(network, layers, stride)
        )

    def opened(self, folder: Path, network: nn.Module) -> Any:
        """A trained ControlNet from its folder.

        Raises:
            Refused: it is none, or one for another base.
        """
        import json

        import diffusers

        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if said.get("_class_name") != self.dialect.control:
            raise Refused(
                f"{folder} holds a {said.get('_class_name')}, but this base needs a {self.dialect.control}."
            )
        kind = getattr(diffusers, self.dialect.control)
        net = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self.dialect.check(net, network, folder)
        return net

    def config(self) -> dict[str, Any]:
        """Layers and name; the folder, where it was trained elsewhere."""
        return {"layers": self.layers, "name": self.name, "folder": self.folder}

    def encoder(self, model: Model) -> ImageConditionEncoder:
        """Pixels in bytes, or latents as the pipeline makes them."""
        if self.dialect.pixels:
            return ImageConditionEncoder(image_features, "pixels in bytes 1")
        name = f"{model.codec.fingerprint()} {type(self.dialect).__name__}"
        if isinstance(self.dialect, SD3):
            name += f" {self.dialect.is_mute(self.net)}"
        return ImageConditionEncoder(lambda pixels: self.dialect.latents(self.net, model, pixels), name)

    def hooks(self, base: Denoiser, x: Tensor, condition: Condition) -> Iterator[Hook]:
        """One before the base's network."""
        network: Any = base.backbone
        weight, control = weight_of(condition, self.name), condition[self.name].to(x.dtype)
        control = control / 255 if self.dialect.pixels else control
        weak = condition.get(WEAK)
        prompted_only = weak is not None and self.dialect.is_prompted_only(self.net)
        rows = int((~weak).sum()) if weak is not None and prompted_only else len(x)
        echo = 0.0 if self.dialect.is_pooled(self.net) else 1.0

        def hand(network: nn.Module, args: tuple[Any, ...], given: Given) -> tuple[Any, Given]:
            if rows < len(x):
                heard = {name: first(value, rows, len(x)) for name, value in given.items()}
                asked = tuple(first(value, rows, len(x)) for value in args)
                added = self.dialect.ask(self.net, asked, heard, control[:rows], weight)
                added = {name: beside(value, echo) for name, value in added.items()}
            else:
                added = self.dialect.ask(self.net, args, given, control, weight)
            return args, {**given, **{name: summed(given.get(name), value) for name, value in added.items()}}

        yield Hook(network, hand, before=True)


def first(value: Any, rows: int, size: int) -> Any:
    """The first rows of what has one for each sample of a batch of `size`; positions [N, 3] have none."""
    if isinstance(value, dict):
        return {name: first(one, rows, size) for name, one in value.items()}
    if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == 3:
        return value
    return value[:rows] if isinstance(value, Tensor | list) and len(value) == size else value


def beside(answers: Any, echo: float) -> Any:
    """Answers beside the prompts, and as often `echo` times the same beside the negatives."""
    if isinstance(answers, Tensor):
        return torch.cat([answers, echo * answers])
    return [torch.cat([one, echo * one]) for one in answers]


def summed(before: Any, more: Any) -> Any:
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
            "block of the base hears them depends on their number. Use ControlNets of one depth."
        )
    return [one + other for one, other in zip(before, more, strict=True)]


def write(module: ControlNet, folder: Path) -> None:
    """The ControlNet as diffusers writes it."""
    module.net.save_pretrained(folder, safe_serialization=True)
