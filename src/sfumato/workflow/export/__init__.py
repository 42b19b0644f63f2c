"""Files that load elsewhere, verified before they are declared written. The names load on first use."""

from typing import TYPE_CHECKING

from sfumato.lazy import names_from

if TYPE_CHECKING:
    from sfumato.workflow.export.compare import Exported
    from sfumato.workflow.export.export_run import export
    from sfumato.workflow.export.push import Upload, prepare_upload, upload
else:
    __getattr__, __dir__ = names_from(
        __name__,
        {
            "Exported": "sfumato.workflow.export.compare",
            "Upload": "sfumato.workflow.export.push",
            "export": "sfumato.workflow.export.export_run",
            "prepare_upload": "sfumato.workflow.export.push",
            "upload": "sfumato.workflow.export.push",
        },
    )

__all__ = ["Exported", "Upload", "export", "prepare_upload", "upload"]
