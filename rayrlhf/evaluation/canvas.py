"""What charts are drawn on: SVG inside a page, whose colours follow the page's light or dark; or a PNG file."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Protocol

from PIL import Image, ImageDraw, ImageFont

__all__ = ["Canvas", "DASHES", "PALETTE", "PngCanvas", "SERIES_COLOURS", "SvgCanvas"]

Point = tuple[float, float]

# Colours of series are those of Okabe and Ito (2008), told apart with any colour vision; dashes tell them apart in grey.
PALETTE = {
    "s0": "#0072b2",
    "s1": "#d55e00",
    "s2": "#00805f",
    "s3": "#a8538a",
    "s4": "#a87500",
    "s5": "#2f8fc4",
    "ink": "#1c2024",
    "soft": "#5d666f",
    "grid": "#e3e7ea",
    "rule": "#9aa3ab",
    "paper": "#ffffff",
}
"""Colours by name, on white; the report's style sheet has its own for light and dark under the same names."""
SERIES_COLOURS = 6
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 3), (2, 2.5), (9, 3, 2, 3), (4, 4), (1, 2))


class Canvas(Protocol):
    """Lengths are in pixels, y goes down, colours are names of `PALETTE`."""

    def line(self, points: Sequence[Point], colour: str, *, width: float = 1.0, dash: Sequence[float] = ()) -> None: ...

    def area(self, points: Sequence[Point], colour: str, *, opacity: float) -> None: ...

    def dot(self, at: Point, colour: str, *, radius: float) -> None: ...

    def text(self, at: Point, text: str, *, colour: str = "soft", anchor: str = "start", size: float = 11) -> None:
        """``at`` is the base line; ``anchor``: start, middle or end."""

    def hover(self, x: float, y: float, width: float, height: float, text: str) -> None:
        """What a pointer over this box shows, where the medium can."""


class SvgCanvas:
    """Collects SVG elements; colours are the page's custom properties ``--s0``, ``--ink``, ..."""

    def __init__(self, width: float, height: float, description: str):
        label = html.escape(description, quote=True)
        self._parts = [f'<svg viewBox="0 0 {_n(width)} {_n(height)}" role="img" aria-label="{label}">']

    def line(self, points: Sequence[Point], colour: str, *, width: float = 1.0, dash: Sequence[float] = ()) -> None:
        pattern = f";stroke-dasharray:{' '.join(_n(d) for d in dash)}" if dash else ""
        self._parts.append(
            f'<polyline points="{_points(points)}" style="fill:none;stroke:var(--{colour});stroke-width:{_n(width)}'
            f'{pattern}"/>'
        )

    def area(self, points: Sequence[Point], colour: str, *, opacity: float) -> None:
        self._parts.append(f'<polygon points="{_points(points)}" style="fill:var(--{colour});opacity:{_n(opacity)}"/>')

    def dot(self, at: Point, colour: str, *, radius: float) -> None:
        self._parts.append(f'<circle cx="{_n(at[0])}" cy="{_n(at[1])}" r="{_n(radius)}" style="fill:var(--{colour})"/>')

    def text(self, at: Point, text: str, *, colour: str = "soft", anchor: str = "start", size: float = 11) -> None:
        self._parts.append(
            f'<text x="{_n(at[0])}" y="{_n(at[1])}" text-anchor="{anchor}" '
            f'style="fill:var(--{colour});font-size:{_n(size)}px">{html.escape(text)}</text>'
        )

    def hover(self, x: float, y: float, width: float, height: float, text: str) -> None:
        self._parts.append(
            f'<rect class="hover" x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}">'
            f"<title>{html.escape(text)}</title></rect>"
        )

    def source(self) -> str:
        """The element; all text in it is escaped."""
        return "".join(self._parts) + "</svg>"


class PngCanvas:
    """Draws finer than the file is, and scales down, which smooths edges."""

    SCALE = 2
    _FINE = 4

    def __init__(self, width: float, height: float):
        self._size = (round(width * self.SCALE), round(height * self.SCALE))
        self._image = Image.new("RGB", (round(width * self._FINE), round(height * self._FINE)), PALETTE["paper"])
        self._draw = ImageDraw.Draw(self._image)

    def line(self, points: Sequence[Point], colour: str, *, width: float = 1.0, dash: Sequence[float] = ()) -> None:
        pieces = _dashed(points, dash) if dash else [list(points)]
        for piece in pieces:
            self._draw.line(
                self._fine(piece), fill=PALETTE[colour], width=max(1, round(width * self._FINE)), joint="curve"
            )

    def area(self, points: Sequence[Point], colour: str, *, opacity: float) -> None:
        mask = Image.new("L", self._image.size, 0)
        ImageDraw.Draw(mask).polygon(self._fine(points), fill=round(255 * opacity))
        self._image.paste(PALETTE[colour], (0, 0), mask)

    def dot(self, at: Point, colour: str, *, radius: float) -> None:
        (x, y), r = at, radius
        self._draw.ellipse(self._fine([(x - r, y - r), (x + r, y + r)]), fill=PALETTE[colour])

    def text(self, at: Point, text: str, *, colour: str = "soft", anchor: str = "start", size: float = 11) -> None:
        font = ImageFont.load_default(size=size * self._FINE)
        place = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
        self._draw.text(self._fine([at])[0], text, fill=PALETTE[colour], font=font, anchor=place)

    def hover(self, x: float, y: float, width: float, height: float, text: str) -> None:
        """A PNG has no pointer."""

    def data(self) -> bytes:
        """The file's bytes."""
        out = io.BytesIO()
        self._image.resize(self._size, Image.Resampling.LANCZOS).save(out, "PNG", optimize=True)
        return out.getvalue()

    def _fine(self, points: Sequence[Point]) -> list[Point]:
        return [(x * self._FINE, y * self._FINE) for x, y in points]


def _n(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def _points(points: Sequence[Point]) -> str:
    return " ".join(f"{_n(x)},{_n(y)}" for x, y in points)


def _dashed(points: Sequence[Point], dash: Sequence[float]) -> list[list[Point]]:
    """The drawn pieces of a dashed line; ``dash`` is on, off, on, ... in turn."""
    pieces: list[list[Point]] = []
    index, left, drawing = 0, dash[0], [points[0]] if points else []
    for start, end in zip(points, points[1:], strict=False):
        length = ((end[0] - start[0]) ** 2 + (end[1] - start[1]) ** 2) ** 0.5
        done = 0.0
        while length - done > left:
            done += left
            at = (start[0] + (end[0] - start[0]) * done / length, start[1] + (end[1] - start[1]) * done / length)
            if index % 2 == 0:
                pieces.append([*drawing, at])
            drawing, index = [at], index + 1
            left = dash[index % len(dash)]
        left -= length - done
        if index % 2 == 0:
            drawing.append(end)
    if index % 2 == 0 and len(drawing) > 1:
        pieces.append(drawing)
    return pieces
