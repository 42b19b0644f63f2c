"""Data: from any collection of captioned pictures to training batches, nothing lost, nothing stale.

The names load on first use, so that reading a recipe's settings does not load torch.
"""

from typing import TYPE_CHECKING

from sfumato.lazy import names_from

if TYPE_CHECKING:
    from sfumato.data.settings import DataSettings
    from sfumato.data.sources.sample import Collection, Sample, SetAside
    from sfumato.data.store.store import Store
else:
    __getattr__, __dir__ = names_from(
        __name__,
        {
            "Collection": "sfumato.data.sources.sample",
            "DataSettings": "sfumato.data.settings",
            "Sample": "sfumato.data.sources.sample",
            "SetAside": "sfumato.data.sources.sample",
            "Store": "sfumato.data.store.store",
        },
    )

__all__ = ["Collection", "DataSettings", "Sample", "SetAside", "Store"]
