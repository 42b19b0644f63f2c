"""Studio: what a run's folder holds, made visible. It opens on a laptop without torch."""

from typing import TYPE_CHECKING

from ..lazy import names_from

if TYPE_CHECKING:
    from .charts import Axis, Line, chart
    from .report import render, write
else:
    __getattr__, __dir__ = names_from(
        __name__,
        {
            "Axis": ".charts",
            "Line": ".charts",
            "chart": ".charts",
            "render": ".report",
            "write": ".report",
        },
    )

__all__ = ["Axis", "Line", "chart", "render", "write"]
