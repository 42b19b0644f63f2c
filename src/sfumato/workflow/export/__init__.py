"""Files that load elsewhere, verified before they are declared written."""

from sfumato.workflow.export.compare import Exported
from sfumato.workflow.export.export_run import export

__all__ = ["Exported", "export"]
