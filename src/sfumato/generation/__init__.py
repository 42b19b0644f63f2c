"""Drawing with a model. The names load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pictures import PaintingModel, load, painting, to_images, to_pictures

__all__ = ["PaintingModel", "load", "painting", "to_images", "to_pictures"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.pictures"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
