"""IP-Adapters of pretrained families, by diffusers' own attention processors; what is written, it loads.

Most read one summary of a picture as a few tokens; SD3 reads all its features, resampled at each time. Keys
begin as the base's own, values at zero, so that a new adapter leaves the base as it is. How one is made and
called stands in its family's file, as `Family.ip_adapter`; that of the UNets stands here.
Source: Ye et al. 2023, arXiv:2308.06721.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.models.condition import Condition
from sfumato.models.control.base import ControlModule, Hook, weight_of
from sfumato.models.control.image_encoders import ImageConditionEncoder, ImageEncoder
from sfumato.models.interface import Denoiser, Model

TOKENS = 4
"""Tokens a summary becomes: what diffusers' loaders expect."""
Tensors = dict[str, Tensor]


def small_normal(*shape: int) -> Tensor:
    """Small normal weights."""
    return torch.randn(shape) * 0.02


def summary_projection(width: int, into: int) -> Tensors:
    """A layer from one summary to TOKENS tokens, and a norm."""
    linear = nn.Linear(width, TOKENS * into)
    return {
        "proj.weight": linear.weight.data,
        "proj.bias": linear.bias.data,
        "norm.weight": torch.ones(into),
        "norm.bias": torch.zeros(into),
    }


WHOLE = {"tokens": True, "layer": -2}
"""Of an image encoder: the features of all patches, of the layer before the last."""


class IPAdapterLayout(ABC):
    """How the IP-Adapter of one network class is made, put into the network and fed."""

    network: ClassVar[str]
    """The class of the base's network."""
    always_active: ClassVar[bool] = True
    """Whether a network with an adapter must be shown a picture."""
    projection: ClassVar[str] = "encoder_hid_proj"
    """The network's part that projects a picture's features."""
    stacks: ClassVar[bool] = True
    """Whether the network takes a list of adapters."""
    grey_negative: ClassVar[bool] = False
    """Whether a grey picture's features stand beside a negative, where all features are read."""

    @abstractmethod
    def create(self, network: Any, width: int) -> dict[str, Tensors]:
        """A new adapter's tensors, as files hold them; `width` of the image encoder's features."""

    def image_features(self, file: str = "") -> dict[str, Any]:
        """What of an image encoder's answers an adapter reads, as diffusers' pipelines give it.

        Args:
            file: a trained adapter's; a new one reads the summary.
        Raises:
            Refused: an adapter of faces, which no image encoder feeds.
        """
        return read_features(file, self.grey_negative)

    def load(self, network: Any, state: Mapping[str, Tensors]) -> None:
        """Set the processors and the projection."""
        network._load_ip_adapter_weights([state] if self.stacks else state, low_cpu_mem_usage=False)

    def projector(self, network: Any) -> nn.Module:
        """The projection of the one adapter."""
        return network.encoder_hid_proj.image_projection_layers[0]

    def file_name(self, name: str) -> str:
        """A tensor of the projection by the name it has in a file."""
        return name.replace("image_embeds", "proj")

    def feed(self, network: Any, given: dict[str, Any], features: Tensor) -> dict[str, Any]:
        """The network's arguments with the features of the picture."""
        shown: Any = [features] if self.stacks else features
        attention = {**(given.get("joint_attention_kwargs") or {}), "ip_adapter_image_embeds": shown}
        return {**given, "joint_attention_kwargs": attention}


def read_features(file: str, grey: bool) -> dict[str, Any]:
    """What a trained adapter's projection reads of an image encoder; of a new one ("") the summary."""
    head = read(Path(file)).get("image_proj", {}) if file else {}
    faces = "proj.0.weight" in head and "proj.3.weight" not in head
    if faces or any("perceiver" in one for one in head):
        raise Refused(
            f"{file} looks at faces' embeddings, which sfumato does not make. Give a plain IP-Adapter."
        )
    plain = not file or "proj.weight" in head
    return {} if plain else {**WHOLE, "grey": grey}


class UNetIPAdapter(IPAdapterLayout):
    """UNets: a few tokens beside those of the text, in every cross-attention."""

    network = "UNet2DConditionModel"
    grey_negative = True

    def create(self, network: Any, width: int) -> dict[str, Tensors]:
        """A new adapter of a UNet; `width` of the image's summary."""
        into, tensors = network.config.cross_attention_dim, {}
        for place, name in enumerate(network.attn_processors):
            if name.endswith("attn2.processor"):
                layer = network.get_submodule(name.removesuffix(".processor"))
                tensors[f"{place}.to_k_ip.weight"] = layer.to_k.weight.data.clone()
                tensors[f"{place}.to_v_ip.weight"] = torch.zeros_like(layer.to_v.weight.data)
        return {"image_proj": summary_projection(width, into), "ip_adapter": tensors}

    def feed(self, network: Any, given: dict[str, Any], features: Tensor) -> dict[str, Any]:
        """By what is added beside the time."""
        head = network.encoder_hid_proj.image_projection_layers[0]
        pictures = features if type(head).__name__ == "ImageProjection" else features[:, None]
        added = {**(given.get("added_cond_kwargs") or {}), "image_embeds": [pictures]}
        return {**given, "added_cond_kwargs": added}


def layout_of(base: Denoiser) -> IPAdapterLayout | None:
    """How the IP-Adapter of this base is made and fed: its family says it, of our own UNet the one above."""
    found: IPAdapterLayout | None = UNetIPAdapter() if base.family is None else base.family.ip_adapter
    return found if found is not None and found.network == type(base.backbone).__name__ else None


