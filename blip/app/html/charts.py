"""Charts as inline SVG, drawn for the width of a phone; their colours are classes of the stylesheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from markupsafe import Markup

WIDTH = 360
"""Width of a chart in its own units, about one pixel each on a phone."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 10, 10, 34


class Estimate(NamedTuple):
    """A value with the ends of its interval (the value itself where there is none)."""

    value: float
    low: float
    high: float


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values from low to high, about `most` of them, in steps of 1, 2 or 5 times a power of ten."""
    step = _step(low, high, most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{step * i:.10g}") for i in range(first, last + 1)]


def histogram(name: str, counts: Sequence[int], colour: str, at: float | None = None, *,
              moves: bool = True, across: str = "probability of a match") -> Markup:  # fmt: skip
    """Draw counts of values from 0 to 1 on a square-root scale, so that small bins are visible next to large ones.

    The last bin is for values of exactly 1. A line marks the threshold `at`, and what is below it is pale. If it
    `moves`, a script may move both (classes `veil` and `threshold`, with attributes data-start and data-span).
    """
    height = 190
    steps, bottom, width = len(counts) - 1, height - _BOTTOM, WIDTH - _LEFT - _RIGHT
    top = max(counts, default=0) or 1
    unit = width / len(counts)

    def down(count: float) -> float:
        return bottom - math.sqrt(count / top) * (bottom - _TOP)

    bars = "".join(f"M{_LEFT + unit * i:.2f},{bottom}V{down(n):.1f}h{unit:.2f}V{bottom}z"
                   for i, n in enumerate(counts) if n)  # fmt: skip
    marks = [_gridline(down(n), f"{n:,}") for n in _square_root_ticks(top, bottom - _TOP)]
    marks.append(f'<path class="bars {colour}" d="{bars}"/>')
    span = unit * steps
    if at is not None:
        x = _LEFT + span * at
        places = f' data-start="{_LEFT}" data-span="{span:.2f}"' if moves else ""
        marks.append(
            f'<rect class="veil"{places} x="{_LEFT}" y="{_TOP}" '
            f'width="{max(0.0, x - _LEFT):.2f}" height="{bottom - _TOP}"/>'
            f'<line class="threshold"{places} x1="{x:.2f}" x2="{x:.2f}" '
            f'y1="{_TOP - 6}" y2="{bottom}"/>'
        )
    marks += _across_axis(bottom, [(value, _LEFT + span * value) for value in ticks(0, 1)], across)
    return _figure(name, marks, height, "texts by score; the height is the square root of their number")


def curves(name: str, lines: Mapping[str, Sequence[tuple[float, float]]], across: str = "step",
           height: int = 210) -> Markup:  # fmt: skip
    """Plot named lines of (x, y) points in one frame with axes; values that are not finite are left out.

    A line needs two points.
    """
    finite = {label: [(x, y) for x, y in points if math.isfinite(y)] for label, points in lines.items()}
    lines = {label: points for label, points in finite.items() if len(points) > 1}
    if not lines:
        return Markup()
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    low, high = _round_range(min(ys), max(ys))
    first, last, bottom = min(xs), max(xs), height - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        right = _LEFT + (x - first) / ((last - first) or 1) * (WIDTH - _LEFT - _RIGHT)
        return right, bottom - (y - low) / (high - low) * (bottom - _TOP)

    marks = [_gridline(place(first, value)[1], f"{value:g}") for value in ticks(low, high)]
    for i, points in enumerate(lines.values()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        marks.append(f'<polyline class="curve c{i % 6}" points="{path}"/>')
    marks += _across_axis(bottom, [(value, place(value, low)[0]) for value in ticks(first, last)], across)
    keys = [(label, i) for i, label in enumerate(lines)] if len(lines) > 1 else []
    for row, (label, i) in enumerate(keys):
        marks.append(
            f'<text class="strong inked c{i % 6}" x="{WIDTH - _RIGHT}" y="{_TOP + 12 + 15 * row}" '
            f'text-anchor="end">{escape(label)}</text>'
        )
    ends = "; ".join(f"{label}: from {points[0][1]:.3g} to {points[-1][1]:.3g}" for label, points in lines.items())
    return _figure(name, marks, height, ends)


def intervals(name: str, spans: Sequence[tuple[str, Estimate]], *, is_compared: bool = True) -> Markup:
    """Plot values with their intervals, one below another; if compared, a dashed line marks the first value."""
    if not spans:
        return Markup()
    low, high = _round_range(min(one.low for _, one in spans), max(one.high for _, one in spans))
    row, left, right = 36, 8, 8
    bottom = _TOP + row * len(spans)

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - right)

    first = place(spans[0][1].value)
    marks = [f'<path class="axis dashed" d="M{first:.1f},{_TOP}V{bottom}"/>'] if is_compared else []
    for i, (label, one) in enumerate(spans):
        base, y = _TOP + row * i, _TOP + row * i + 25
        colour = "c0" if i or not is_compared else "c5"
        marks.append(
            f'<text class="strong" x="{left}" y="{base + 13}">{escape(label)}</text>'
            f'<text class="strong" x="{WIDTH - right}" y="{base + 13}" text-anchor="end">{one.value:.1f}</text>'
            f'<g class="{colour}"><path class="whisker" d="M{place(one.low):.1f},{y}H{place(one.high):.1f}"/>'
            f'<circle class="dot" cx="{place(one.value):.1f}" cy="{y}" r="4.5"/></g>'
        )
    marks += _across_axis(bottom + 2, [(value, place(value)) for value in ticks(low, high, 6)], "", left)
    values = "; ".join(f"{label}: {_in_words(one, 1)}" for label, one in spans)
    return _figure(name, marks, bottom + 24, values)


def slope(name: str, before: Estimate, after: Estimate, labels: tuple[str, str], low: float = 0.0,
          high: float | None = None, digits: int = 0, unit: str = "%") -> Markup:  # fmt: skip
    """Draw a value before and after a change, with intervals, on an axis from `low` to `high`."""
    width, height, bottom = 290, 236, 196
    high = _round_range(low, max(before.high, after.high))[1] if high is None else high
    left, right = 106, width - 86

    def down(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - 14)

    marks = []
    for value in ticks(low, high):
        marks.append(f'<path class="rule" d="M34,{down(value):.1f}H{width}"/>'
                     f'<text x="28" y="{down(value) + 4:.1f}" text-anchor="end">{value:g}</text>')  # fmt: skip
    marks.append(
        f'<path class="curve c0" d="M{left},{down(before.value):.1f}L{right},{down(after.value):.1f}"/>'
        f'<g class="c5">{_whisker(left, before, down)}</g><g class="c0">{_whisker(right, after, down)}</g>'
    )
    for x, one, anchor in ((left - 10, before, "end"), (right + 10, after, "start")):
        marks.append(
            f'<text class="strong large" x="{x}" y="{down(one.value) + 5:.1f}" text-anchor="{anchor}">'
            f"{one.value:.{digits}f}{escape(unit)}</text>"
        )
    for x, label in ((left, labels[0]), (right, labels[1])):
        marks.append(f'<text x="{x}" y="{bottom + 22}" text-anchor="middle">{escape(label)}</text>')
    values = f"{labels[0]}: {_in_words(before, digits, unit)}; {labels[1]}: {_in_words(after, digits, unit)}"
    return _figure(name, marks, height, values, width)


# Parts ----------------------------------------------------------------------------------------------------------------


def _whisker(x: float, one: Estimate, down: Callable[[float], float]) -> str:
    low, high = down(one.low), down(one.high)
    ends = f"M{x},{low:.1f}V{high:.1f}M{x - 5},{low:.1f}h10M{x - 5},{high:.1f}h10" if one.low < one.high else ""
    return f'<path class="whisker" d="{ends}"/><circle class="dot" cx="{x}" cy="{down(one.value):.1f}" r="5"/>'


def _in_words(one: Estimate, digits: int, unit: str = "") -> str:
    value = f"{one.value:.{digits}f}{unit}"
    return value if one.low == one.high else f"{value} ({one.low:.{digits}f}{unit} to {one.high:.{digits}f}{unit})"


def _step(low: float, high: float, most: int = 5) -> float:
    """Distance of ticks between two values."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span))
    return next(power * factor for factor in (0.1, 0.2, 0.5, 1, 2, 5) if span / (power * factor) <= most)


