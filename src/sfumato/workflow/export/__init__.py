"""Files that load elsewhere, verified before they are declared written."""

from sfumato.workflow.export.compare import Exported
from sfumato.workflow.export.export_run import export
from sfumato.workflow.export.push import Upload, prepare_upload, upload

__all__ = ["Exported", "Upload", "export", "prepare_upload", "upload"]
