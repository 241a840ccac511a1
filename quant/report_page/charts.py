"""Charts as SVG text, for a page that needs nothing else to be read.

Every chart is 340 x 200 units, so that its text is of the page's size where it is shown about as
wide; colours come from the classes of style.css. A mark says its value when pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 340, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 8, 10, 36
Show = Callable[[float], str]


@dataclass(frozen=True)
class Axis:
    """The values from `low` to `high`, evenly or by their logarithm; `show` writes one."""

    low: float
    high: float
    log: bool = False
    show: Show = "{:.3g}".format

    @classmethod
    def linear(cls, values: Sequence[float], show: Show = "{:.3g}".format) -> Axis:
        """From 0 to just above the largest value."""
        top = max([*values, 0.0])
        step = _step(top / 4) if top > 0 else 1.0
        return cls(0.0, max(1, math.ceil(top / step - 1e-9)) * step, False, show)

    @classmethod
    def logarithmic(cls, values: Sequence[float], show: Show = "{:.3g}".format) -> Axis:
        """From below the smallest positive value to above the largest."""
        positive = [value for value in values if value > 0] or [1.0]
        low, high = _step(min(positive), down=True), _step(max(positive))
        return cls(low, high if high > low else 10 * low, True, show)

    def place(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high end, and never outside."""
        if self.log:
            value = max(value, self.low)
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))

    def ticks(self) -> list[float]:
        """Round values to mark."""
        if not self.log:
            step = _step(self.high / 4)
            return [i * step for i in range(int(self.high / step + 1e-9) + 1)]
        decades = math.log10(self.high / self.low)
        digits = (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 2.5 else (1,)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        marks = [digit * 10.0**power for power in powers for digit in digits]
        return [mark for mark in marks if self.low * 0.999 <= mark <= self.high * 1.001]


@dataclass(frozen=True)
class Series:
    """Values of one name; `kind` is its class: "ours", "plain" or "limit"."""

    name: str
    values: Sequence[float]
    kind: str = "ours"


def line_chart(label: str, names: Sequence[str], series: Sequence[Series], y: Axis, x: str) -> str:
    """Lines over the points called `names`; `x` says what these are."""
    xs = [_across((i + 0.5) / len(names)) for i in range(len(names))]
    marks = _grid(y) + _names(xs, _thinned(names), x)
    for one in series:
        points = [(at, _up(y.place(v))) for at, v in zip(xs, one.values, strict=True)]
        path = " ".join(f"{at:.1f},{up:.1f}" for at, up in points)
        marks += f'<polyline class="{one.kind}" points="{path}"/>'
        if one.kind == "limit":
            continue
        for (at, up), name, value in zip(points, names, one.values, strict=True):
            hint = f"{x} {name}, {one.name}: {y.show(value)}"
            marks += f'<circle class="{one.kind}" cx="{at:.1f}" cy="{up:.1f}" r="2.2">'
            marks += f"<title>{escape(hint)}</title></circle>"
    return _svg(label, marks)


def bar_chart(
    label: str,
    names: Sequence[str],
    values: Sequence[float],
    y: Axis,
    x: str,
    shown: Sequence[str] = (),
) -> str:
    """A bar for each name; `shown` are the names to write, "" for none, if not as many as fit."""
    slot = (WIDTH - _LEFT - _RIGHT) / len(names)
    width = max(1.0, slot - min(3.0, 0.3 * slot))
    marks = _grid(y)
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        up = _up(y.place(value))
        at = _LEFT + i * slot + (slot - width) / 2
        marks += f'<rect class="ours" x="{at:.1f}" y="{up:.1f}" width="{width:.1f}" '
        marks += f'height="{_up(0) - up:.1f}">'
        marks += f"<title>{escape(f'{x} {name}: {y.show(value)}')}</title></rect>"
    xs = [_LEFT + (i + 0.5) * slot for i in range(len(names))]
    return _svg(label, marks + _names(xs, shown or _thinned(names), x))


def pair_chart(label: str, names: Sequence[str], ours: Series, plain: Series, x: Axis) -> str:
    """Two dots on a row for each name, joined, so that the gain is what is seen."""
    height = _TOP + 24 * len(names) + _BOTTOM
    bottom, left = height - _BOTTOM, 76
    reach = WIDTH - left - _RIGHT - 8
    marks = ""
    for tick in x.ticks():
        at = left + reach * x.place(tick)
        marks += f'<path class="grid" d="M{at:.1f} {_TOP}V{bottom}"/>'
        marks += (
            f'<text x="{at:.1f}" y="{bottom + 14}" class="middle">{escape(x.show(tick))}</text>'
        )
    for row, name in enumerate(names):
        up = _TOP + 24 * row + 12
        first, second = (left + reach * x.place(s.values[row]) for s in (ours, plain))
        marks += f'<text x="{left - 6}" y="{up + 4}" class="end">{escape(name)}</text>'
        marks += f'<path class="join" d="M{first:.1f} {up}H{second:.1f}"/>'
        for one, at in ((plain, second), (ours, first)):
            hint = f"{name}, {one.name}: {x.show(one.values[row])}"
            marks += f'<circle class="{one.kind} dot" cx="{at:.1f}" cy="{up}" r="5">'
            marks += f"<title>{escape(hint)}</title></circle>"
    middle = left + reach / 2
    marks += f'<text x="{middle}" y="{height - 4}" class="middle">relative error</text>'
    return _svg(label, marks, height)


def legend(series: Sequence[tuple[str, str]]) -> str:
    """What lines and dots mean: (class, name) pairs."""
    items = ""
    for kind, name in series:
        dot = "" if kind == "limit" else f'<circle class="{kind} dot" cx="13" cy="6" r="4"/>'
        line = f'<path class="{kind}" d="M0 6H26"/>'
        items += f'<li><svg viewBox="0 0 26 12" width="26" height="12" aria-hidden="true">{line}'
        items += f"{dot}</svg> {escape(name)}</li>"
    return f'<ul class="legend">{items}</ul>'


def _svg(label: str, marks: str, height: int = HEIGHT) -> str:
    start = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return f"{start}{marks}</svg>"


def _grid(y: Axis) -> str:
    """Horizontal lines with their values."""
    marks = ""
    for tick in y.ticks():
        up = _up(y.place(tick))
        marks += f'<path class="grid" d="M{_LEFT} {up:.1f}H{WIDTH - _RIGHT}"/>'
        marks += f'<text x="{_LEFT - 5}" y="{up + 4:.1f}" class="end">{escape(y.show(tick))}</text>'
    return marks


def _names(xs: Sequence[float], names: Sequence[str], x: str) -> str:
    """Names below the axis, and what they are; "" is left out."""
    marks = ""
    for at, name in zip(xs, names, strict=True):
        if name:
            marks += f'<text x="{at:.1f}" y="{HEIGHT - _BOTTOM + 14}" class="middle">'
            marks += f"{escape(name)}</text>"
    middle = _across(0.5)
    return marks + f'<text x="{middle}" y="{HEIGHT - 5}" class="middle">{escape(x)}</text>'


def _thinned(names: Sequence[str]) -> list[str]:
    """As many names as there is room for, "" in place of the others."""
    room = max(len(name) for name in names) * 7 + 6
    least = max(1, math.ceil(len(names) * room / (WIDTH - _LEFT - _RIGHT)))
    every = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 40, 50, least) if step >= least)
    return [name if i % every == 0 else "" for i, name in enumerate(names)]


def _across(share: float) -> float:
    return _LEFT + share * (WIDTH - _LEFT - _RIGHT)


def _up(share: float) -> float:
    return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _step(value: float, down: bool = False) -> float:
    """The next of 1, 2, 5, 10, 20, ... that is not below the value; or not above it."""
    power = 10.0 ** math.floor(math.log10(value))
    steps = [digit * power for digit in (1, 2, 5, 10)]
    if down:
        return max(step for step in steps if step <= value * (1 + 1e-9))
    return min(step for step in steps if step >= value * (1 - 1e-9))
