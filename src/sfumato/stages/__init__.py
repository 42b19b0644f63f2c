"""The three stages of a model: codec, conditioner, denoiser.

The names load on first use, so that reading a recipe's settings does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .codec_folder import load_codec
    from .interface import Codec, Condition, Conditioner, Denoiser, Model, TrainableCodec
    from .scratch import build, check_latents, needs_training, new_codec, new_conditioner, new_theory
    from .stage_folder import load_stage, save_stage
    from .weights import load, save

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


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in ("interface", "scratch", "weights"):
            module = import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
