"""The textbook figure: the rolled cell on the left, its copies on the right, the state handed on between them."""

from __future__ import annotations

import math
from functools import partial

from unrolled.drawing.lettering import extent, printable, shortened
from unrolled.drawing.marks import HEAD, Box, Extent, Label, Mark, Stroke, around
from unrolled.drawing.sketch import Sketch, shown_copies

MARGIN = 22.0
MOST = 5
"""How many copies are drawn when not all are."""

OUTPUT, TOP, MIDDLE, BOTTOM, INPUT, BRACE = 116.0, 168.0, 200.0, 232.0, 299.0, 320.0
"""Heights: the outputs' baseline, a cell's top, middle and bottom, the inputs' baseline, the brace."""

_MATH = 18.0
_STEM = 10.0
"""What is left between an arrow and the label at its end."""


def figure(sketch: Sketch) -> tuple[list[Mark], float]:
    """The heading, the rolled cell and the copies; and where the copies begin, for what is aligned with them."""
    rolled = _rolled(sketch)
    turn = _turn(around(rolled).right + 18)
    start = around(turn).right + 18
    return [*_heading(sketch), *rolled, *turn, *_copies(sketch, start)], start + _gap(sketch)


def _heading(sketch: Sketch) -> list[Mark]:
    name = fitted(sketch.title, 560, Label(MARGIN, 36, "", 21, "strong"))
    return [name, Label(MARGIN, 62, sketch.span, 15, "muted")]


def fitted(text: str, room: float, label: Label, *, middle: bool = False) -> Label:
    """A label with as much of a text as there is room for, and all of it when pointed at."""
    whole = printable(text)
    text = shortened(whole, room, partial(extent, size=label.size, style=label.style), middle=middle)
    return Label(label.x, label.y, text, label.size, label.style, label.anchor, full="" if text == whole else whole)


def _rolled(sketch: Sketch) -> list[Mark]:
    """The cell once, with a loop for its state."""
    name = fitted(sketch.cell, 140, Label(0, MIDDLE + 5, "", 16, "strong", "middle"))
    width = max(92.0, name.width + 20)
    marks: list[Mark] = [Box(MARGIN, TOP, width, BOTTOM - TOP, "cell"), name.at(MARGIN + width / 2, name.y)]
    marks += _ends(sketch, MARGIN + width / 2, "t")
    return marks + (_loop(sketch, MARGIN + width) if sketch.state else [])


def _loop(sketch: Sketch, x: float) -> list[Mark]:
    """The state that leaves the cell on its right and comes back."""
    radius, reach = 14.0, 16.0
    right = x + reach + radius
    path = f"M{x:g} {MIDDLE - radius:g}h{reach:g}a{radius:g} {radius:g} 0 0 1 0 {2 * radius:g}h{HEAD - 1 - reach:g}"
    loop = Stroke(path, "state", Extent(x, MIDDLE - radius, right, MIDDLE + radius), (x, MIDDLE + radius), (-1, 0))
    return [loop, Label(right + 8, MIDDLE + 5, ", ".join(sketch.state_symbols), _MATH, "math")]


def _turn(x: float) -> list[Mark]:
    """The neutral arrow from the rolled cell to its copies."""
    word = Label(0, MIDDLE - 10, "unrolled", 14, "muted", "middle")
    length = word.width + 8
    return [word.at(x + length / 2, word.y), Stroke.arrow(x, MIDDLE, x + length, MIDDLE, "plain")]


def _ends(sketch: Sketch, x: float, index: str) -> list[Mark]:
    """A copy's input from below and its output above."""
    marks: list[Mark] = [
        Stroke.arrow(x, INPUT - 0.95 * _MATH - 4, x, BOTTOM, "input"),
        Label(x, INPUT, "x", _MATH, "math", "middle", index),
    ]
    if sketch.output:
        marks += [
            Stroke.arrow(x, TOP, x, OUTPUT + _STEM, "output"),
            Label(x, OUTPUT, "o", _MATH, "math", "middle", index),
        ]
    return marks


def _copies(sketch: Sketch, x: float) -> list[Mark]:
    """The copies from left to right, and the states that they hand on."""
    shown = shown_copies(sketch.T, MOST)
    gap, left = _gap(sketch), x + _gap(sketch)
    marks: list[Mark] = _handed(sketch, 0, x, left)
    for n, following in zip(shown, [*shown[1:], sketch.T], strict=True):
        x += gap
        width = _width(sketch, n)
        marks += _omission(sketch.T - MOST, x, width) if n is None else _copy(sketch, n, x, width)
        x += width
        marks += _handed(sketch, following or 0 if n is None else n + 1, x, x + gap)
    return marks + _brace(sketch, left, x)


def _width(sketch: Sketch, n: int | None) -> float:
    """How wide a copy is drawn, or (n is None) the omission of copies."""
    if n is None:
        return max(60.0, math.ceil(extent(f"{sketch.T:,}", 15)) + 8)
    return max(62.0, math.ceil(extent(str(sketch.T - 1), 16, "strong")) + 24)


def _gap(sketch: Sketch) -> float:
    """The distance between copies: room for the longest label of a state."""
    labels = [Label(0, 0, symbol, _MATH, "math", subscript=str(sketch.T)) for symbol in sketch.state_symbols]
    return max([44.0, *(label.width + 14 for label in labels)])


def _copy(sketch: Sketch, n: int, x: float, width: float) -> list[Mark]:
    middle, t = x + width / 2, sketch.time(n)
    return [
        Box(x, TOP, width, BOTTOM - TOP, "cell"),
        Label(middle, MIDDLE - 7, "copy", 13, "muted", "middle"),
        Label(middle, MIDDLE + 14, str(t), 16, "strong", "middle"),
        *_ends(sketch, middle, str(t)),
    ]


def _handed(sketch: Sketch, n: int, x0: float, x1: float) -> list[Mark]:
    """The state that copy number n receives; a second name stands under the arrow."""
    if not sketch.state:
        return []
    middle = (x0 + x1) / 2 - HEAD / 4
    heights = MIDDLE - 11, MIDDLE + 21
    labels = [
        Label(middle, y, symbol, _MATH, "math", "middle", str(sketch.handed(n)))
        for symbol, y in zip(sketch.state_symbols, heights, strict=False)
    ]
    return [Stroke.arrow(x0, MIDDLE, x1, MIDDLE, "state"), *labels]


def _omission(count: int, x: float, width: float) -> list[Mark]:
    """Three dots, and how many copies they stand for."""
    middle = x + width / 2
    return [
        Label(middle, MIDDLE - 14, f"{count:,}", 15, "muted", "middle"),
        *(Box(middle + offset - 2, MIDDLE - 2, 4, 4, "dot", 2) for offset in (-13, 0, 13)),
        Label(middle, MIDDLE + 24, "more", 15, "muted", "middle"),
    ]


def _brace(sketch: Sketch, left: float, right: float) -> list[Mark]:
    """One brace under all copies: they have the same weights."""
    words = Label(0, BRACE + 37, sketch.sharing, 16, "", "middle")
    middle, r = (left + right) / 2, 7.0
    path = (
        f"M{left:g} {BRACE:g}q0 {r:g} {r:g} {r:g}H{middle - r:g}q{r:g} 0 {r:g} {r:g}"
        f"q0 {-r:g} {r:g} {-r:g}H{right - r:g}q{r:g} 0 {r:g} {-r:g}"
    )
    brace = Stroke(path, "weights", Extent(left, BRACE, right, BRACE + 2 * r))
    return [brace, words.at(max(middle, MARGIN + words.width / 2), words.y)]
