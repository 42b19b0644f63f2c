"""Charts drawn by hand as SVG: lines with error bars, linear or logarithmic, values under the pointer."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

LEFT, RIGHT, TOP, BOTTOM = 54, 16, 12, 38


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    x and y have one length; error, if given, is the half height of each point's bar. color is an index
    into the page's six, or a CSS colour. A faint line is background: no legend, no values under the pointer.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    color: int | str = 0
    faint: bool = False
    dashed: bool = False
    points: bool = False


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        here = math.log(max(value, self.low * 1e-9, 5e-324)) if self.log else value
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values along the axis."""
        if self.log and self.high > 4 * self.low:
            return self._log_ticks()
        raw = (self.high - self.low) / about
        size = 10 ** math.floor(math.log10(raw))
        step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [(first + index) * step for index in range(count)]

    def _log_ticks(self) -> list[float]:
        decades = math.log10(self.high) - math.log10(self.low)
        factors = (
            (1,) if decades > 4 else (1, 3) if decades > 2 else (1, 2, 5) if decades > 0.7 else range(1, 10)
        )
        every = max(1, round(decades / 8))
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1, every)
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
        return found if len(found) > 1 else [self.low, self.high]


def _bounds(values: Sequence[float], log: bool, zero: bool) -> tuple[float, float]:
    """Lowest and highest of the finite values (positive ones for a log axis), with room around them."""
    good = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not good:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(good), max(good)
    if log:
        return (max(low / 1.1, 5e-324), min(high * 1.1, sys.float_info.max))
    if zero:
        low = min(low, 0.0)
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return (low if zero and low == 0 else low - room, high + room)


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
    width: int = 520,
    height: int = 280,
    note: str = "",
) -> Markup:
    """A figure with its lines, axes, legend and values under the pointer; empty without any points.

    Args:
        x, y: what the axes show, with units.
        zero: let a linear y axis start at 0.
        width, height: of the drawing, in pixels; it shrinks with the page.
    """
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return Markup("")
    across = [value for line in lines for value in line.x]
    low, high = min(across), max(across)
    if log_x:
        low, high = _bounds(across, True, False)
    elif low == high:
        low, high = low - 0.5, high + 0.5
    up = [value for line in lines for value in _extent(line, log_y)]
    horizontal = Axis(low, high, LEFT, width - RIGHT, log_x)
    vertical = Axis(*_bounds(up, log_y, zero), height - BOTTOM, TOP, log_y)
    drawing = _frame(horizontal, vertical, x, y, width, height)
    drawing += "".join(_svg_line(line, horizontal, vertical) for line in lines)
    drawing += f'<line class="guide" y1="{TOP}" y2="{height - BOTTOM}" hidden></line>'
    return Markup(
        f'<figure class="chart"><h3>{escape(title)}</h3>{_legend(lines)}'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{drawing}</svg>'
        f'<script type="application/json">{_values(lines, horizontal, vertical, x)}</script>'
        f"{f'<figcaption>{escape(note)}</figcaption>' if note else ''}</figure>"
    )


def _extent(line: Line, log: bool) -> list[float]:
    """The values a line needs on its axis: the ends of its error bars too."""
    if line.error is None:
        return list(line.y)
    lows = [max(y - e, y / 2) if log else y - e for y, e in zip(line.y, line.error, strict=True)]
    return lows + [y + e for y, e in zip(line.y, line.error, strict=True)]


def _frame(horizontal: Axis, vertical: Axis, x: str, y: str, width: int, height: int) -> str:
    """Grid, ticks and names of the axes."""
    parts = []
    for value in vertical.ticks():
        at, label = vertical(value), format_number(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 3.5:.1f}" text-anchor="end">{label}</text>')
    for value in horizontal.ticks(6):
        at = horizontal(value)
        place = f'x="{at:.1f}" y="{height - BOTTOM + 16}" text-anchor="middle"'
        parts.append(f'<text class="tick" {place}>{format_number(value)}</text>')
    floor = height - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{floor}" y2="{floor}"/>')
    middle = (LEFT + width - RIGHT) / 2
    parts.append(f'<text class="name" x="{middle}" y="{height - 4}" text-anchor="middle">{escape(x)}</text>')
    turned = f'transform="translate(11 {(TOP + floor) / 2}) rotate(-90)"'
    parts.append(f'<text class="name" {turned} text-anchor="middle">{escape(y)}</text>')
    return "".join(parts)


