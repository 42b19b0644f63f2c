"""Training: what is minimised, in which steps, and how none of them is ever lost.

The names load on first use, so that reading a recipe's settings does not load torch.
"""

from typing import TYPE_CHECKING

from sfumato.lazy import names_from

if TYPE_CHECKING:
    from sfumato.training.loop.loop import Outcome, fit
    from sfumato.training.objective.diffusion import DiffusionObjective, Losses, Objective
    from sfumato.training.settings import TrainSettings
else:
    __getattr__, __dir__ = names_from(
        __name__,
        {
            "DiffusionObjective": "sfumato.training.objective.diffusion",
            "Losses": "sfumato.training.objective.diffusion",
            "Objective": "sfumato.training.objective.diffusion",
            "Outcome": "sfumato.training.loop.loop",
            "TrainSettings": "sfumato.training.settings",
            "fit": "sfumato.training.loop.loop",
        },
    )

__all__ = ["DiffusionObjective", "Losses", "Objective", "Outcome", "TrainSettings", "fit"]
