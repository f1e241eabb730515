"""Line charts as inline SVG: no library, colours by CSS classes s0 … s7, so that light and dark are the page's business.
`chart_file` writes the same as a file, with colours for a white page."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 24.0, 12.0, 36.0


@dataclass(frozen=True)
class Series:
    """One line; x rises."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    colour: int = 0
    """0 … 7."""


def line_chart(
    title: str, series: Sequence[Series], x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False, mark: float | None = None, mark_label: str = ""
) -> str:
    """A <figure> with the chart and its legend. Points that a logarithm cannot take are left out; `mark` is a
    vertical line at that x."""
    kept = [one for one in (_drawable(one, log_x, log_y) for one in series) if one.x]
    if not kept:
        return ""
    drawing = _drawing(kept, x_label, log_x, log_y, mark, mark_label)
    legend = "".join(f'<span><i class="b{one.colour % 8}"></i>{html.escape(one.label)}</span>' for one in kept)
    return (
        f'<figure class="chart"><b>{html.escape(title)}</b><small>{html.escape(y_label)}</small>'
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{html.escape(title)}">{drawing}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def _drawing(kept: list[Series], x_label: str, log_x: bool, log_y: bool, mark: float | None = None, mark_label: str = "") -> str:
    """Axes and lines, WIDTH by HEIGHT."""
    x_axis = _Axis.around([x for one in kept for x in one.x], log_x, LEFT, WIDTH - RIGHT, padded=False)
    y_axis = _Axis.around([y for one in kept for y in one.y], log_y, HEIGHT - BOTTOM, TOP, padded=True)
    parts = []
    for value in y_axis.ticks():
        at = y_axis.place(value)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in x_axis.ticks():
        at = x_axis.place(value)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{_number(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 5:.0f}" text-anchor="middle">{html.escape(x_label)}</text>')
    if mark is not None and x_axis.low <= mark <= x_axis.high:
        at = x_axis.place(mark)
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        side, shift = ("end", -5) if at > WIDTH / 2 else ("start", 5)
        parts.append(f'<text class="mark" x="{at + shift:.1f}" y="{TOP + 9}" text-anchor="{side}">{html.escape(mark_label)}</text>')
    for one in kept:
        points = " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in zip(one.x, one.y, strict=True))
        parts.append(f'<polyline class="s{one.colour % 8}" points="{points}"/>' if len(one.x) > 1 else _dot(points, one.colour))
    return "".join(parts)


PALETTE = ("#2f6bd0", "#d2772a", "#2b9468", "#8455bd", "#c9463f", "#8a8f99", "#1792a4", "#a8841d")


def chart_file(title: str, series: Sequence[Series], x_label: str, y_label: str, *, log_x: bool = False) -> str:
    """The text of an SVG file: title above, legend below, on white."""
    kept = [one for one in (_drawable(one, log_x, False) for one in series) if one.x]
    style = "text{font:12px system-ui,sans-serif;fill:#555}.t{font-size:14px;font-weight:600;fill:#222}polyline{fill:none;stroke-width:2}.rule{stroke:#e3e3dd}.axis{stroke:#888}"
    style += "".join(f".s{k}{{stroke:{colour}}}.b{k}{{fill:{colour}}}" for k, colour in enumerate(PALETTE))
    legend = "".join(
        f'<rect class="b{one.colour % 8}" x="{LEFT}" y="{HEIGHT + 35 + 18 * k:.0f}" width="10" height="10"/>'
        f'<text x="{LEFT + 16}" y="{HEIGHT + 44 + 18 * k:.0f}">{html.escape(one.label)}</text>'
        for k, one in enumerate(kept)
        if one.label
    )
    drawing = _drawing(kept, x_label, log_x, False) if kept else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {HEIGHT + 40 + 18 * len(kept):.0f}" width="{1.5 * WIDTH:.0f}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>'
        f'<text class="t" x="8" y="18">{html.escape(title)}</text><text x="8" y="34">{html.escape(y_label)}</text>'
        f'<g transform="translate(0 30)">{drawing}</g>{legend}</svg>\n'
    )


def smooth(values: Sequence[float], most: int = 160) -> list[float]:
    """At most so many means of neighbours: noise down, course kept."""
    width = math.ceil(len(values) / most)
    return [sum(values[k : k + width]) / len(values[k : k + width]) for k in range(0, len(values), width)]


def _dot(point: str, colour: int) -> str:
    x, y = point.split(",")
    return f'<circle class="b{colour % 8}" cx="{x}" cy="{y}" r="3"/>'


def _drawable(series: Series, log_x: bool, log_y: bool) -> Series:
    points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)]
    return Series(series.label, tuple(x for x, _ in points), tuple(y for _, y in points), series.colour)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool
    start: float
    end: float

    @classmethod
    def around(cls, values: list[float], log: bool, start: float, end: float, padded: bool) -> "_Axis":
        low, high = float(min(values)), float(max(values))
        if log:
            if padded:
                low, high = low / 1.15, high * 1.15
            return cls(low, max(high, low * 1.5), True, start, end)
        air = 0.06 * (high - low) if padded else 0.0
        return cls(low - air, max(high + air, low + 1e-9), False, start, end)

    def place(self, value: float) -> float:
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers inside."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
                found = [step * 10.0**decade for decade in decades for step in steps if self.low <= step * 10.0**decade <= self.high]
                if len(found) >= 3:
                    return found[:: math.ceil(len(found) / 6)]
            # less than a third of a decade: as if it were linear
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
