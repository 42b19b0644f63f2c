"""The three stages of a model: codec, conditioner, denoiser."""

from .build import build, check_latents, needs_training, new_codec, new_conditioner, new_theory
from .interface import Codec, Condition, Conditioner, Denoiser, Model, TrainableCodec
from .weights import load, load_codec, load_stage, save, save_stage

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
