"""Drawing with a model. The names load on first use."""

from typing import TYPE_CHECKING

from ..lazy import names_from

if TYPE_CHECKING:
    from .pictures import PaintingModel, load, painting, to_images, to_pictures
    from .settings import SampleSettings
else:
    __getattr__, __dir__ = names_from(
        __name__,
        {
            "PaintingModel": ".pictures",
            "SampleSettings": ".settings",
            "load": ".pictures",
            "painting": ".pictures",
            "to_images": ".pictures",
            "to_pictures": ".pictures",
        },
    )

__all__ = ["PaintingModel", "SampleSettings", "load", "painting", "to_images", "to_pictures"]
