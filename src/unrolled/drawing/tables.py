"""The tables under the figure: what a copy meets, and what all copies share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from unrolled.drawing.figure import MARGIN, fitted
from unrolled.drawing.lettering import listed
from unrolled.drawing.marks import Box, Label, Mark, Stroke, around
from unrolled.drawing.sketch import ORIGINS, Leaf, Sketch

TOP = 412.0
"""The baseline of the tables' headings."""

MOST_ROWS = 12
"""How many rows of one kind are drawn; the text picture has them all."""

SIDE_BY_SIDE = 1020.0
"""How wide a figure may become by tables that stand next to each other."""

_FIRST, _ROW, _BETWEEN, _INDENT, _APART = 35.0, 25.0, 20.0, 20.0, 6.0
_TEXT, _CODE = Label(0, 0, "", 15), Label(0, 0, "", 14, "code")
_MUTED, _COUNT = replace(_TEXT, style="muted"), replace(_TEXT, anchor="end")

Row = list[Label | None]


def tables(sketch: Sketch, column: float) -> list[Mark]:
    """Both tables: side by side where that is not too wide, else one above the other.

    Args:
        sketch: what is drawn.
        column: where the second table begins if the first leaves room.
    """
    first = _flows(sketch, MARGIN, TOP)
    beside = _weights(sketch, max(column, around(first).right + 56), TOP)
    if around([*first, *beside]).right <= SIDE_BY_SIDE:
        return first + beside
    return first + _weights(sketch, MARGIN, around(first).bottom + 48)


def _flows(sketch: Sketch, x: float, y: float) -> list[Mark]:
    rows: list[Row] = []
    marks: list[Mark] = []
    for kind, leaves in sketch.flows:
        marks.append(Box(x, y + _FIRST + _ROW * len(rows) - 10, 10, 10, f"swatch {kind}", 3))
        rows += _leaf_rows(kind, leaves)
    marks += _table("At every step", rows, x, y)
    if not sketch.state:
        return marks
    last = around(marks).bottom
    return [*marks, _told(_MUTED, f"Initial state: {ORIGINS[sketch.origin]}", 400).at(x + _INDENT, last + 22)]


def _leaf_rows(kind: str, leaves: Sequence[Leaf]) -> list[Row]:
    rows: list[Row] = [
        [
            replace(_TEXT, text=kind) if n == 0 else None,
            _told(_CODE, leaf.name, 260),
            _told(_CODE, listed(leaf.shape), 220),
            _told(_MUTED, leaf.dtype, 90),
        ]
        for n, leaf in enumerate(leaves[:MOST_ROWS])
    ]
    left_out = len(leaves) - MOST_ROWS
    return [*rows, [None, _told(_MUTED, f"… {left_out:,} more", 150)]] if left_out > 0 else rows


def _weights(sketch: Sketch, x: float, y: float) -> list[Mark]:
    if not sketch.parameters:
        return []
    rows: list[Row] = [
        [
            _told(_CODE, parameter.name, 300),
            _told(_CODE, listed(parameter.shape), 220),
            _told(_COUNT, f"{parameter.count:,}", 120),
            _told(_MUTED, parameter.remark, 240),
        ]
        for parameter in sketch.parameters[:MOST_ROWS]
    ]
    left_out = len(sketch.parameters) - MOST_ROWS
    if left_out > 0:
        rows.append([_told(_MUTED, f"… {left_out:,} more", 220)])
    rows.append([_told(_TEXT, "total", 220), None, _told(_COUNT, f"{sketch.count:,}", 120)])
    marks = _table("Weights", rows, x, y, total=True)
    return [Box(x, y + _FIRST - 10, 10, 10, "swatch weights", 3), *marks]


def _told(label: Label, text: str, room: float) -> Label:
    return fitted(text, room, label, middle=label.style == "code")


def _table(heading: str, rows: Sequence[Row], x: float, y: float, *, total: bool = False) -> list[Mark]:
    """Rows under a heading and a rule; a column is as wide as its widest entry. A total is set off by a rule."""
    marks: list[Mark] = [Label(x, y, heading, 15, "strong")]
    baselines = [y + _FIRST + _ROW * n for n in range(len(rows))]
    if total:
        baselines[-1] += _APART
    left = x + _INDENT
    for column in range(max(map(len, rows), default=0)):
        entries = [(baseline, row[column]) for baseline, row in zip(baselines, rows, strict=True) if column < len(row)]
        placed = [(baseline, label) for baseline, label in entries if label and label.text]
        width = max((label.width for _, label in placed), default=0.0)
        marks += [label.at(left + (label.anchor == "end") * width, baseline) for baseline, label in placed]
        left += width + (_BETWEEN if width else 0)
    right = around(marks).right
    if rows:
        marks.append(Stroke.line(x, y + 11, right, y + 11, "rule"))
    if total:
        rule = baselines[-1] - _ROW + _APART
        marks.append(Stroke.line(x + _INDENT, rule, right, rule, "rule"))
    return marks
