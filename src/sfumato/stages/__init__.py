"""The three stages of a model: codec, conditioner, denoiser.

The names load on first use, so that reading a recipe's settings does not load torch.
"""

from typing import TYPE_CHECKING

from ..lazy import names_from

if TYPE_CHECKING:
    from .codec_folder import load_codec
    from .interface import Codec, Condition, Conditioner, Denoiser, Model, TrainableCodec
    from .scratch import build, check_latents, needs_training, new_codec, new_conditioner, new_theory
    from .stage_folder import load_stage, save_stage
    from .weights import load, save
else:
    __getattr__, __dir__ = names_from(
        __name__,
        {
            "Codec": ".interface",
            "Condition": ".interface",
            "Conditioner": ".interface",
            "Denoiser": ".interface",
            "Model": ".interface",
            "TrainableCodec": ".interface",
            "build": ".scratch",
            "check_latents": ".scratch",
            "load": ".weights",
            "load_codec": ".codec_folder",
            "load_stage": ".stage_folder",
            "needs_training": ".scratch",
            "new_codec": ".scratch",
            "new_conditioner": ".scratch",
            "new_theory": ".scratch",
            "save": ".weights",
            "save_stage": ".stage_folder",
        },
    )

__all__ = [
    "Codec",
    "Condition",
    "Conditioner",
    "Denoiser",
    "Model",
    "TrainableCodec",
    "build",
    "check_latents",
    "load",
    "load_codec",
    "load_stage",
    "needs_training",
    "new_codec",
    "new_conditioner",
    "new_theory",
    "save",
    "save_stage",
]
