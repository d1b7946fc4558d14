"""Charts as SVG: drawn once for a page, whose style sheet colours them, and for files that stand alone.

A chart has no colours of its own, only classes. In a page they follow its light or dark scheme; `as_file` adds a style
sheet with the light one. What can be pointed at travels in the attribute `data-hover`, as a JSON list of
`[x, y, text, clip]` in units of the drawing, for the script of the page. All text is escaped here.
"""

import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

COLOURS = ("#0072b2", "#c84e00", "#00815e", "#a8528a", "#a87300", "#3b8fc4", "#4d4d4d")
"""Okabe and Ito's, told apart by colour-blind readers too; the pale ones a little darker, to be read on white."""
NUM_COLOURS = len(COLOURS)
DARK_COLOURS = ("#56b4e9", "#ff8f52", "#3fcfa3", "#e6a0c8", "#f0b93a", "#a8dcff", "#d0d0d0")

_LEFT, _RIGHT, _BOTTOM = 52.0, 12.0, 44.0
_LINE = 16.0
_TITLE = 22.0
_LETTER = 7.2
_DASHES = ("", "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Axis:
    """A linear axis: what it shows, from where to where, and its ticks as (value, text)."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]

    @classmethod
    def around(cls, label: str, values: Sequence[float], *, from_zero: bool = False, whole: bool = False) -> "Axis":
        """An axis that holds some finite values, with round ticks; `whole` leaves out ticks between integers."""
        low, high = min(values), max(values)
        if from_zero:
            low = min(low, 0.0)
        if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):
            pad = abs(high) / 10 or 1.0
            low, high = (low if from_zero and low == 0 else low - pad), high + pad
        step = _round_step((high - low) / 4)
        if whole:
            step = max(step, 1.0)
        else:
            low, high = step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)
        first = math.ceil(low / step - 1e-9)
        ticks = [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]
        return cls(label, low, high, [(tick, tick_text(tick, step)) for tick in ticks])


def _round_step(least: float) -> float:
    unit: float = 10.0 ** math.floor(math.log10(least))
    return next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= least * (1 - 1e-9))


def tick_text(value: float, step: float) -> str:
    """A tick, with as many digits as tell it from the next one.

    >>> [tick_text(0.3, 0.1), tick_text(20000.0, 5000.0), tick_text(-0.0, 1.0), tick_text(0.0005, 0.0005)]
    ['0.3', '20 000', '0', '5e-04']
    >>> tick_text(0.0, 0.0005)
    '0'
    """
    if step < 1e-3:
        return f"{value:.0e}" if value else "0"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value + 0.0:,.{digits}f}".replace(",", " ")


def shortened(name: str, most: int = 32) -> str:
    """A name that has room in a drawing: the middle of a long one is left out.

    >>> shortened("anna"), shortened("abcdefghij", 7)
    ('anna', 'abc\N{HORIZONTAL ELLIPSIS}hij')
    """
    if len(name) <= most:
        return name
    kept = most - 1
    return f"{name[: kept - kept // 2]}\N{HORIZONTAL ELLIPSIS}{name[-(kept // 2) :]}"


@dataclass
class Chart:
    """A drawing with axes, to which marks are added in the order they lie over each other.

    Attributes:
        title: stands above it.
        x, y: its axes; None draws none.
        width, height: in units of the drawing, about pixels.
        legend: (class, text, dash pattern) of what is drawn.
        hover: what can be pointed at: (x, y, text, number of a clip or None), in units of the drawing.
        nearest: whether the pointer takes the nearest point, or the nearest in x.
    """

    title: str
    x: Axis
    y: Axis
    width: float = 360.0
    height: float = 260.0
    legend: Sequence[tuple[str, str, str]] = ()
    has_axes: bool = True
    nearest: str = "x"
    hover: list[tuple[float, float, str, int | None]] = field(default_factory=list)
    _marks: list[str] = field(default_factory=list)

    @property
    def _legend_rows(self) -> list[list[tuple[float, tuple[str, str, str]]]]:
        rows: list[list[tuple[float, tuple[str, str, str]]]] = []
        at = self.width
        for entry in self.legend:
            length = 36 + _LETTER * len(entry[1])
            if at + length > self.width or not rows:
                rows.append([])
                at = self._left if self.has_axes else 8.0
            rows[-1].append((at, entry))
            at += length
        return rows

    @property
    def _left(self) -> float:
        return max(_LEFT, 26 + 6.8 * max((len(text) for _, text in self.y.ticks), default=0)) if self.has_axes else 8.0

    @property
    def _top(self) -> float:
        return 14 + (_TITLE if self.title else 0) + _LINE * len(self._legend_rows)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the axes lies in the drawing."""
        left, right = self._left, self.width - (_RIGHT if self.has_axes else 8.0)
        top, bottom = self._top, self.height - (_BOTTOM if self.has_axes else 8.0)
        across = (x - self.x.low) / (self.x.high - self.x.low)
        up = (y - self.y.low) / (self.y.high - self.y.low)
        return round(left + across * (right - left), 1), round(bottom - up * (bottom - top), 1)

    def line(self, points: Iterable[tuple[float, float]], look: str, *, dash: str = "") -> None:
        """Connect points."""
        places = " ".join(f"{x:g},{y:g}" for x, y in (self.at(*point) for point in points))
        pattern = f' stroke-dasharray="{dash}"' if dash else ""
        self._marks.append(f'<polyline class="line {look}" points="{places}"{pattern}/>')

    def area(self, points: Iterable[tuple[float, float]], look: str) -> None:
        """Fill what points enclose."""
        places = " ".join(f"{x:g},{y:g}" for x, y in (self.at(*point) for point in points))
        self._marks.append(f'<polygon class="area {look}" points="{places}"/>')

    def dot(self, x: float, y: float, look: str, radius: float = 3.0) -> None:
        """Mark a point."""
        across, down = self.at(x, y)
        self._marks.append(f'<circle class="dot {look}" cx="{across:g}" cy="{down:g}" r="{radius:g}"/>')

    def symbol(self, x: float, y: float, hue: float, shape: int) -> None:
        """Mark a point by one of many hues and four shapes."""
        a, b = self.at(x, y)
        outline = (
            f"M{a - 4:g} {b:g}a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
            f"M{a - 3.5:g} {b - 3.5:g}h7v7h-7z",
            f"M{a:g} {b - 4.5:g}l4.5 8h-9z",
            f"M{a:g} {b - 5:g}l5 5l-5 5l-5-5z",
        )[shape % 4]
        self._marks.append(f'<path class="symbol" fill="hsl({hue:.0f}, 62%, 48%)" d="{outline}"/>')

    def text(self, x: float, y: float, words: str, *, anchor: str = "middle", look: str = "note") -> None:
        """Write at a point."""
        across, down = self.at(x, y)
        self._marks.append(
            f'<text class="{look}" x="{across:g}" y="{down:g}" text-anchor="{anchor}">{html.escape(words)}</text>'
        )

    def bar(self, y: float, length: float, look: str, thickness: float) -> None:
        """A bar from the left edge, `thickness` units high."""
        (left, middle), (right, _) = self.at(self.x.low, y), self.at(length, y)
        self._marks.append(
            f'<rect class="bar {look}" x="{left:g}" y="{middle - thickness / 2:g}" width="{max(right - left, 0):g}" '
            f'height="{thickness:g}" rx="2"/>'
        )

    def point(self, x: float, y: float, text: str, clip: int | None = None) -> None:
        """Let a point be pointed at."""
        self.hover.append((*self.at(x, y), text, clip))

    def _frame(self) -> list[str]:
        parts = []
        left, bottom = self.at(self.x.low, self.y.low)
        right, top = self.at(self.x.high, self.y.high)
        for value, text in self.y.ticks:
            _, down = self.at(self.x.low, value)
            parts.append(f'<path class="grid" d="M{left:g} {down:g}H{right:g}"/>')
            parts.append(
                f'<text class="tick" x="{left - 6:g}" y="{down + 4:g}" text-anchor="end">{html.escape(text)}</text>'
            )
        for value, text in self.x.ticks:
            across, _ = self.at(value, self.y.low)
            parts.append(f'<path class="grid" d="M{across:g} {top:g}V{bottom:g}"/>')
            parts.append(
                f'<text class="tick" x="{across:g}" y="{bottom + 16:g}" text-anchor="middle">{html.escape(text)}</text>'
            )
        parts.append(f'<path class="axis" d="M{left:g} {bottom:g}H{right:g}"/>')
        middle = (left + right) / 2
        parts.append(
            f'<text class="name" x="{middle:g}" y="{self.height - 8:g}" text-anchor="middle">'
            f"{html.escape(self.x.label)}</text>"
        )
        centre = (top + bottom) / 2
        if self.y.label:
            parts.append(
                f'<text class="name" x="13" y="{centre:g}" text-anchor="middle" '
                f'transform="rotate(-90 13 {centre:g})">{html.escape(self.y.label)}</text>'
            )
        return parts

    def svg(self, figure: str = "", *, place: tuple[float, float] | None = None) -> str:
        """The drawing; `place` puts it into another one. Who does not see it is told its title, or that of `figure`."""
        parts = []
        if self.title:
            parts.append(f'<text class="title" x="8" y="17">{html.escape(self.title)}</text>')
        for number, row in enumerate(self._legend_rows):
            down = 14 + (_TITLE if self.title else 0) + _LINE * number
            for at, (look, text, dash) in row:
                pattern = f' stroke-dasharray="{dash}"' if dash else ""
                parts.append(f'<path class="line {look}" d="M{at:g} {down - 4:g}h16"{pattern}/>')
                parts.append(f'<text class="tick" x="{at + 20:g}" y="{down:g}">{html.escape(text)}</text>')
        parts += [*(self._frame() if self.has_axes else []), *self._marks]
        where = f'x="{place[0]:g}" y="{place[1]:g}" width="{self.width:g}" height="{self.height:g}" ' if place else ""
        hover = ""
        if self.hover and not place:
            content = html.escape(json.dumps(self.hover, ensure_ascii=False, separators=(",", ":")), quote=True)
            hover = f'data-nearest="{self.nearest}" data-hover="{content}" '
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" {where}'
            f'viewBox="0 0 {self.width:g} {self.height:g}" role="img"'
            f' aria-label="{html.escape(self.title or figure, quote=True)}" '
            f"{hover}>{''.join(parts)}</svg>"
        )


