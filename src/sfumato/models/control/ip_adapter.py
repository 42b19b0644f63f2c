"""IP-Adapters of pretrained families, by diffusers' own attention processors; what is written, it loads.

UNets and FLUX read one summary of a picture as a few tokens; SD3 reads all its features, resampled at each
time. Keys begin as the base's own, values at zero, so that a new adapter leaves the base as it is.
Source: Ye et al. 2023, arXiv:2308.06721.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def drawn(*shape: int) -> Tensor:
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


def of_unet(network: Any, width: int) -> dict[str, Tensors]:
    """A new adapter of a UNet; `width` of the image's summary."""
    into, tensors = network.config.cross_attention_dim, {}
    for place, name in enumerate(network.attn_processors):
        if name.endswith("attn2.processor"):
            layer = network.get_submodule(name.removesuffix(".processor"))
            tensors[f"{place}.to_k_ip.weight"] = layer.to_k.weight.data.clone()
            tensors[f"{place}.to_v_ip.weight"] = torch.zeros_like(layer.to_v.weight.data)
    return {"image_proj": summary_projection(width, into), "ip_adapter": tensors}


def of_flux(network: Any, width: int) -> dict[str, Tensors]:
    """A new adapter of FLUX's double blocks."""
    into, inner, tensors = network.config.joint_attention_dim, network.inner_dim, {}
    for place in range(network.config.num_layers):
        for which, weight in (("k", drawn(inner, into)), ("v", torch.zeros(inner, into))):
            tensors[f"{place}.to_{which}_ip.weight"] = weight
            tensors[f"{place}.to_{which}_ip.bias"] = torch.zeros(inner)
    return {"image_proj": summary_projection(width, into), "ip_adapter": tensors}


def of_sd3(network: Any, width: int) -> dict[str, Tensors]:
    """A new adapter of SD3: a resampler that hears the time, keys and values in every block."""
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
    from diffusers.models.embeddings import IPAdapterTimeImageProjection

    head, inner = network.config.attention_head_dim, network.inner_dim
    resampler = IPAdapterTimeImageProjection(
        embed_dim=width,
        output_dim=inner,
        hidden_dim=64 * max(1, inner // 64),
        heads=max(1, inner // 64),
        num_queries=16,
        timestep_in_dim=320,
    )
    tensors: Tensors = {}
    for place in range(len(network.attn_processors)):
        processor = SD3IPAdapterJointAttnProcessor2_0(
            hidden_size=inner,
            ip_hidden_states_dim=inner,
            head_dim=head,
            timesteps_emb_dim=resampler.proj_out.weight.shape[1],
        )
        processor.to_v_ip.weight.data.zero_()
        tensors |= {f"{place}.{name}": tensor.clone() for name, tensor in processor.state_dict().items()}
    projection = {written(name): tensor.clone() for name, tensor in resampler.state_dict().items()}
    return {"image_proj": projection, "ip_adapter": tensors}


BACK = (
    ("ln0", "0.norm1"), ("ln1", "0.norm2"), ("attn.to_q", "0.to_q"), ("attn.to_kv", "0.to_kv"),
    ("attn.to_out.0", "0.to_out"), ("adaln_norm", "1.0"), ("ff.net.0.proj", "1.1"), ("ff.net.2", "1.3"),
    ("adaln_proj", "2.1"),
)  # fmt: skip
"""diffusers' names in a layer of SD3's resampler, and those of the file it reads."""


def written(name: str) -> str:
    """A resampler's tensor by the name it has in a file."""
    if not name.startswith("layers."):
        return name
    _, layer, rest = name.split(".", 2)
    for ours, theirs in BACK:
        if rest.startswith(f"{ours}."):
            return f"layers.{layer}.{theirs}.{rest.removeprefix(f'{ours}.')}"
    raise ValueError(f"{name} is no tensor of the resampler that is known")


KINDS: dict[str, Callable[[Any, int], dict[str, Tensors]]] = {
    "UNet2DConditionModel": of_unet,
    "FluxTransformer2DModel": of_flux,
    "SD3Transformer2DModel": of_sd3,
}
"""By the class of the base's network."""


WHOLE = {"tokens": True, "layer": -2}
"""Of an image encoder: the features of all patches, of the layer before the last."""


def features_of(base: Denoiser, file: str = "") -> dict[str, Any]:
    """What of an image encoder's answers an adapter of this base reads, as diffusers' pipelines give it.

    Args:
        file: a trained adapter's; a new one of a UNet or FLUX reads the summary.
    Raises:
        Refused: an adapter of faces, which no image encoder feeds.
    """
    network = type(base.backbone).__name__
    if network.startswith("SD3"):
        return dict(WHOLE)
    head = read(Path(file)).get("image_proj", {}) if file else {}
    faces = "proj.0.weight" in head and "proj.3.weight" not in head
    if faces or any("perceiver" in one for one in head):
        raise Refused(
            f"{file} looks at faces' embeddings, which sfumato does not make. Give a plain IP-Adapter."
        )
    plain = not file or "proj.weight" in head
    return {} if plain else {**WHOLE, "grey": network.startswith("UNet")}


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
        self.network_class, self.image, self.file = type(network).__name__, image, file
        if self.network_class not in KINDS:
            raise Refused(
                f"There is no IP-Adapter for a {self.network_class}; there are for {', '.join(KINDS)} "
                "and for our own DiT."
            )
        self.always_active = not self.network_class.startswith(
            "SD3"
        )  # the others insist on being shown a picture
        self.width = width or (image.width if image is not None else 0)
        state = read(Path(file).expanduser()) if file else KINDS[self.network_class](network, self.width)
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
        self.put(network, state)

    @contextmanager
    def removed(self, base: Denoiser) -> Iterator[None]:
        """The network with its own processors."""
        network: Any = base.backbone
        now = dict(network.attn_processors)
        word = "image_proj" if self.network_class.startswith("SD3") else "encoder_hid_proj"
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

    def put(self, network: Any, state: Mapping[str, Tensors]) -> None:
        """Set the processors and the projection."""
        network._load_ip_adapter_weights(
            state if self.network_class.startswith("SD3") else [state], low_cpu_mem_usage=False
        )

    def parts(self, network: Any) -> list[nn.Module]:
        """The modules in the network that are the adapter's."""
        head = network.image_proj if self.network_class.startswith("SD3") else network.encoder_hid_proj
        return [head, *(one for one in network.attn_processors.values() if hasattr(one, "to_k_ip"))]

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

        def hand(network: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, Any]:
            if self.network_class == "UNet2DConditionModel":
                head = network.encoder_hid_proj.image_projection_layers[0]
                pictures = seen if type(head).__name__ == "ImageProjection" else seen[:, None]
                added = {**(given.get("added_cond_kwargs") or {}), "image_embeds": [pictures]}
                return args, {**given, "added_cond_kwargs": added}
            features: Any = [seen] if self.network_class.startswith("Flux") else seen
            attention = {**(given.get("joint_attention_kwargs") or {}), "ip_adapter_image_embeds": features}
            return args, {**given, "joint_attention_kwargs": attention}

        yield Hook(network, hand, before=True)


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
    is_sd3 = module.network_class.startswith("SD3")
    head = network.image_proj if is_sd3 else network.encoder_hid_proj.image_projection_layers[0]
    for name, tensor in head.state_dict().items():
        told = written(name) if is_sd3 else name.replace("image_embeds", "proj")
        found[f"image_proj.{told}"] = tensor
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
