"""Charts of a report: what they show, and how that is laid out on a `Canvas`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rayrlhf.evaluation.canvas import DASHES, SERIES_COLOURS, Canvas, PngCanvas, SvgCanvas
from rayrlhf.monitoring.text import fixed

__all__ = [
    "BarChart",
    "Chart",
    "Histogram",
    "LineChart",
    "Outcome",
    "Series",
    "WinRateChart",
    "legend",
    "png",
    "svg",
    "ticks",
]

WIDTH = 380.0
_HEIGHT = 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 12.0, 10.0, 24.0
_OUTCOME = 62.0  # of one comparison
_MOST_POINTS = 160  # of a curve; more are put together, and their range is shown


@dataclass(frozen=True)
class Series:
    """A curve: finite values only, x ascending. It may be empty where another one of its chart isn't."""

    label: str
    x: list[float]
    y: list[float]
    error: list[float] | None = None
    """One standard error of each y, shown as a band."""


@dataclass(frozen=True)
class LineChart:
    """Values over steps."""

    title: str
    series: list[Series]
    name: str
    """Of the PNG file."""
    unit: str = ""
    marks: list[tuple[float, str]] = field(default_factory=list)
    """Horizontal lines with their names, such as a target."""

    @property
    def labels(self) -> list[str]:
        """Of the legend."""
        return [series.label for series in self.series]


@dataclass(frozen=True)
class Histogram:
    """Distributions of values, over each other."""

    title: str
    groups: list[tuple[str, list[float]]]
    name: str
    unit: str = ""
    domain: tuple[float, float] | None = None
    """Least and largest value of the axis, where several charts share it."""

    @property
    def labels(self) -> list[str]:
        return [label for label, _ in self.groups]


@dataclass(frozen=True)
class BarChart:
    """One length a row."""

    title: str
    rows: list[tuple[str, float]]
    name: str
    unit: str = ""
    labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """One comparison of A with B, in counts of prompts; rate, low and high in [0, 1]."""

    label: str
    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class WinRateChart:
    """A bar of wins, ties and losses for each comparison. The rate, wins + ties / 2, falls into the middle of the ties, and
    carries its interval."""

    title: str
    rows: list[Outcome]
    name: str
    unit: str = ""
    labels: list[str] = field(default_factory=lambda: ["wins", "ties", "losses"])


Chart = LineChart | Histogram | BarChart | WinRateChart


def svg(chart: Chart) -> str:
    """An SVG element without a title, which the page gives. All text in it is escaped."""
    width, height = _size(chart)
    canvas = SvgCanvas(width, height, _description(chart))
    _draw(chart, canvas, 0.0)
    return canvas.source()


def png(chart: Chart) -> bytes:
    """A PNG file with title and legend, at two pixels a point."""
    width, height = _size(chart)
    head = 40.0 if chart.labels else 24.0
    canvas = PngCanvas(width, height + head)
    canvas.text((10, 17), chart.title + (f" ({chart.unit})" if chart.unit else ""), colour="ink", size=13)
    x = 10.0
    for label, colour, dash in legend(chart):
        canvas.line([(x, 31), (x + 18, 31)], colour, width=3 if isinstance(chart, WinRateChart) else 2, dash=dash)
        canvas.text((x + 23, 35), label)
        x += 36 + 6.2 * len(label)
    _draw(chart, canvas, head)
    return canvas.data()


def style(index: int, chart: Chart) -> tuple[str, Sequence[float]]:
    """Colour and dash of a series, by its place."""
    if isinstance(chart, WinRateChart):
        return ("s0", "rule", "s1")[index], ()
    alone = isinstance(chart, LineChart) and sum(bool(series.y) for series in chart.series) == 1
    return f"s{index % SERIES_COLOURS}", () if alone else DASHES[index % len(DASHES)]