def _style(line: Line) -> str:
    return f"c{line.color % 6}" if isinstance(line.color, int) else ""


def _color(line: Line) -> str:
    return "" if isinstance(line.color, int) else f' style="--c:{line.color}"'


def _svg_line(line: Line, horizontal: Axis, vertical: Axis) -> str:
    """A line with its error bars and points; broken where a value is not finite."""
    pieces: list[list[str]] = [[]]
    for px, py in zip(line.x, line.y, strict=True):
        if math.isfinite(py) and (py > 0 or not vertical.log):
            pieces[-1].append(f"{horizontal(px):.1f},{vertical(py):.1f}")
        elif pieces[-1]:
            pieces.append([])
    kind = " faint" if line.faint else " dashed" if line.dashed else ""
    marks = "".join(f'<polyline points="{" ".join(piece)}"/>' for piece in pieces if piece)
    for px, py, half in zip(line.x, line.y, line.error or (), strict=False):
        at, low, high = horizontal(px), vertical(max(py - half, vertical.low)), vertical(py + half)
        marks += f'<path class="bar" d="M{at:.1f} {low:.1f}V{high:.1f}"/>'
    if line.points or len(line.x) == 1:
        dots = [point.split(",") for piece in pieces for point in piece]
        marks += "".join(f'<circle cx="{a}" cy="{b}" r="2.6"/>' for a, b in dots)
    return f'<g class="line {_style(line)}{kind}"{_color(line)}>{marks}</g>'


def _legend(lines: Sequence[Line]) -> str:
    named = [line for line in lines if line.name and not line.faint]
    if len(named) < 2:
        return ""
    items = (
        f'<li><i class="{_style(line)}{" dashed" * line.dashed}"{_color(line)}></i>{escape(line.name)}</li>'
        for line in named
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _values(lines: Sequence[Line], horizontal: Axis, vertical: Axis, x: str) -> str:
    """What the pointer shows: for each line its points in pixels and in words."""
    shown = [
        {
            "name": line.name,
            "style": _style(line),
            "color": line.color if isinstance(line.color, str) else "",
            "points": [
                [
                    round(horizontal(px), 1),
                    round(vertical(py), 1),
                    f"{x} {format_number(px)}",
                    format_number(py)
                    + (f" ± {format_number(line.error[index])}" if line.error is not None else ""),
                ]
                for index, (px, py) in enumerate(zip(line.x, line.y, strict=True))
                if math.isfinite(py) and (py > 0 or not vertical.log)
            ],
        }
        for line in lines
        if not line.faint
    ]
    return json.dumps(shown, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def format_number(value: float) -> str:
    """A number for a tick or a tip: 2000, 0.25, 3e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.2g}"
    if float(value).is_integer():
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def downsample(x: Sequence[float], y: Sequence[float], most: int = 500) -> tuple[list[float], list[float]]:
    """At most `most` points: neighbors are averaged."""
    if len(x) <= most:
        return list(x), list(y)
    edges = [round(index * len(x) / most) for index in range(most + 1)]
    spans = [(low, high) for low, high in pairwise(edges) if high > low]
    return (
        [sum(x[low:high]) / (high - low) for low, high in spans],
        [sum(y[low:high]) / (high - low) for low, high in spans],
    )


def smooth(y: Sequence[float], width: float) -> list[float]:
    """y averaged over about `width` neighbors on both sides, with exponential weights; nothing lags.

    A forward and a backward average of the same decay are combined, each counting its own weights.
    """
    if width <= 0:
        return list(y)
    keep = math.exp(-1 / width)

    def run(values: Sequence[float]) -> list[tuple[float, float]]:
        total = weight = 0.0
        sums = []
        for value in values:
            if math.isfinite(value):
                total, weight = total * keep + value, weight * keep + 1
            sums.append((total, weight))
        return sums

    forward, backward = run(y), run(y[::-1])[::-1]
    middle = [value if math.isfinite(value) else 0.0 for value in y]
    return [
        (a[0] + b[0] - value) / max(a[1] + b[1] - 1, 1e-9)
        for a, b, value in zip(forward, backward, middle, strict=True)
    ]
