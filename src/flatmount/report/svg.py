"""Small drawing functions for the charts of a page: axes, lines, dots and bars as inline SVG.

Colours and fonts come from the page's style sheet: what belongs to a series has the class that the caller
gives it, and the sheet sets `--c` and `--dash` for that. So one drawing serves for light, dark and paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 860
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 18, 12, 46
_BAR_LEFT, _BAR_RIGHT, _BAR_PITCH, _BAR_HEIGHT = 132, 150, 40, 22

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high`, drawn evenly or by powers of ten; `label` says what and in which unit."""

    label: str
    low: float
    high: float
    log: bool = False

    @classmethod
    def linear(cls, label: str, values: Iterable[float]) -> Axis:
        """From 0 to the first round number that no value exceeds."""
        top = max(values, default=0.0) or 1.0
        step = _round_step(top / 4)
        return cls(label, 0.0, step * math.ceil(top / step - 1e-9))

    @classmethod
    def logarithmic(cls, label: str, values: Iterable[float]) -> Axis:
        """Between two of 1, 2, 5, 10, 20, …, a decade apart at least, that hold all values above 0."""
        known = [value for value in values if value > 0] or [1.0]
        low = max(bound for bound in _round_numbers(min(known)) if bound <= min(known) * (1 + 1e-9))
        high = min(bound for bound in _round_numbers(max(known)) if bound >= max(known) * (1 - 1e-9))
        return cls(label, low, max(high, low * 10), log=True)

    def share(self, value: float) -> float:
        """Where `value` lies, from 0 at `low` to 1 at `high`; what lies outside is drawn at the edge."""
        if self.log:
            part = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return min(max(part, 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Round numbers on the axis, ascending."""
        if not self.log:
            step = _round_step((self.high - self.low) / 5)
            return [self.low + step * i for i in range(int((self.high - self.low) / step + 1e-9) + 1)]
        every = 3 if self.high / self.low <= 1000 else 1
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        round_numbers = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)[:every]]
        return [tick for tick in round_numbers if self.low * (1 - 1e-9) <= tick <= self.high * (1 + 1e-9)]


@dataclass(frozen=True, slots=True)
class Series:
    """One line: points with ascending x, its class in the style sheet, and what a pointer over it shows."""

    style: str
    title: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its class, name and value, the text at its end, and the range that is drawn across it."""

    style: str
    name: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None


def line_chart(
    label: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    stepped: bool = False,
    dots: bool = False,
    height: int = 300,
) -> str:
    """Lines over two axes as an `svg` element. `stepped` holds a value until the next, `dots` mark points.

    A series of a single point is a dot. The last series lies on top. `label` is read out in place of the
    picture.
    """
    drawn = [_grid(x, y, height)]
    for one in series:
        at = [(_across(x, px), _down(y, py, height)) for px, py in one.points]
        marks = []
        if len(at) > 1:
            marks.append(f'<path class="line" d="{_path(at, stepped)}"/>')
        if dots or len(at) == 1:
            marks += [f'<circle class="dot" cx="{cx:.1f}" cy="{cy:.1f}" r="2.8"/>' for cx, cy in at]
        drawn.append(f'<g class="{escape(one.style)}"><title>{escape(one.title)}</title>{"".join(marks)}</g>')
    return _svg(label, height, drawn)


def bar_chart(label: str, bars: Sequence[Bar], axis: Axis) -> str:
    """Bars to the right, one below the other, as an `svg` element; all start at the low end of the axis."""
    height = _BAR_PITCH * len(bars) + _BOTTOM
    bottom = height - _BOTTOM
    width = WIDTH - _BAR_LEFT - _BAR_RIGHT

    def across(value: float) -> float:
        return _BAR_LEFT + axis.share(value) * width

    drawn = []
    for tick in axis.ticks():
        at = across(tick)
        drawn.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{bottom}"/>')
        drawn.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{_tick(tick)}</text>')
    drawn.append(_x_label(axis.label, _BAR_LEFT + width / 2, height))
    for index, bar in enumerate(bars):
        top = index * _BAR_PITCH + (_BAR_PITCH - _BAR_HEIGHT) / 2
        middle = top + _BAR_HEIGHT / 2
        end = across(bar.value)
        after = max(end, across(bar.high or 0)) + 8
        marks = ""
        if bar.low is not None and bar.high is not None:
            low, high = across(bar.low), across(bar.high)
            marks = f'<path class="range" d="M{low:.1f} {middle - 4}v8m0 -4H{high:.1f}m0 -4v8"/>'
        drawn.append(
            f'<g class="{escape(bar.style)}">'
            f'<text class="name" x="{_BAR_LEFT - 12}" y="{middle + 4.5}" text-anchor="end">'
            f"{escape(bar.name)}</text>"
            f'<rect class="bar" x="{_BAR_LEFT}" y="{top}" width="{max(end - _BAR_LEFT, 2):.1f}" '
            f'height="{_BAR_HEIGHT}" rx="2"/>{marks}'
            f'<text class="value" x="{after:.1f}" y="{middle + 4.5}">{escape(bar.text)}</text></g>'
        )
    return _svg(label, height, drawn)


def thinned(points: Sequence[Point], limit: int) -> tuple[Point, ...]:
    """At most about `limit` of the points, with the lowest and the highest of every stretch among them."""
    if len(points) <= limit:
        return tuple(points)
    stretch = math.ceil(2 * len(points) / limit)
    kept: list[Point] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        extremes = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept.extend(sorted(extremes))
    return tuple(kept)


def _grid(x: Axis, y: Axis, height: int) -> str:
    bottom = height - _BOTTOM
    parts = []
    for tick in y.ticks():
        at = _down(y, tick, height)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_tick(tick)}</text>')
    for tick in x.ticks():
        at = _across(x, tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{_tick(tick)}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="axis" transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.label)}</text>"
    )
    parts.append(_x_label(x.label, (_LEFT + WIDTH - _RIGHT) / 2, height))
    return "".join(parts)


def _x_label(text: str, at: float, height: int) -> str:
    return f'<text class="axis" x="{at:.0f}" y="{height - 8}" text-anchor="middle">{escape(text)}</text>'


def _svg(label: str, height: int, drawn: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(drawn)}</svg>'


def _across(axis: Axis, value: float) -> float:
    return _LEFT + axis.share(value) * (WIDTH - _LEFT - _RIGHT)


def _down(axis: Axis, value: float, height: int) -> float:
    bottom = height - _BOTTOM
    return bottom - axis.share(value) * (bottom - _TOP)


def _path(at: Sequence[Point], stepped: bool) -> str:
    (x, y), *rest = at
    parts = [f"M{x:.1f} {y:.1f}"]
    for x, y in rest:
        parts.append(f"H{x:.1f}V{y:.1f}" if stepped else f"L{x:.1f} {y:.1f}")
    return "".join(parts)


def _tick(value: float) -> str:
    return f"{value:,.10g}"


def _round_step(rough: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is not below `rough`."""
    return min(number for number in _round_numbers(rough) if number >= rough * (1 - 1e-9))


def _round_numbers(near: float) -> list[float]:
    decade = math.floor(math.log10(near))
    return [factor * 10.0**power for power in range(decade - 1, decade + 2) for factor in (1, 2, 5)]