def legend(chart: Chart) -> list[tuple[str, str, Sequence[float]]]:
    """Label, colour and dash of what the chart shows, without what has no values."""
    empty = {i for i, s in enumerate(chart.series) if not s.y} if isinstance(chart, LineChart) else set()
    return [(label, *style(index, chart)) for index, label in enumerate(chart.labels) if index not in empty]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers, 1, 2 or 5 times a power of ten apart, within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _size(chart: Chart) -> tuple[float, float]:
    if isinstance(chart, BarChart):
        return WIDTH, 22.0 * len(chart.rows) + 8
    if isinstance(chart, WinRateChart):
        return WIDTH, _OUTCOME * len(chart.rows) + 22
    return WIDTH, _HEIGHT


def _description(chart: Chart) -> str:
    """For readers who don't see the chart."""
    parts = [chart.title]
    if isinstance(chart, LineChart):
        for series in chart.series:
            if series.y:
                parts.append(f"{series.label} from {fixed(series.y[0], 3)} to {fixed(series.y[-1], 3)}")
    elif isinstance(chart, Histogram):
        parts += [f"{label}: mean {fixed(math.fsum(v) / len(v), 3)} of {len(v)}" for label, v in chart.groups]
    elif isinstance(chart, BarChart):
        parts += [f"{label} {fixed(value, 2)} {chart.unit}" for label, value in chart.rows]
    else:
        parts += [f"{r.label}: {fixed(100 * r.rate, 1)}%" for r in chart.rows]
    return "; ".join(parts)


def _draw(chart: Chart, canvas: Canvas, top: float) -> None:
    if isinstance(chart, LineChart):
        _draw_lines(chart, canvas, top)
    elif isinstance(chart, Histogram):
        _draw_histogram(chart, canvas, top)
    elif isinstance(chart, BarChart):
        _draw_bars(chart, canvas, top)
    else:
        _draw_outcomes(chart, canvas, top)


class _Axes:
    """A frame with its scales."""

    def __init__(self, canvas: Canvas, top: float, x: tuple[float, float], y: tuple[float, float]):
        self.canvas, self.x, self.y = canvas, x, y
        self.left, self.right = _LEFT, WIDTH - _RIGHT
        self.top, self.bottom = top + _TOP, top + _HEIGHT - _BOTTOM

    def at(self, x: float, y: float) -> tuple[float, float]:
        along = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + along * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def draw(self, *, whole_x: bool) -> None:
        rows = ticks(*self.y)
        for value in rows:
            y = self.at(self.x[0], value)[1]
            self.canvas.line([(self.left, y), (self.right, y)], "grid")
            self.canvas.text((self.left - 6, y + 3.5), _tick_text(value, rows), anchor="end")
        columns = ticks(*self.x, 6)
        if whole_x:
            columns = [value for value in columns if abs(value - round(value)) < 1e-9]
        for value in columns:
            x = self.at(value, self.y[0])[0]
            self.canvas.line([(x, self.bottom), (x, self.bottom + 3)], "rule")
            self.canvas.text((x, self.bottom + 15), _tick_text(value, columns), anchor="middle")
        self.canvas.line([(self.left, self.bottom), (self.right, self.bottom)], "rule")


def _tick_text(value: float, among: Sequence[float]) -> str:
    step = among[1] - among[0] if len(among) > 1 else abs(value) or 1.0
    largest = max(abs(v) for v in among)
    if largest >= 1e5 or step < 1e-4:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e") if value else "0"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value + 0.0:,.{decimals}f}" if abs(value) > step / 1e6 else "0"


def _padded(low: float, high: float) -> tuple[float, float]:
    """A range a little wider than the values, and never empty."""
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    if low >= 0 and low - room < 0:
        return 0.0, high + room
    return low - room, high + room


@dataclass(frozen=True)
class _Drawn:
    """A curve as it is drawn: few enough points, and the range that each stands for."""

    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]
    banded: bool


