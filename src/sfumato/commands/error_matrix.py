"""Errors of solvers on grids as a matrix: a row each solver, a column each grid, the nearer the darker."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from sfumato.report.page import part


def as_matrix(rows: Sequence[dict[str, Any]]) -> tuple[list[str], dict[str, dict[str, dict[str, Any]]]]:
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
    grids, solvers = as_matrix(rows)
    lines = ["".join([f"{'':24}", *(f"{name:>11}" for name in grids)])]
    for solver, found in solvers.items():
        cells = [f"{_error(found[name]):>11}" if name in found else " " * 11 for name in grids]
        lines.append(f"{solver:24}" + "".join(cells))
    refused = dict.fromkeys(row["refused"] for row in rows if "refused" in row)
    return "\n".join(line.rstrip() for line in [*lines, *(f"—  {sentence}" for sentence in refused)])


def as_table(rows: Sequence[dict[str, Any]]) -> Markup:
    """The matrix for a page; a cell's number of evaluations, or why it was refused, shows when pointed at."""
    grids, solvers = as_matrix(rows)
    errors = [math.log(row["error"]) for row in rows if row.get("error", 0) > 0]
    ends = (min(errors), max(errors)) if errors else (0.0, 0.0)
    cells = [(solver, [_cell(found.get(name), *ends) for name in grids]) for solver, found in solvers.items()]
    return part("matrix", grids, cells)


def _cell(row: dict[str, Any] | None, low: float, high: float) -> dict[str, Any]:
    """A cell's text and note; its ink between 0, the farthest, and 1, or None without an error."""
    if row is None:
        return {"text": "", "note": "", "ink": None}
    if "error" not in row:
        return {"text": _error(row), "note": row["refused"], "ink": None}
    ink = (high - math.log(max(row["error"], 1e-300))) / max(high - low, 1e-9)
    note = f"{row['evaluations']} evaluations"
    return {"text": _error(row), "note": note, "ink": ink, "best": ink > 0.999}


def _error(row: dict[str, Any]) -> str:
    return f"{row['error']:.1e}" if "error" in row else "—"
