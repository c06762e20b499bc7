"""Draws charts as SVG."""

from __future__ import annotations

__all__ = ["Chart", "decades", "draw_charts"]

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from ._text import duration, safe

_WIDTHS = {"wide": 900, "narrow": 340}


class Chart:
    """An SVG with axes. Places run from 0 at the left to 1 at the right; heights are values."""

    # The margin at the top has room for the unit and up to three marks.
    TOP, BOTTOM, LEFT, RIGHT, HEIGHT = 54.0, 26.0, 48.0, 14.0, 240.0

    def __init__(self, width: float, spoken: str) -> None:
        self.width = width
        self.top_value = 1.0
        self.parts = [
            f'<svg viewBox="0 0 {width:g} {self.HEIGHT:g}" role="img" aria-label="{safe(spoken)}">'
            f"<title>{safe(spoken)}</title>"
        ]

    def x(self, place: float) -> float:
        return self.LEFT + min(max(place, 0.0), 1.0) * (self.width - self.LEFT - self.RIGHT)

    def y(self, value: float) -> float:
        return self.HEIGHT - self.BOTTOM - value / self.top_value * (self.HEIGHT - self.TOP - self.BOTTOM)

    def label(self, x: float, y: float, text: str, anchor: str = "middle") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{safe(text)}</text>')

    def y_axis(self, top: float, unit: str) -> None:
        step = max(_step(top), 1.0)  # numbers of invocations are whole
        self.top_value = step * math.ceil(top / step)
        for number in range(round(self.top_value / step) + 1):
            y = self.y(number * step)
            self.parts.append(f'<path class="grid" d="M{self.LEFT:g} {y:.1f}H{self.width - self.RIGHT:g}"/>')
            self.label(self.LEFT - 6, y + 4, _short(number * step), "end")

        self.label(6, 14, unit, "start")

    def x_axis(self, ticks: Sequence[tuple[float, str]]) -> None:
        # A label for each 90 pixels at most.
        every = -(-len(ticks) // max(2, int(self.width / 90)))
        for place, text in ticks[::every]:
            anchor = "start" if place < 0.03 else "end" if place > 0.95 else "middle"
            self.label(self.x(place), self.HEIGHT - 8, text, anchor)

    def time_axis(self, end_us: float) -> None:
        step = _step(end_us / 1000)
        numbers = range(int(end_us / 1000 / step) + 1)
        self.x_axis([(number * step * 1000 / end_us, duration(number * step)) for number in numbers])

    def bar(self, begin: float, end: float, base: float, height: float, kind: str, tip: str) -> None:
        if height:
            x, y = self.x(begin), self.y(base + height)
            wide, high = max(self.x(end) - x - 1, 0.8), max(self.y(base) - y, 1.0)
            place = f'x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}"'
            self.parts.append(f'<rect class="bar {kind}" {place}><title>{safe(tip)}</title></rect>')

    def area(self, edges: Sequence[float], values: Sequence[float], kind: str) -> None:
        base = self.y(0)
        path = f"M{self.x(edges[0]):.1f} {base:.1f}" + self._path(edges, values) + f"V{base:.1f}Z"
        self.parts.append(f'<path class="area {kind}" d="{path}"/>')

    def steps(self, edges: Sequence[float], values: Sequence[float], kind: str) -> None:
        start = f"M{self.x(edges[0]):.1f} {self.y(values[0]):.1f}"
        self.parts.append(f'<path class="line {kind}" d="{start}{self._path(edges, values)}"/>')

    def bands(self, edges: Sequence[float], shares: Sequence[float], row: int, kind: str) -> None:
        """Tint the times with a share above 0, and mark them above the chart, in one of two rows."""
        spans: list[tuple[float, float]] = []
        index = 0
        for is_tinted, neighbours in groupby(shares, bool):
            begin, index = index, index + len(list(neighbours))
            if is_tinted:
                spans.append((self.x(edges[begin]), self.x(edges[index])))

        above, base = self.TOP - 4 - 6 * row, self.HEIGHT - self.BOTTOM
        for name, y, bottom in ("band", self.TOP, base), ("strip", above - 4, above):
            path = "".join(f"M{x:.1f} {y:g}H{end:.1f}V{bottom:g}H{x:.1f}Z" for x, end in spans)
            self.parts.append(f'<path class="{name} {kind}" d="{path}"/>')

    def mark(self, place: float, row: int, text: str) -> None:
        x, y = self.x(place), 14.0 + 14 * row
        self.parts.append(f'<path class="mark" d="M{x:.1f} {y + 3:.1f}V{self.HEIGHT - self.BOTTOM:g}"/>')
        # The label goes where there is more room.
        self.label(x + (4 if place < 0.6 else -4), y + 4, text, "start" if place < 0.6 else "end")

    def _path(self, edges: Sequence[float], values: Sequence[float]) -> str:
        return "".join(f"V{self.y(v):.1f}H{self.x(e):.1f}" for v, e in zip(values, edges[1:], strict=True))


def draw_charts(spoken: str, draw: Callable[[Chart], None]) -> str:
    """Draw a chart for wide screens and one for narrow ones. Both have letters of the same size."""
    drawn: list[str] = []
    for name, width in _WIDTHS.items():
        chart = Chart(width, spoken)
        draw(chart)
        drawn.append(f'<div class="chart {name}">{"".join(chart.parts)}</svg></div>')

    return "".join(drawn)


def _short(value: float) -> str:
    for factor, unit in (1e9, "G"), (1e6, "M"), (1e3, "k"):
        if value >= factor:
            return f"{value / factor:g}{unit}"

    return f"{value:g}"


def _step(top: float) -> float:
    """Return a round step. Four or five steps reach the top."""
    power: float = 10.0 ** math.floor(math.log10(top / 4))
    return power * next(digit for digit in (1.0, 2.0, 2.5, 5.0, 10.0) if power * digit * 5 >= top)


def decades(low: float, high: float) -> Iterator[float]:
    """Yield 1, 2 and 5 times the powers of ten in a range; only the powers in a range of 1000 or more."""
    digits = (1, 2, 5) if high / low < 1000 else (1,)
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for digit in digits:
            if low <= digit * 10.0**power <= high:
                yield digit * 10.0**power