def features_of(base: Denoiser, file: str = "") -> dict[str, Any]:
    """What of an image encoder's answers an adapter of this base reads (`IPAdapterLayout.image_features`)."""
    layout = layout_of(base)
    return read_features(file, False) if layout is None else layout.image_features(file)


class IPAdapter(ControlModule):
    """An IP-Adapter in the attention of a pretrained network.

    `reference` is [B, L, D]: a summary (L = 1) for UNets and FLUX, features for SD3; all zero is what
    pipelines give beside a negative.
    """

    kind = "ip-adapter"

    def __init__(
        self,
        base: Denoiser,
        image: ImageEncoder | None,
        width: int = 0,
        name: str = "reference",
        file: str = "",
    ) -> None:
        """image: what sees the reference, or None where features are given; file: a trained adapter."""
        super().__init__(name)
        network: Any = base.backbone
        layout = layout_of(base)
        if layout is None:
            known = ", ".join(one.network for one in IPAdapterLayout.__subclasses__())
            raise Refused(
                f"There is no IP-Adapter for a {type(network).__name__}; there are for {known} and for our "
                "own DiT."
            )
        self.layout, self.image, self.file = layout, image, file
        self.always_active = layout.always_active
        self.width = width or (image.width if image is not None else 0)
        state = read(Path(file).expanduser()) if file else layout.create(network, self.width)
        self.width = width_of(state["image_proj"], file)
        if file and image is not None and image.width != self.width:
            raise Refused(
                f"{file} reads {self.width} numbers of a picture, but its image encoder says {image.width}. "
                "Give the encoder it was trained with."
            )
        self.before = (
            dict(network.attn_processors),
            network.config.get("encoder_hid_dim_type"),
        )
        layout.load(network, state)

    @contextmanager
    def removed(self, base: Denoiser) -> Iterator[None]:
        """The network with its own processors."""
        network: Any = base.backbone
        now = dict(network.attn_processors)
        word = self.layout.projection
        head, kind = getattr(network, word), network.config.get("encoder_hid_dim_type")
        network.set_attn_processor(dict(self.before[0]))
        setattr(network, word, None)
        if "encoder_hid_dim_type" in network.config:
            network.register_to_config(encoder_hid_dim_type=self.before[1])
        try:
            yield
        finally:
            network.set_attn_processor(now)
            setattr(network, word, head)
            if "encoder_hid_dim_type" in network.config:
                network.register_to_config(encoder_hid_dim_type=kind)

    def parts(self, network: Any) -> list[nn.Module]:
        """The modules in the network that are the adapter's."""
        return [
            getattr(network, self.layout.projection),
            *(one for one in network.attn_processors.values() if hasattr(one, "to_k_ip")),
        ]

    def config(self) -> dict[str, Any]:
        """The image encoder, the width of what it says, the name; the file of a trained one."""
        image = None if self.image is None else self.image.config()
        return {"image": image, "width": self.width, "name": self.name, "file": self.file}

    def encoder(self, model: Model) -> ImageConditionEncoder:
        """The image encoder's features."""
        if self.image is None:
            raise Refused(
                "This IP-Adapter came without an image encoder. Give the one it was trained with, a folder "
                'that transformers saved: --image-encoder, or attach(…, image_encoder="clip").'
            )
        return self.image.encoder(model)

    def unfreeze(self, base: Denoiser) -> None:
        """Processors and projection, which lie in the base's network."""
        self.requires_grad_(False)
        for part in self.parts(base.backbone):
            part.requires_grad_(True)

    def hooks(self, base: Denoiser, x: Tensor, condition: Condition) -> Iterator[Hook]:
        """One before the base's network, which hands over the features."""
        network: Any = base.backbone
        weight = weight_of(condition, self.name) if self.name in condition else 0.0
        seen = condition.get(self.name, x.new_zeros(len(x), 1, self.width)).to(x.dtype)
        for processor in network.attn_processors.values():
            if isinstance(getattr(processor, "scale", None), list):
                processor.scale = [weight]
            elif hasattr(processor, "to_k_ip"):
                processor.scale = weight

        def show(network: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, Any]:
            return args, self.layout.feed(network, given, seen)

        yield Hook(network, show, before=True)


def width_of(head: Tensors, file: str) -> int:
    """How many numbers of each feature a projection reads.

    Raises:
        Refused: a projection that is not known.
    """
    for name in ("proj_in.weight", "proj.weight", "proj.0.weight"):
        if name in head:
            return head[name].shape[1]
    raise Refused(f"{file} projects pictures in a way that is not known ({', '.join(sorted(head)[:3])}, …).")


def read(file: Path) -> dict[str, Tensors]:
    """A trained adapter's tensors.

    Raises:
        Refused: no safetensors file of an IP-Adapter.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as problem:
        raise Refused(f"{file} is no safetensors file that can be read: {problem}.") from problem
    found: dict[str, Tensors] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part not in found:
            raise Refused(f'{file} is no IP-Adapter: it holds "{name}" beside image_proj and ip_adapter.')
        found[part][rest] = tensor
    return found


def tensors_of(module: IPAdapter, network: Any) -> Tensors:
    """The adapter as a file holds it: what diffusers' load_ip_adapter reads."""
    found: Tensors = {}
    for name, tensor in module.layout.projector(network).state_dict().items():
        found[f"image_proj.{module.layout.file_name(name)}"] = tensor
    for place, processor in enumerate(network.attn_processors.values()):
        if hasattr(processor, "to_k_ip"):
            for name, tensor in processor.state_dict().items():
                found[f"ip_adapter.{place}.{name.replace('_ip.0.', '_ip.')}"] = tensor
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def write(module: IPAdapter, base: Denoiser, file: Path) -> None:
    """The adapter as diffusers reads it."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors_of(module, base.backbone), file)
