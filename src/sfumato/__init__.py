"""sfumato: trains diffusion models for images and video, and draws with them.

The public names load on first use, so that `import sfumato` is instant.
"""

from typing import TYPE_CHECKING

from .lazy import names_from

__version__ = "0.2.0"

if TYPE_CHECKING:
    from .errors import Failed, Refused
    from .generation import load
    from .recipe import Recipe
    from .theory import Theory
    from .workflow import Run, encode, train
else:
    __getattr__, __dir__ = names_from(
        __name__,
        {
            "Failed": ".errors",
            "Recipe": ".recipe",
            "Refused": ".errors",
            "Run": ".workflow",
            "Theory": ".theory",
            "encode": ".workflow",
            "load": ".generation",
            "train": ".workflow",
        },
    )

__all__ = ["Failed", "Recipe", "Refused", "Run", "Theory", "__version__", "encode", "load", "train"]
