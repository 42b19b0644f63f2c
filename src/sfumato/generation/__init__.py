"""Drawing with a model. The names load on first use."""

from typing import TYPE_CHECKING

from sfumato.lazy import names_from

if TYPE_CHECKING:
    from sfumato.generation.pipeline import Pipeline, as_pipeline, load, to_images, to_pictures
    from sfumato.generation.settings import SampleSettings
else:
    __getattr__, __dir__ = names_from(
        __name__,
        {
            "Pipeline": "sfumato.generation.pipeline",
            "SampleSettings": "sfumato.generation.settings",
            "as_pipeline": "sfumato.generation.pipeline",
            "load": "sfumato.generation.pipeline",
            "to_images": "sfumato.generation.pipeline",
            "to_pictures": "sfumato.generation.pipeline",
        },
    )

__all__ = ["Pipeline", "SampleSettings", "as_pipeline", "load", "to_images", "to_pictures"]
