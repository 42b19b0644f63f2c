"""Drawing with a model."""

from .pictures import PaintingModel, load, painting, to_images

__all__ = ["PaintingModel", "load", "painting", "to_images"]
