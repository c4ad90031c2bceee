"""The tables under the figure: what a copy reads and outputs, and the weights that all copies share."""

from __future__ import annotations

from dataclasses import replace

from unrolled.drawing.figure import MARGIN
from unrolled.drawing.marks import Bounds, Box, Label, Mark, Stroke
from unrolled.drawing.sketch import Sketch

_TEXT, _CODE = Label(0, 0, "", 15), Label(0, 0, "", 14, "code")
_MUTED, _COUNT = replace(_TEXT, style="muted"), replace(_TEXT, anchor="end")


def tables(sketch: Sketch, column: float) -> list[Mark]:
    """Both tables: side by side where that is not too wide, else one above the other.

    Args:
        sketch: what is drawn.
        column: where the second table begins if the first leaves room.
    """
    top, widest = 412.0, 1020.0
    first = _tensor_table(sketch, MARGIN, top)
    second = _weight_table(sketch, max(column, Bounds.around(first).right + 56), top)
    if Bounds.around([*first, *second]).right > widest:
        second = _weight_table(sketch, MARGIN, Bounds.around(first).bottom + 48)
    return first + second


def _tensor_table(sketch: Sketch, x: float, y: float) -> list[Mark]:
    table = _Table(x, y)
    for kind, labels in sketch.tensors.items():
        table.add_swatch(kind)
        for n, label in enumerate(labels[: table.MOST_ROWS]):
            table.rows.append([
                None if n else replace(_TEXT, text=kind),
                _CODE.fitted(label.name, 260, middle=True),
                _CODE.fitted(str(list(label.shape)), 220, middle=True),
                _MUTED.fitted(label.dtype, 90),
            ])  # fmt: skip
        if len(labels) > table.MOST_ROWS:
            table.rows.append([None, _MUTED.fitted(f"… {len(labels) - table.MOST_ROWS:,} more", 150)])
    marks = table.marks("At every step")
    if not sketch.state:
        return marks
    origin = _MUTED.fitted(f"Initial state: {sketch.initial_state}", 400)
    return [*marks, origin.at(x + table.INDENT, Bounds.around(marks).bottom + 22)]


def _weight_table(sketch: Sketch, x: float, y: float) -> list[Mark]:
    if not sketch.parameters:
        return []
    table = _Table(x, y)
    table.add_swatch("weights")
    for parameter in sketch.parameters[: table.MOST_ROWS]:
        table.rows.append([
            _CODE.fitted(parameter.name, 300, middle=True),
            _CODE.fitted(str(list(parameter.shape)), 220, middle=True),
            _COUNT.fitted(f"{parameter.count:,}", 120),
            _MUTED.fitted(parameter.remark, 240),
        ])  # fmt: skip
    if len(sketch.parameters) > table.MOST_ROWS:
        table.rows.append([_MUTED.fitted(f"… {len(sketch.parameters) - table.MOST_ROWS:,} more", 220)])
    table.rows.append([replace(_TEXT, text="total"), None, _COUNT.fitted(f"{sketch.count:,}", 120)])
    return table.marks("Weights", has_total=True)


class _Table:
    """Rows under a heading and a rule; a column is as wide as its widest entry."""

    MOST_ROWS = 12
    """How many rows of one kind are drawn; the text picture has them all."""

    INDENT = 20.0
    _FIRST, _ROW = 35.0, 25.0  # from the heading to the first row, and from row to row

    def __init__(self, x: float, y: float) -> None:
        self.x, self.y = x, y
        self.rows: list[list[Label | None]] = []
        self._swatches: list[Mark] = []

    def add_swatch(self, kind: str) -> None:
        """Mark the row that comes next with the colour of a kind of thing."""
        y = self.y + self._FIRST + self._ROW * len(self.rows)
        self._swatches.append(Box(self.x, y - 10, 10, 10, f"swatch {kind}", 3))

    def marks(self, heading: str, *, has_total: bool = False) -> list[Mark]:
        """All marks of the table.

        Args:
            heading: what stands above the rows.
            has_total: whether the last row is a total, which a rule sets off.
        """
        marks: list[Mark] = [Label(self.x, self.y, heading, 15, "strong")]
        baselines = [self.y + self._FIRST + self._ROW * n for n in range(len(self.rows))]
        if has_total:
            baselines[-1] += 6
        left = self.x + self.INDENT
        for column in range(max(map(len, self.rows), default=0)):
            entries = [(y, row[column]) for y, row in zip(baselines, self.rows, strict=True) if column < len(row)]
            labels = [(y, label) for y, label in entries if label and label.text]
            width = max((label.width for _, label in labels), default=0.0)
            marks += [label.at(left + (width if label.anchor == "end" else 0), y) for y, label in labels]
            left += width + (20 if width else 0)
        right = Bounds.around(marks).right
        if self.rows:
            marks.append(Stroke.line(self.x, self.y + 11, right, self.y + 11, "rule"))
        if has_total:
            y = baselines[-1] - self._ROW + 6
            marks.append(Stroke.line(self.x + self.INDENT, y, right, y, "rule"))
        return self._swatches + marks
