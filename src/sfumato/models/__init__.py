"""The three stages of a model: codec, conditioner, denoiser.

The names load on first use, so that reading a recipe's settings does not load torch.
"""

from typing import TYPE_CHECKING

from sfumato.lazy import names_from

if TYPE_CHECKING:
    from sfumato.models.build import (
        check_latents,
        needs_training,
        new_codec,
        new_conditioner,
        new_model,
        new_theory,
    )
    from sfumato.models.codecs.load import load_codec
    from sfumato.models.condition import Condition
    from sfumato.models.interface import Codec, Conditioner, Denoiser, Model, TrainableCodec
    from sfumato.models.io.model import load, save
    from sfumato.models.stage_folder import load_stage, save_stage
else:
    __getattr__, __dir__ = names_from(
        __name__,
        {
            "Codec": "sfumato.models.interface",
            "Condition": "sfumato.models.condition",
            "Conditioner": "sfumato.models.interface",
            "Denoiser": "sfumato.models.interface",
            "Model": "sfumato.models.interface",
            "TrainableCodec": "sfumato.models.interface",
            "check_latents": "sfumato.models.build",
            "load": "sfumato.models.io.model",
            "load_codec": "sfumato.models.codecs.load",
            "load_stage": "sfumato.models.stage_folder",
            "needs_training": "sfumato.models.build",
            "new_codec": "sfumato.models.build",
            "new_conditioner": "sfumato.models.build",
            "new_model": "sfumato.models.build",
            "new_theory": "sfumato.models.build",
            "save": "sfumato.models.io.model",
            "save_stage": "sfumato.models.stage_folder",
        },
    )

__all__ = [
    "Codec",
    "Condition",
    "Conditioner",
    "Denoiser",
    "Model",
    "TrainableCodec",
    "check_latents",
    "load",
    "load_codec",
    "load_stage",
    "needs_training",
    "new_codec",
    "new_conditioner",
    "new_model",
    "new_theory",
    "save",
    "save_stage",
]