def _round_range(low: float, high: float) -> tuple[float, float]:
    """Widen a range to ticks that enclose it; never empty."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-3):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    step = _step(low, high)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _square_root_ticks(top: int, height: float) -> list[int]:
    """Round counts at least 20 units apart on a square-root scale, the largest first, and 0."""
    rounds = [factor * 10**power for power in range(len(str(top))) for factor in (1, 2, 5)]
    chosen, last = [], -1.0
    for count in sorted((n for n in rounds if n <= top), reverse=True):
        y = math.sqrt(count / top) * height
        if y >= 20 and (last < 0 or last - y >= 20):
            chosen.append(count)
            last = y
    return [*chosen, 0]


def _gridline(y: float, label: str) -> str:
    return (
        f'<path class="rule" d="M{_LEFT},{y:.1f}H{WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )


def _across_axis(y: float, places: Sequence[tuple[float, float]], title: str, left: int = _LEFT) -> list[str]:
    labels = "".join(
        f'<path class="axis" d="M{x:.1f},{y}v4"/><text x="{x:.1f}" y="{y + 16}" text-anchor="middle">{value:g}</text>'
        for value, x in places
    )
    named = f'<text x="{(left + WIDTH - _RIGHT) / 2:.1f}" y="{y + 31}" text-anchor="middle">{escape(title)}</text>'
    return [f'<path class="axis" d="M{left},{y}H{WIDTH - _RIGHT}"/>{labels}{named if title else ""}']


def _figure(name: str, marks: Sequence[str], height: float, description: str, width: int = WIDTH) -> Markup:
    """A captioned SVG; the description is what a screen reader says of it."""
    label = escape(f"{name}: {description}")
    return Markup(  # all texts in it are escaped above
        f'<figure><figcaption>{escape(name)}</figcaption><svg viewBox="0 0 {width} {height:g}" role="img" '
        f'aria-label="{label}">{"".join(marks)}</svg></figure>'
    )