def series_look(number: int) -> tuple[str, str]:
    """Class and dash pattern of the n-th curve of a chart: a pattern of its own when the colours begin again."""
    return f"c{number % NUM_COLOURS}", _DASHES[number // NUM_COLOURS % len(_DASHES)]


def styles(colours: Sequence[str], *, ink: str, soft: str, grid: str, paper: str) -> str:
    """The style sheet of the classes that charts use."""
    rules = [
        ".chart text { font: 12px system-ui, Verdana, sans-serif; }",
        f".chart .title {{ font-size: 13px; font-weight: 600; fill: {ink}; }}",
        f".chart .tick, .chart .name {{ fill: {soft}; }} .chart .note {{ fill: {ink}; }}",
        f".chart .small {{ font-size: 10px; fill: {ink}; stroke: {paper}; stroke-width: 3px; paint-order: stroke; }}",
        f".chart .grid {{ stroke: {grid}; fill: none; }} .chart .axis {{ stroke: {soft}; fill: none; }}",
        ".chart .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }",
        ".chart .area { fill-opacity: .22; stroke: none; } .chart .bar { fill-opacity: .85; }",
        f".chart .symbol {{ stroke: {paper}; stroke-width: .7; }}",
        f".chart .line.guide {{ stroke: {soft}; stroke-width: 1.2; stroke-dasharray: 5 4; }}",
    ]
    for number, colour in enumerate(colours):
        rules.append(f".chart .line.c{number} {{ stroke: {colour}; }}")
        rules.append(
            ", ".join(f".chart .{kind}.c{number}" for kind in ("area", "dot", "bar")) + f" {{ fill: {colour}; }}"
        )
    return "\n".join(rules)


PAGE_STYLES = styles(
    [f"var(--c{number})" for number in range(NUM_COLOURS)],
    ink="var(--ink)",
    soft="var(--soft)",
    grid="var(--grid)",
    paper="var(--card)",
)
_FILE_STYLES = styles(COLOURS, ink="#1b1f24", soft="#59636e", grid="#e4e7eb", paper="#ffffff")


def as_file(charts: Sequence[Chart], columns: int = 3) -> bytes:
    """Charts of one size side by side, as an SVG file on white."""
    columns = min(columns, len(charts))
    rows = -(-len(charts) // columns)
    width, height = charts[0].width, charts[0].height
    placed = "".join(
        chart.svg(place=(number % columns * width, number // columns * height)) for number, chart in enumerate(charts)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{columns * width:g}" height="{rows * height:g}" '
        f'viewBox="0 0 {columns * width:g} {rows * height:g}"><style>{_FILE_STYLES}</style>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{placed}</svg>\n'
    ).encode()
