"""A model from scratch: each stage as the recipe's [model] section describes it."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from sfumato import own
from sfumato.errors import Refused
from sfumato.theory import Theory, get

from .clips import ClipCodec, FramewiseCodec
from .codec import AutoencoderCodec, PixelCodec, ResidualCodec
from .dit import DiT
from .interface import Codec, Conditioner, Denoiser, Model, Stage, TrainableCodec
from .labels import LabelConditioner
from .settings import ModelSettings
from .text import NoConditioner, TextConditioner
from .unet import UNet

DEFAULT_THEORY = "flow-matching"
Kind = TypeVar("Kind", bound=Stage)


def seeded(seed: int, make: Callable[[], Any]) -> Any:
    """What `make` builds with torch's generator at `seed`; the generator's own state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def new_theory(word: str) -> Theory:
    """The theory a recipe names: of the catalogue, or `file.py:name` (a Theory, or what makes one)."""
    if not own.is_own(word):
        return get(word or DEFAULT_THEORY)
    made = own.load_own(word)
    theory = made() if callable(made) and not isinstance(made, Theory) else made
    if not isinstance(theory, Theory):
        raise Refused(f"{word} is a {type(theory).__name__}, but a theory must be a sfumato.Theory.")
    return theory


def own_stage(word: str, kind: type[Kind], **arguments: Any) -> Kind:
    """The stage `file.py:name` makes when called with the arguments it takes; an object is that stage itself.

    Of a denoiser that is an object a copy is taken, because it is trained.

    Raises:
        Refused: it makes no such stage, or cannot be called so.
    """
    made = own.load_own(word)
    if callable(made) and not isinstance(made, nn.Module):
        try:
            stage = made(**arguments)
        except TypeError as problem:
            raise Refused(
                f"{own.problem_in(word, problem)}. A {kind.__name__} is made by calling it with "
                f"{', '.join(arguments) or 'nothing'}."
            ) from problem
    else:
        stage = copy.deepcopy(made) if isinstance(made, Denoiser) else made
    if not isinstance(stage, kind):
        raise Refused(f"{word} gives a {type(stage).__name__}, but here a {kind.__name__} is needed.")
    stage.own_name = "" if is_ours(type(stage)) else own.class_word(word)
    return stage


def is_ours(kind: type) -> bool:
    """Whether a class comes with sfumato."""
    return kind.__module__.split(".")[0] == __name__.split(".")[0]


def new_conditioner(settings: ModelSettings, classes: Sequence[str] = ()) -> Conditioner:
    """The conditioner `model.text` names; for "labels", of these classes."""
    if own.is_own(settings.text):
        return own_stage(settings.text, Conditioner)
    if settings.text == "none":
        return NoConditioner()
    if settings.text == "labels":
        return LabelConditioner({name: index for index, name in enumerate(classes)}, len(classes))
    return TextConditioner(settings.text, waves=settings.text_waves)


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
        shape = settings.stride, settings.latent_channels, settings.codec_width, settings.time_stride
        return seeded(seed, lambda: ClipCodec(*shape))
    if settings.codec in ("kl", "tiny"):
        raise Refused(
            f'model.codec = "{settings.codec}" is trained on pictures, but data.frames asks for clips. Take '
            "auto; or train it in a run without data.frames and name that run's model/codec."
        )
    codec = _new_codec(settings, seed)
    return codec if codec.of_clips else FramewiseCodec(codec)


def _new_codec(settings: ModelSettings, seed: int) -> Codec:
    word, stride, channels = settings.codec, settings.stride, settings.latent_channels
    if own.is_own(word):
        return own_stage(word, Codec)
    if word == "pixels":
        return PixelCodec()
    if word == "auto":
        return seeded(seed, lambda: ResidualCodec(stride, channels, settings.codec_width))
    if word in ("kl", "tiny"):
        name = "AutoencoderKL" if word == "kl" else "AutoencoderTiny"
        return seeded(seed, lambda: AutoencoderCodec.small(name, stride, channels, settings.codec_width))
    from .weights import load_codec

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
    if own.is_own(settings.denoiser):
        return seeded(seed, lambda: own_stage(settings.denoiser, Denoiser, **shared))
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


def build(
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
