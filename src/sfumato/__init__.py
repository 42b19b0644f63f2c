"""sfumato: trains diffusion models for images and video, and draws with them.

The public names load on first use, so that `import sfumato` is instant.
"""

from typing import TYPE_CHECKING

from sfumato.lazy import names_from

__version__ = "0.2.0"

if TYPE_CHECKING:
    from sfumato.errors import Failed, Refused
    from sfumato.generation import load
    from sfumato.recipe import Recipe
    from sfumato.theory import Theory
    from sfumato.workflow import Run, encode, train
else:
    __getattr__, __dir__ = names_from(
        __name__,
        {
            "Failed": "sfumato.errors",
            "Recipe": "sfumato.recipe",
            "Refused": "sfumato.errors",
            "Run": "sfumato.workflow",
            "Theory": "sfumato.theory",
            "encode": "sfumato.workflow",
            "load": "sfumato.generation",
            "train": "sfumato.workflow",
        },
    )

__all__ = ["Failed", "Recipe", "Refused", "Run", "Theory", "__version__", "encode", "load", "train"]
