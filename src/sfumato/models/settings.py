"""What a recipe says about the model: where its three stages come from, and how large new ones are."""

from collections.abc import Mapping
from dataclasses import dataclass

from sfumato.settings import Table, key


@dataclass(frozen=True)
class ModelSettings:
    """The section [model] of a recipe."""

    base: str = key(
        "scratch",
        "scratch, or a model's folder, a run, or an id of the Hub's (owner/name, owner/name@revision) "
        "to go on from",
        path=True,
        words=("scratch",),
        hub=True,
    )
    train: str = key(
        "full",
        "what is trained: full (the whole denoiser), an adapter of it (lora, lokr, loha), model.new_tokens "
        "alone (tokens), or what lets pictures guide: controlnet, ip-adapter, edit",
        choices=("full", "lora", "lokr", "loha", "tokens", "controlnet", "ip-adapter", "edit"),
    )
    train_text_encoder: str = key(
        "none",
        "pretrained only: what of the text encoders is trained beside: none, lora",
        choices=("none", "lora"),
    )
    new_tokens: Mapping[str, str] = key(
        Table(),
        'pretrained only: new words whose embeddings are trained, and the words each begins with: "<cat>" = '
        '"a cat", or the file of an embedding; "" begins at random',
        values=str,
        path=True,
        example="<cat>=a cat",
    )
    control_layers: int = key(0, "controlnet only: blocks it copies; 0 for the usual number", least=0)
    image_encoder: str = key(
        "codec",
        "ip-adapter only: codec, or the folder of a CLIP, SigLIP or DINO that sees the reference",
        path=True,
        words=("codec",),
    )
    rank: int = key(16, "adapters only: the rank of the change to a layer", least=1)
    alpha: float = key(
        0.0, "adapters only: the change is scaled by alpha/rank; 0: alpha is the rank", least=0
    )
    targets: tuple[str, ...] = key(
        ("auto",), "adapters only: ends of layers' names, regular expressions, all, or auto (the family's)"
    )
    dropout: float = key(0.0, "adapters only: share of their input left out in training", least=0, most=0.95)
    dora: bool = key(False, "lora only: learn magnitude and direction apart")
    rslora: bool = key(False, "lora only: scale by alpha/sqrt(rank)")
    base_quantization: str = key(
        "float32",
        "adapters only: how the frozen base is stored",
        choices=("float32", "bfloat16", "int8", "fp8", "nf4"),
    )
    init_adapter: str = key(
        "",
        "adapters only: a file of the same kind, whoever wrote it, that training goes on from",
        path=True,
        hub=True,
    )
    merge_loras: Mapping[str, float] = key(
        Table(),
        "adapters only: LoRA files that become part of the base first, each with its weight",
        values=float,
        path=True,
        hub=True,
        sign=":",
        example="style.safetensors:0.8",
    )
    attention_backend: str = key(
        "", "pretrained only: diffusers' attention backend; empty: torch's own choice"
    )
    prompt_options: Mapping[str, object] = key(
        Table(),
        "options of the base's prompts, as its pipeline names them: max_sequence_length = 256",
        values=object,
        example="max_sequence_length=256",
    )
    theory: str = key("", "a theory's name, or file.py:name for your own; empty: the base's own")
    codec: str = key(
        "auto",
        "scratch only: auto (a small VAE, trained first; also kl, tiny), pixels, or a codec's folder",
        path=True,
        words=("auto", "kl", "tiny", "pixels"),
    )
    text_encoder: str = key(
        "minilm",
        "scratch only: minilm, labels (classes), none (unconditional), or a text encoder's folder",
        path=True,
        words=("minilm", "labels", "none"),
    )
    pooled_fourier_terms: int = key(
        0, "how finely the prompt's summary remembers the order of words", least=0
    )
    denoiser: str = key("dit", "scratch only: the network", choices=("dit", "unet"))
    width: int = key(256, "scratch only: channels of the denoiser", least=8)
    depth: int = key(8, "scratch only: blocks of the denoiser", least=1)
    heads: int = key(4, "scratch only: attention heads", least=1)
    patch: int = key(1, "scratch only: the DiT joins patch x patch latents into one token", least=1)
    attention: str = key(
        "full",
        "dit on clips: over all frames, or factorised: over space, then over time",
        choices=("full", "factorised"),
    )
    codec_stride: int = key(8, "codec auto: pixels a side that become one latent", least=1)
    codec_time_stride: int = key(
        2, "codec auto on clips: frames that become one latent, after the first", least=1
    )
    latent_channels: int = key(16, "codec auto: channels of a latent", least=1)
    codec_width: int = key(32, "codec auto: channels of its first level", least=4)
    codec_steps: int = key(1500, "codec auto: steps its training takes", least=1)
    codec_batch: int = key(32, "codec auto: pictures in one of its steps", least=1)
