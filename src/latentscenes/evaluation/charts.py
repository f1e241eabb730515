"""Line charts as SVG: inside the report and as files of their own. charts.html holds the markup."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 52, WIDTH - 24, 12, HEIGHT - 36
"""Edges of the plot inside a chart."""
PALETTE = ("#2f6bd0", "#d2772a", "#2b9468", "#8455bd", "#c9463f", "#8a8f99", "#1792a4", "#a8841d")

templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
"""The templates of this folder."""


@dataclass(frozen=True)
class Series:
    """One line; x rises."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    color: int = 0
    """Index into PALETTE, modulo its length."""


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    mark: float | None = None,
    mark_label: str = "",
) -> str:
    """A <figure> with the chart and its legend; empty if there is nothing to draw. Points that a logarithm
    cannot take are left out. `mark` draws a vertical line at that x."""
    lines = _drawable(series, log_x, log_y)
    if not lines:
        return ""
    plot = _plot(lines, x_label, log_x, log_y, mark) | {"mark_label": mark_label}
    return templates.get_template("charts.html").module.figure(plot, title, y_label)


def chart_file(
    title: str, series: Sequence[Series], x_label: str, y_label: str, *, log_x: bool = False
) -> str:
    """The text of an SVG file: title above, legend below, on white."""
    plot = _plot(_drawable(series, log_x, False), x_label, log_x, False, None)
    return templates.get_template("charts.html").module.file(plot, title, y_label, PALETTE).lstrip()


def smooth(values: Sequence[float], most: int = 160) -> list[float]:
    """At most `most` means of neighboring values, which keep the course and lose the noise."""
    width = math.ceil(len(values) / most)
    return [sum(values[k : k + width]) / len(values[k : k + width]) for k in range(0, len(values), width)]


def _drawable(series: Sequence[Series], log_x: bool, log_y: bool) -> list[tuple[Series, list]]:
    """Each series with its points that can be drawn. Series without such points are left out."""
    found = []
    for one in series:
        pairs = zip(one.x, one.y, strict=True)
        points = [
            (x, y) for x, y in pairs if math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)
        ]
        if points:
            found.append((one, points))
    return found


def _plot(
    lines: list[tuple[Series, list]], x_label: str, log_x: bool, log_y: bool, mark: float | None
) -> dict[str, Any]:
    """Coordinates of lines, ticks and mark, in units of the chart."""
    x_axis = _Axis.around([x for _, points in lines for x, _ in points], log_x, LEFT, RIGHT, padded=False)
    y_axis = _Axis.around([y for _, points in lines for _, y in points], log_y, BOTTOM, TOP, padded=True)
    shown = mark is not None and x_axis.low <= mark <= x_axis.high
    return {
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM,
        "x_label": x_label, "x_ticks": x_axis.ticks(), "y_ticks": y_axis.ticks(),
        "mark": x_axis.place(mark) if shown else None,
        "lines": [
            {
                "label": one.label,
                "color": one.color % len(PALETTE),
                "points": [(x_axis.place(x), y_axis.place(y)) for x, y in points],
            }
            for one, points in lines
        ],
    }  # fmt: skip


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool
    start: int
    end: int

    @classmethod
    def around(cls, values: list[float], log: bool, start: int, end: int, padded: bool) -> "_Axis":
        low, high = float(min(values, default=1.0)), float(max(values, default=2.0))
        if log:
            if padded:
                low, high = low / 1.15, high * 1.15
            return cls(low, max(high, low * 1.5), True, start, end)
        air = 0.06 * (high - low) if padded else 0.0
        return cls(low - air, max(high + air, low + 1e-9), False, start, end)

    def place(self, value: float) -> float:
        """Where a value lies between `start` and `end`, to a tenth."""
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return round(self.start + (self.end - self.start) * (value - low) / (high - low), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels of round numbers inside."""
        return [(self.place(value), _number(value)) for value in self._round_numbers()]

    def _round_numbers(self) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
                values = [step * 10.0**decade for decade in decades for step in steps]
                found = [value for value in values if self.low <= value <= self.high]
                if len(found) >= 3:
                    return found[:: math.ceil(len(found) / 6)]
            # less than a third of a decade: as on a linear axis
        rough = (self.high - self.low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [step * k for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return f"{value:.10g}" if abs(value) < 1000 else f"{value:,.0f}".replace(",", " ")
