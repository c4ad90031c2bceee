"""The textbook figure: the rolled cell on the left, its copies on the right, the state passed on between them."""

from __future__ import annotations

import math

from unrolled.drawing.lettering import text_width
from unrolled.drawing.marks import HEAD, Bounds, Box, Label, Mark, Stroke
from unrolled.drawing.sketch import Sketch

MARGIN = 22.0


class Figure:
    """The figure of a sketch.

    Args:
        sketch: what is drawn.

    Attributes:
        marks: the heading, the rolled cell and the copies.
        column: the x at which the copies begin, for what is aligned with them.
    """

    _MOST_COPIES = 5
    # Heights: the outputs' baseline, a cell's top, middle and bottom, the inputs' baseline, the brace.
    _OUTPUT, _TOP, _MIDDLE, _BOTTOM, _INPUT, _BRACE = 116.0, 168.0, 200.0, 232.0, 299.0, 320.0
    _SYMBOL = 18.0  # the font size of x, h and o

    def __init__(self, sketch: Sketch) -> None:
        self.sketch = sketch
        rolled = self._rolled_cell()
        unrolling = self._unrolling_arrow(Bounds.around(rolled).right + 18)
        start = Bounds.around(unrolling).right + 18
        # Between copies there is room for the longest label of a state.
        labels = [self._symbol(0, 0, name, str(sketch.T)) for name in sketch.state_symbols]
        self._gap = max([44.0, *(label.width + 14 for label in labels)])
        self.column = start + self._gap
        title = Label(MARGIN, 36, "", 21, "strong").fitted(sketch.title, 560)
        heading = [title, Label(MARGIN, 62, sketch.dimensions, 15, "muted")]
        self.marks: list[Mark] = [*heading, *rolled, *unrolling, *self._copies(start)]

    def _symbol(self, x: float, y: float, name: str, index: str) -> Label:
        return Label(x, y, name, self._SYMBOL, "math", "middle", index)

    def _cell_box(self, x: float, width: float) -> Box:
        return Box(x, self._TOP, width, self._BOTTOM - self._TOP, "cell")

    def _rolled_cell(self) -> list[Mark]:
        """The cell once, with a loop for its state."""
        name = Label(0, self._MIDDLE + 5, "", 16, "strong", "middle").fitted(self.sketch.cell, 140)
        width = max(92.0, name.width + 20)
        middle = MARGIN + width / 2
        loop = self._state_loop(MARGIN + width) if self.sketch.state else []
        return [self._cell_box(MARGIN, width), name.at(middle, name.y), *self._input_and_output(middle, "t"), *loop]

    def _state_loop(self, x: float) -> list[Mark]:
        """The state that leaves the cell on its right and comes back."""
        radius, reach, y = 14.0, 16.0, self._MIDDLE
        right = x + reach + radius
        path = f"M{x:g} {y - radius:g}h{reach:g}a{radius:g} {radius:g} 0 0 1 0 {2 * radius:g}h{HEAD - 1 - reach:g}"
        loop = Stroke(path, "state", Bounds(x, y - radius, right, y + radius), (x, y + radius), (-1, 0))
        return [loop, Label(right + 8, y + 5, ", ".join(self.sketch.state_symbols), self._SYMBOL, "math")]

    def _unrolling_arrow(self, x: float) -> list[Mark]:
        """The neutral arrow from the rolled cell to its copies."""
        word = Label(0, self._MIDDLE - 10, "unrolled", 14, "muted", "middle")
        length = word.width + 8
        arrow = Stroke.arrow(x, self._MIDDLE, x + length, self._MIDDLE, "plain")
        return [word.at(x + length / 2, word.y), arrow]

    def _input_and_output(self, x: float, index: str) -> list[Mark]:
        """A copy's input from below and its output above."""
        marks: list[Mark] = [
            Stroke.arrow(x, self._INPUT - 0.95 * self._SYMBOL - 4, x, self._BOTTOM, "input"),
            self._symbol(x, self._INPUT, "x", index),
        ]
        if self.sketch.output:
            marks.append(Stroke.arrow(x, self._TOP, x, self._OUTPUT + 10, "output"))
            marks.append(self._symbol(x, self._OUTPUT, "o", index))
        return marks

    def _copies(self, x: float) -> list[Mark]:
        """The copies from left to right, and the states between them."""
        T, shown = self.sketch.T, self.sketch.shown_copies(self._MOST_COPIES)
        marks = self._state_arrow(0, x)
        for n, following in zip(shown, [*shown[1:], T], strict=True):
            x += self._gap
            if n is None:
                width = max(60.0, math.ceil(text_width(f"{T:,}", 15)) + 8)
                marks += self._omission(T - self._MOST_COPIES, x + width / 2)
                received = following or 0
            else:
                width = max(62.0, math.ceil(text_width(str(T - 1), 16, "strong")) + 24)
                marks += self._copy(n, x, width)
                received = n + 1
            x += width
            marks += self._state_arrow(received, x)
        return marks + self._brace(self.column, x)

    def _copy(self, n: int, x: float, width: float) -> list[Mark]:
        middle, t = x + width / 2, str(self.sketch.time(n))
        return [
            self._cell_box(x, width),
            Label(middle, self._MIDDLE - 7, "copy", 13, "muted", "middle"),
            Label(middle, self._MIDDLE + 14, t, 16, "strong", "middle"),
            *self._input_and_output(middle, t),
        ]

    def _state_arrow(self, n: int, x: float) -> list[Mark]:
        """The state that copy number n receives; a second name stands under the arrow."""
        if not self.sketch.state:
            return []
        end, index = x + self._gap, str(self.sketch.state_time(n))
        middle = (x + end) / 2 - HEAD / 4
        heights = self._MIDDLE - 11, self._MIDDLE + 21
        labels = zip(self.sketch.state_symbols, heights, strict=False)
        arrow = Stroke.arrow(x, self._MIDDLE, end, self._MIDDLE, "state")
        return [arrow, *(self._symbol(middle, y, name, index) for name, y in labels)]

    def _omission(self, count: int, middle: float) -> list[Mark]:
        """Three dots, and how many copies they stand for."""
        return [
            Label(middle, self._MIDDLE - 14, f"{count:,}", 15, "muted", "middle"),
            *(Box(middle + offset - 2, self._MIDDLE - 2, 4, 4, "dot", 2) for offset in (-13, 0, 13)),
            Label(middle, self._MIDDLE + 24, "more", 15, "muted", "middle"),
        ]

    def _brace(self, left: float, right: float) -> list[Mark]:
        """One brace under all copies: they have the same weights."""
        y, middle, r = self._BRACE, (left + right) / 2, 7.0
        path = (
            f"M{left:g} {y:g}q0 {r:g} {r:g} {r:g}H{middle - r:g}q{r:g} 0 {r:g} {r:g}"
            f"q0 {-r:g} {r:g} {-r:g}H{right - r:g}q{r:g} 0 {r:g} {-r:g}"
        )
        words = Label(0, y + 37, self.sketch.sharing, 16, "", "middle")
        brace = Stroke(path, "weights", Bounds(left, y, right, y + 2 * r))
        return [brace, words.at(max(middle, MARGIN + words.width / 2), words.y)]
