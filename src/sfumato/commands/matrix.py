"""Errors of solvers on grids as a matrix: a row each solver, a column each grid, the nearer the darker."""

import math
from collections.abc import Sequence
from typing import Any

from ..studio.page import escape

INK = "47, 111, 159"
DARKEST = 0.5


def laid_out(rows: Sequence[dict[str, Any]]) -> tuple[list[str], dict[str, dict[str, dict[str, Any]]]]:
    """(grids, {solver: {grid: row}}): solvers by their best error, grids by theirs, ours before others'."""

    def best(key: str, name: str) -> float:
        return min(row.get("error", math.inf) for row in rows if row[key] == name)

    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    solvers.sort(key=lambda name: (name.startswith("diffusers"), best("solver", name)))
    grids = list(dict.fromkeys(row["grid"] for row in rows))
    grids.sort(key=lambda name: (name == "its own", best("grid", name)))
    return grids, {one: {row["grid"]: row for row in rows if row["solver"] == one} for one in solvers}


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The matrix for a terminal; what was refused is a dash, and its sentence follows."""
    grids, solvers = laid_out(rows)
    lines = ["".join([f"{'':24}", *(f"{name:>11}" for name in grids)])]
    for solver, found in solvers.items():
        cells = [f"{_error(found[name]):>11}" if name in found else " " * 11 for name in grids]
        lines.append(f"{solver:24}" + "".join(cells))
    refused = dict.fromkeys(row["refused"] for row in rows if "refused" in row)
    return "\n".join(line.rstrip() for line in [*lines, *(f"—  {sentence}" for sentence in refused)])


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """The matrix for a page; a cell's number of evaluations, or why it was refused, shows when pointed at."""
    grids, solvers = laid_out(rows)
    errors = [math.log(row["error"]) for row in rows if row.get("error", 0) > 0]
    low, high = (min(errors), max(errors)) if errors else (0.0, 0.0)
    head = "".join(f"<th>{escape(name)}</th>" for name in ["solver", *grids])
    lines = []
    for solver, found in solvers.items():
        cells = "".join(_cell(found.get(name), low, high) for name in grids)
        lines.append(f"<tr><td>{escape(solver)}</td>{cells}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _cell(row: dict[str, Any] | None, low: float, high: float) -> str:
    if row is None:
        return "<td></td>"
    if "error" not in row:
        return f'<td title="{escape(row["refused"])}">—</td>'
    place = (high - math.log(max(row["error"], 1e-300))) / max(high - low, 1e-9)
    ink = f"background: rgba({INK}, {DARKEST * place:.2f}); padding-left: 10px; padding-right: 12px"
    words = f"{row['evaluations']} evaluations"
    text = f"<b>{_error(row)}</b>" if place > 0.999 else _error(row)
    return f'<td style="{ink}" title="{words}">{text}</td>'


def _error(row: dict[str, Any]) -> str:
    return f"{row['error']:.1e}" if "error" in row else "—"