def _thinned(series: Series) -> _Drawn:
    n = len(series.x)
    if n <= _MOST_POINTS:
        error = series.error or [0.0] * n
        error = [e if math.isfinite(e) else 0.0 for e in error]
        low = [y - e for y, e in zip(series.y, error, strict=True)]
        high = [y + e for y, e in zip(series.y, error, strict=True)]
        return _Drawn(series.x, series.y, low, high, series.error is not None)
    cuts = [i * n // _MOST_POINTS for i in range(_MOST_POINTS + 1)]
    parts = [(series.x[a:b], series.y[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    # The last point is the run's last step itself, not the middle of the last part.
    x = [*(math.fsum(xs) / len(xs) for xs, _ in parts[:-1]), series.x[-1]]
    y = [math.fsum(ys) / len(ys) for _, ys in parts]
    return _Drawn(x, y, [min(ys) for _, ys in parts], [max(ys) for _, ys in parts], True)


def _draw_lines(chart: LineChart, canvas: Canvas, top: float) -> None:
    drawn = [_thinned(series) for series in chart.series]
    steps = [x for line in drawn for x in line.x]
    values = [v for line in drawn for v in (*line.low, *line.high)] + [value for value, _ in chart.marks]
    first, last = min(steps), max(steps)
    axes = _Axes(
        canvas, top, (first, last) if last > first else (first - 1, first + 1), _padded(min(values), max(values))
    )
    axes.draw(whole_x=True)
    for value, name in chart.marks:
        y = axes.at(axes.x[0], value)[1]
        canvas.line([(axes.left, y), (axes.right, y)], "soft", dash=(3, 3))
        canvas.text((axes.left + 4, y - 4), name, size=10)
    for index, line in enumerate(drawn):
        colour, dash = style(index, chart)
        points = [axes.at(x, y) for x, y in zip(line.x, line.y, strict=True)]
        if line.banded and len(points) > 1:
            upper = [axes.at(x, y) for x, y in zip(line.x, line.high, strict=True)]
            lower = [axes.at(x, y) for x, y in zip(line.x, line.low, strict=True)]
            canvas.area([*upper, *reversed(lower)], colour, opacity=0.18)
        if len(points) > 1:
            canvas.line(points, colour, width=1.7, dash=dash)
        if len(points) <= 8:
            for point in points:
                canvas.dot(point, colour, radius=2.6)
    _hover_columns(chart, drawn, axes)


def _hover_columns(chart: LineChart, drawn: list[_Drawn], axes: _Axes) -> None:
    by_step: dict[float, list[str]] = {}
    for series, line in zip(chart.series, drawn, strict=True):
        for x, y in zip(line.x, line.y, strict=True):
            by_step.setdefault(x, []).append(f"{series.label} {fixed(y, 4)}")
    steps = sorted(by_step)
    if len(steps) > _MOST_POINTS:
        return
    places = [axes.at(step, axes.y[0])[0] for step in steps]
    edges = [axes.left, *((a + b) / 2 for a, b in zip(places, places[1:], strict=False)), axes.right]
    for step, left, right in zip(steps, edges, edges[1:], strict=False):
        text = "\n".join([f"step {step:g}", *by_step[step]])
        axes.canvas.hover(left, axes.top, right - left, axes.bottom - axes.top, text)


def _bins(values: list[float], low: float, high: float, count: int) -> list[float]:
    """Share of the values in each of ``count`` equal parts of [low, high]."""
    shares = [0.0] * count
    for value in values:
        place = int((value - low) / (high - low) * count)
        shares[min(count - 1, max(0, place))] += 1 / len(values)
    return shares


def _draw_histogram(chart: Histogram, canvas: Canvas, top: float) -> None:
    everything = [v for _, values in chart.groups for v in values]
    low, high = chart.domain or (min(everything), max(everything))
    if not high > low:
        low, high = low - 0.5, high + 0.5
    fewest = min(len(values) for _, values in chart.groups)
    count = max(6, min(30, round(2 * fewest ** (1 / 3)) + 4))
    shares = [_bins(values, low, high, count) for _, values in chart.groups]
    axes = _Axes(canvas, top, (low, high), (0.0, 100 * max(map(max, shares)) * 1.08))
    axes.draw(whole_x=False)
    for index, (_, values) in enumerate(chart.groups):
        colour, dash = style(index, chart)
        outline = []
        for place, share in enumerate(shares[index]):
            left, right = (low + (high - low) * (place + i) / count for i in (0, 1))
            outline += [axes.at(left, 100 * share), axes.at(right, 100 * share)]
        ends = (axes.at(high, 0), axes.at(low, 0))
        canvas.area([*outline, *ends], colour, opacity=0.2)
        canvas.line([ends[1], *outline, ends[0]], colour, width=1.5, dash=dash)
        mean = axes.at(math.fsum(values) / len(values), 0)[0]
        canvas.line([(mean, axes.bottom), (mean, axes.bottom + 6)], colour, width=3)
    for place in range(count):
        left, right = (low + (high - low) * (place + i) / count for i in (0, 1))
        text = [f"{fixed(left, 3)} to {fixed(right, 3)}"]
        text += [f"{label}: {100 * part[place]:.1f}%" for label, part in zip(chart.labels, shares, strict=True)]
        x, y = axes.at(left, axes.y[1])
        canvas.hover(x, y, axes.at(right, 0)[0] - x, axes.bottom - y, "\n".join(text))


def _draw_bars(chart: BarChart, canvas: Canvas, top: float) -> None:
    largest = max(value for _, value in chart.rows) or 1.0
    left = 112.0
    room = WIDTH - left - 62
    for index, (label, value) in enumerate(chart.rows):
        y = top + 4 + 22 * index
        length = max(1.0, room * value / largest)
        canvas.text((left - 8, y + 13), label, anchor="end")
        canvas.area(
            [(left, y + 3), (left + length, y + 3), (left + length, y + 16), (left, y + 16)], "s0", opacity=0.75
        )
        canvas.text((left + length + 6, y + 13), f"{fixed(value, 2)} {chart.unit}", colour="ink")


def _draw_outcomes(chart: WinRateChart, canvas: Canvas, top: float) -> None:
    left, right = 8.0, WIDTH - 8
    bottom = top + _OUTCOME * len(chart.rows)

    def at(share: float) -> float:
        return left + share * (right - left)

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        place = "start" if share == 0 else "end" if share == 1 else "middle"
        canvas.text((at(share), bottom + 14), f"{100 * share:g}%", anchor=place)
    for index, row in enumerate(chart.rows):
        y = top + _OUTCOME * index
        judged = row.wins + row.ties + row.losses
        counts = f"{row.wins} wins, {row.ties} ties, {row.losses} losses"
        rate = f"{100 * row.rate:.1f}% [{100 * row.low:.1f}, {100 * row.high:.1f}]"
        canvas.text((left, y + 13), row.label, colour="ink")
        canvas.text((left, y + 54), f"{rate}, {counts}" if judged else "nothing judged")
        start = 0.0
        for count, colour in ((row.wins, "s0"), (row.ties, "rule"), (row.losses, "s1")):
            end = start + count / max(1, judged)
            if count:
                box = [(at(start), y + 20), (at(end), y + 20), (at(end), y + 40), (at(start), y + 40)]
                canvas.area(box, colour, opacity=0.55)
            start = end
        canvas.line([(at(0.5), y + 17), (at(0.5), y + 43)], "ink", dash=(2, 2))
        if judged:
            canvas.line([(at(row.low), y + 30), (at(row.high), y + 30)], "ink", width=1.5)
            for edge in (row.low, row.high):
                canvas.line([(at(edge), y + 25), (at(edge), y + 35)], "ink", width=1.5)
            canvas.dot((at(row.rate), y + 30), "ink", radius=3.5)
