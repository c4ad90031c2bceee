"""The marks a figure is made of: labels, boxes, strokes and arrows, each at its place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from unrolled.drawing.lettering import extent

SUBSCRIPT = 0.72
"""A subscript's font size, relative to its label's."""

ASCENT, DESCENT = 0.95, 0.3
"""How far letters reach above and below the baseline, relative to the font size."""

HEAD = 8.0
"""The length of an arrowhead."""


class Extent(NamedTuple):
    """A rectangle that holds a mark."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Label:
    """A line of text; (x, y) is where its baseline starts, or its middle or end with that anchor."""

    x: float
    y: float
    text: str
    size: float = 13
    style: str = ""
    anchor: str = "start"
    subscript: str = ""
    full: str = ""
    """What the text was shortened from."""

    @property
    def width(self) -> float:
        """An upper bound of its width, whole so that lines beside it are sharp."""
        return math.ceil(extent(self.text, self.size, self.style) + extent(self.subscript, self.size * SUBSCRIPT))

    @property
    def extent(self) -> Extent:
        """A rectangle that holds it in any font."""
        left = self.x - self.width * {"start": 0, "middle": 0.5, "end": 1}[self.anchor]
        return Extent(left, self.y - ASCENT * self.size, left + self.width, self.y + DESCENT * self.size)

    def at(self, x: float, y: float) -> Label:
        """The same label somewhere else."""
        return replace(self, x=x, y=y)


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
    def extent(self) -> Extent:
        """The rectangle itself."""
        return Extent(self.x, self.y, self.x + self.width, self.y + self.height)


@dataclass(frozen=True)
class Stroke:
    """An open line: `path` in SVG's path language, with an arrowhead whose tip is at `tip` if there is one.

    Attributes:
        path: the line without its head.
        style: the classes that colour it.
        extent: a rectangle that holds it.
        tip: where the arrow points to.
        towards: the unit vector along which it points there.
    """

    path: str
    style: str
    extent: Extent
    tip: tuple[float, float] | None = None
    towards: tuple[int, int] = (1, 0)

    @classmethod
    def line(cls, x0: float, y0: float, x1: float, y1: float, style: str) -> Stroke:
        """A straight line."""
        return cls(f"M{x0:g} {y0:g}L{x1:g} {y1:g}", style, _spanned(x0, y0, x1, y1))

    @classmethod
    def arrow(cls, x0: float, y0: float, x1: float, y1: float, style: str) -> Stroke:
        """A level or upright arrow whose tip is exactly at (x1, y1)."""
        towards = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        # The line ends inside the head: ending at the tip, its blunt end would show on both sides of it.
        end_x, end_y = x1 - towards[0] * (HEAD - 1), y1 - towards[1] * (HEAD - 1)
        line = cls.line(x0, y0, end_x, end_y, style)
        return replace(line, tip=(x1, y1), towards=towards, extent=_spanned(x0, y0, x1, y1))


Mark = Label | Box | Stroke


def _spanned(x0: float, y0: float, x1: float, y1: float) -> Extent:
    return Extent(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))


def around(marks: Iterable[Mark]) -> Extent:
    """The rectangle that holds all of some marks."""
    lefts, tops, rights, bottoms = zip(*(mark.extent for mark in marks), strict=True)
    return Extent(min(lefts), min(tops), max(rights), max(bottoms))
