"""Reports: what a run's folder holds, made visible. It opens on a laptop without torch."""

from typing import TYPE_CHECKING

from sfumato.lazy import names_from

if TYPE_CHECKING:
    from sfumato.report.charts import Axis, Line, chart
    from sfumato.report.run_page import render, write
else:
    __getattr__, __dir__ = names_from(
        __name__,
        {
            "Axis": "sfumato.report.charts",
            "Line": "sfumato.report.charts",
            "chart": "sfumato.report.charts",
            "render": "sfumato.report.run_page",
            "write": "sfumato.report.run_page",
        },
    )

__all__ = ["Axis", "Line", "chart", "render", "write"]
