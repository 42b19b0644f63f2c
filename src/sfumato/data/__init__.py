"""Data: from any collection of captioned pictures to training batches, nothing lost, nothing stale.

The names load on first use, so that reading a recipe's settings does not load torch.
"""

from typing import TYPE_CHECKING

from ..lazy import names_from

if TYPE_CHECKING:
    from .sample import Collection, Sample, SetAside
    from .settings import DataSettings
    from .store import Store
else:
    __getattr__, __dir__ = names_from(
        __name__,
        {
            "Collection": ".sample",
            "DataSettings": ".settings",
            "Sample": ".sample",
            "SetAside": ".sample",
            "Store": ".store",
        },
    )

__all__ = ["Collection", "DataSettings", "Sample", "SetAside", "Store"]
