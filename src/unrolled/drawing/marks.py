"""The marks a figure is made of: labels, boxes, strokes and arrows, each at its place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from unrolled.drawing.lettering import printable, shortened, text_width

HEAD = 8.0
"""The length of an arrowhead."""


class Bounds(NamedTuple):
    """A rectangle that holds a mark."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def around(cls, marks: Iterable[Mark]) -> Bounds:
        """The rectangle that holds all of some marks."""
        lefts, tops, rights, bottoms = zip(*(mark.bounds for mark in marks), strict=True)
        return cls(min(lefts), min(tops), max(rights), max(bottoms))


@dataclass(frozen=True)
class Label:
    """A line of text.

    Attributes:
        x: where the baseline starts, or its middle or end with that anchor.
        y: the height of the baseline.
        text: what is shown.
        size: the font size.
        style: the classes that style it.
        anchor: "start", "middle" or "end".
        subscript: a smaller text after it.
        full: what the text was shortened from; '' where nothing is left out.
    """

    x: float
    y: float
    text: str
    size: float = 13
    style: str = ""
    anchor: str = "start"
    subscript: str = ""
    full: str = ""

    @property
    def subscript_size(self) -> float:
        """The font size of the subscript."""
        return self.size * 0.72

    @property
    def width(self) -> float:
        """An upper bound of its width, whole so that lines next to it are sharp."""
        text = text_width(self.text, self.size, self.style)
        return math.ceil(text + text_width(self.subscript, self.subscript_size))

    @property
    def bounds(self) -> Bounds:
        """A rectangle that holds it in any font."""
        left = self.x - self.width * {"start": 0, "middle": 0.5, "end": 1}[self.anchor]
        return Bounds(left, self.y - 0.95 * self.size, left + self.width, self.y + 0.3 * self.size)

    def at(self, x: float, y: float) -> Label:
        """The same label somewhere else."""
        return replace(self, x=x, y=y)

    def fitted(self, text: str, room: float, *, middle: bool = False) -> Label:
        """The same label with as much of a text as there is room for; `full` has all of it."""
        full = printable(text)
        text = shortened(full, room, partial(text_width, size=self.size, style=self.style), middle=middle)
        return replace(self, text=text, full="" if text == full else full)


@dataclass(frozen=True)
class Box:
    """A rectangle with its upper left corner at (x, y)."""

    x: float
    y: float
    width: float
    height: float
    style: str
    radius: float = 8

    @property
    def bounds(self) -> Bounds:
        """The rectangle itself."""
        return Bounds(self.x, self.y, self.x + self.width, self.y + self.height)


@dataclass(frozen=True)
class Stroke:
    """An open line, with an arrowhead if it has a tip.

    Attributes:
        path: the line without its head, in SVG's path language.
        style: the classes that style it.
        bounds: a rectangle that holds it.
        tip: where the arrow points to.
        towards: the unit vector along which it points there.
    """

    path: str
    style: str
    bounds: Bounds
    tip: tuple[float, float] | None = None
    towards: tuple[int, int] = (1, 0)

    @classmethod
    def line(cls, x0: float, y0: float, x1: float, y1: float, style: str) -> Stroke:
        """A straight line."""
        bounds = Bounds(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        return cls(f"M{x0:g} {y0:g}L{x1:g} {y1:g}", style, bounds)

    @classmethod
    def arrow(cls, x0: float, y0: float, x1: float, y1: float, style: str) -> Stroke:
        """A horizontal or vertical arrow whose tip is exactly at (x1, y1)."""
        u, v = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        # The line ends inside the head: ending at the tip, its blunt end would show on both sides of it.
        short = cls.line(x0, y0, x1 - u * (HEAD - 1), y1 - v * (HEAD - 1), style)
        return replace(short, bounds=cls.line(x0, y0, x1, y1, style).bounds, tip=(x1, y1), towards=(u, v))

    @property
    def head(self) -> str:
        """The arrowhead in SVG's path language, '' for a line without a tip."""
        if self.tip is None:
            return ""
        (x, y), (u, v), half = self.tip, self.towards, HEAD * 0.45
        back_x, back_y, side_x, side_y = x - u * HEAD, y - v * HEAD, -v * half, u * half
        corners = (back_x + side_x, back_y + side_y), (back_x - side_x, back_y - side_y)
        return f"M{x:g} {y:g}" + "".join(f"L{a:g} {b:g}" for a, b in corners) + "Z"


Mark = Label | Box | Stroke
