"""Training: what is minimised, in which steps, and how none of them is ever lost.

The names load on first use, so that reading a recipe's settings does not load torch.
"""

from typing import TYPE_CHECKING

from ..lazy import names_from

if TYPE_CHECKING:
    from .loop import Outcome, fit
    from .objective import DiffusionObjective, Losses, Objective
    from .settings import TrainSettings
else:
    __getattr__, __dir__ = names_from(
        __name__,
        {
            "DiffusionObjective": ".objective",
            "Losses": ".objective",
            "Objective": ".objective",
            "Outcome": ".loop",
            "TrainSettings": ".settings",
            "fit": ".loop",
        },
    )

__all__ = ["DiffusionObjective", "Losses", "Objective", "Outcome", "TrainSettings", "fit"]
