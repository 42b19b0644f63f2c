"""A model from scratch: each stage as the recipe's [model] section describes it."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from sfumato import user_code
from sfumato.errors import Refused
from sfumato.models.codecs.image import AutoencoderCodec, PixelCodec, ResidualCodec
from sfumato.models.codecs.load import load_codec
from sfumato.models.codecs.video import ClipCodec, FramewiseCodec
from sfumato.models.interface import Codec, Conditioner, Denoiser, Model, TrainableCodec, seeded
from sfumato.models.networks.dit import DiT
from sfumato.models.networks.unet import UNet
from sfumato.models.settings import ModelSettings
from sfumato.models.stage_folder import load_user_stage
from sfumato.models.text.encoder import NoConditioner, TextConditioner
from sfumato.models.text.labels import LabelConditioner
from sfumato.theory import Theory, get

DEFAULT_THEORY = "flow-matching"


def new_theory(word: str) -> Theory:
    """The theory a recipe names: of the catalogue, or `file.py:name` (a Theory, or what makes one)."""
    if not user_code.is_user_code(word):
        return get(word or DEFAULT_THEORY)
    made = user_code.load_user_object(word)
    theory = made() if callable(made) and not isinstance(made, Theory) else made
    if not isinstance(theory, Theory):
        raise Refused(f"{word} is a {type(theory).__name__}, but a theory must be a sfumato.Theory.")
    return theory


def new_conditioner(settings: ModelSettings, classes: Sequence[str] = ()) -> Conditioner:
    """The conditioner `model.text_encoder` names; for "labels", of these classes."""
    if user_code.is_user_code(settings.text_encoder):
        return load_user_stage(settings.text_encoder, Conditioner)
    if settings.text_encoder == "none":
        return NoConditioner()
    if settings.text_encoder == "labels":
        return LabelConditioner({name: index for index, name in enumerate(classes)}, len(classes))
    return TextConditioner(settings.text_encoder, waves=settings.pooled_fourier_terms)


def new_codec(settings: ModelSettings, seed: int = 0, clips: bool = False) -> Codec:
    """The codec `model.codec` names; a TrainableCodec from "auto", "kl" or "tiny" has yet to be trained.

    A folder is that of a stage saved by sfumato, or of an autoencoder of diffusers. For `clips`, a codec of
    pictures takes them frame by frame.

    Raises:
        Refused: a codec that cannot be trained on clips.
    """
    if not clips:
        return _new_codec(settings, seed)
    if settings.codec == "auto":
        shape = (
            settings.codec_stride,
            settings.latent_channels,
            settings.codec_width,
            settings.codec_time_stride,
        )
        return seeded(seed, lambda: ClipCodec(*shape))
    if settings.codec in ("kl", "tiny"):
        raise Refused(
            f'model.codec = "{settings.codec}" is trained on pictures, but data.frames asks for clips. Take '
            "auto; or train it in a run without data.frames and name that run's model/codec."
        )
    codec = _new_codec(settings, seed)
    return codec if codec.of_clips else FramewiseCodec(codec)


def _new_codec(settings: ModelSettings, seed: int) -> Codec:
    word, stride, channels = settings.codec, settings.codec_stride, settings.latent_channels
    if user_code.is_user_code(word):
        return load_user_stage(word, Codec)
    if word == "pixels":
        return PixelCodec()
    if word == "auto":
        return seeded(seed, lambda: ResidualCodec(stride, channels, settings.codec_width))
    if word in ("kl", "tiny"):
        name = "AutoencoderKL" if word == "kl" else "AutoencoderTiny"
        return seeded(seed, lambda: AutoencoderCodec.small(name, stride, channels, settings.codec_width))
    return load_codec(Path(word).expanduser())


def needs_training(settings: ModelSettings, codec: Codec) -> bool:
    """Whether the codec starts from nothing and is ours to train."""
    return settings.codec in ("auto", "kl", "tiny") and isinstance(codec, TrainableCodec)


def clock_range(theory: Theory) -> tuple[float, float]:
    """What the clock says a hundredth of a radian from either end of the theory."""
    clock = cast(Callable[[torch.Tensor], torch.Tensor], theory.clock)
    ends = clock(theory.time_of(torch.tensor([0.01, math.pi / 2 - 0.01], dtype=torch.float64)))
    return float(ends[0]), float(ends[1])


def new_denoiser(
    settings: ModelSettings,
    theory: Theory,
    codec: Codec,
    widths: tuple[int, int],
    seed: int = 0,
    frames: int = 0,
    classes: int = 0,
) -> Denoiser:
    """The network `model.denoiser` names, its weights drawn from `seed`; for clips of so many latent frames,
    for so many classes.

    Raises:
        Refused: a network of pictures for a codec of clips.
    """
    shared: dict[str, Any] = {
        "channels": codec.latent_channels,
        "width": settings.width,
        "depth": settings.depth,
        "heads": settings.heads,
        "text_width": widths[0],
        "pooled_width": widths[1],
        "clock_range": clock_range(theory),
    }
    shared |= {"classes": classes} if classes else {}
    if user_code.is_user_code(settings.denoiser):
        return seeded(seed, lambda: load_user_stage(settings.denoiser, Denoiser, **shared))
    frames = frames or int(codec.of_clips)
    if settings.denoiser == "unet":
        if frames:
            raise Refused('model.denoiser = "unet" draws pictures, not clips. Take "dit" for clips.')
        return seeded(seed, lambda: UNet(**shared))
    clips = {"frames": frames, "attention": settings.attention, "direct": True} if frames else {}
    return seeded(seed, lambda: DiT(**shared, patch=settings.patch, **clips))


def check_latents(settings: ModelSettings, codec: Codec, width: int, height: int) -> None:
    """Raises Refused unless pictures of this size become latents the denoiser can take."""
    codec.check_size(width, height, f"A picture at data.resolution {width}×{height}")
    step = {"dit": settings.patch, "unet": 2 ** (settings.depth - 1)}.get(settings.denoiser, 1)
    if width // codec.stride % step or height // codec.stride % step:
        grain = codec.stride * step
        raise Refused(
            f"Pictures of {width}×{height} become {width // codec.stride}×{height // codec.stride} latents, "
            f"which this {settings.denoiser} cannot divide by {step}. "
            f"Choose data.resolution in multiples of {grain}, or a smaller "
            f"{'model.patch' if settings.denoiser == 'dit' else 'model.depth'}."
        )


def new_model(
    settings: ModelSettings, codec: Codec, conditioner: Conditioner, seed: int = 0, frames: int = 0
) -> Model:
    """A model from scratch around stages that are ready; `frames` of its clips, 0 for pictures."""
    theory = new_theory(settings.theory)
    width = int(getattr(conditioner, "width", 0))
    widths = width, int(getattr(conditioner, "pooled_width", width))
    latent_frames = codec.latent_frames(frames) if frames else 0
    classes = conditioner.count if isinstance(conditioner, LabelConditioner) else 0
    denoiser = new_denoiser(settings, theory, codec, widths, seed, latent_frames, classes)
    model = Model(theory, codec, conditioner, denoiser)
    model.info["theory"] = settings.theory or DEFAULT_THEORY
    return model
