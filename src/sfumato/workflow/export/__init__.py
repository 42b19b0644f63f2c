"""Files that load elsewhere, verified before they are declared written. The names load on first use."""

from typing import TYPE_CHECKING

from sfumato.lazy import names_from

if TYPE_CHECKING:
    from sfumato.workflow.export.compare import Exported
    from sfumato.workflow.export.export_run import export
else:
    __getattr__, __dir__ = names_from(
        __name__,
        {
            "Exported": "sfumato.workflow.export.compare",
            "export": "sfumato.workflow.export.export_run",
        },
    )

__all__ = ["Exported", "export"]
