"""A sketch as text: at most 80 columns of box-drawing characters, or of ASCII where those cannot be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unrolled.drawing.lettering import columns, printable, shortened
from unrolled.drawing.sketch import Sketch

_WIDTH = 80


def text(*sketches: Sketch, ascii: bool = False) -> str:
    """The picture as lines of text.

    Args:
        sketches: what is to be drawn, one below the other.
        ascii: whether to do without box-drawing characters and other letters than ASCII's.
    """
    picture = "\n\n".join(str(_TextPicture(sketch, ascii)) for sketch in sketches)
    return picture.translate(str.maketrans("┌┐└┘├┤┬┴│─→←↑", "++++++++|-><^")) if ascii else picture


@dataclass(frozen=True)
class _TextPicture:
    """One network as text, in Unicode or in ASCII."""

    sketch: Sketch
    ascii: bool

    def __str__(self) -> str:
        blocks = [self._heading(), self._rolled_cell(), self._copies(), self._tensors(), self._weights()]
        return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks if block) + "\n"

    @property
    def _ellipsis(self) -> str:
        return "..." if self.ascii else "…"

    def _printable(self, name: str) -> str:
        if self.ascii:
            return printable(name.encode("ascii", "backslashreplace").decode()).replace("�", "?")
        return printable(name)

    def _shortened(self, name: str, room: int) -> str:
        return shortened(self._printable(name), room, middle=True, mark=self._ellipsis)

    def _heading(self) -> list[str]:
        """The title, in full however long it is, and the dimensions."""
        lines = [""]
        for character in self._printable(self.sketch.title):
            if columns(lines[-1] + character) > _WIDTH:
                lines.append("")
            lines[-1] += character
        return [*lines, self.sketch.dimensions]

    def _rolled_cell(self) -> list[str]:
        """The cell once, with a loop for its state."""
        name = shortened(self._printable(self.sketch.cell), 40, mark=self._ellipsis)
        top, middle, bottom = self._box(name)
        wall, indent = "│" + " " * (len(top) - 2), " " * (len(top) // 2)
        loop = ("├───┐", "│   │  " + ", ".join(self.sketch.state_symbols), "│←──┘")
        leaves, crossing, returns = loop if self.sketch.state else "│││"
        box = [top, wall + leaves, middle[:-1] + crossing, wall + returns, bottom]
        above = [f"{indent}  o[t]", f"{indent}   ↑"] if self.sketch.output else []
        return [*above, *(f"   {line}" for line in box), f"{indent}   ↑", f"{indent}  x[t]"]

    def _box(self, name: str) -> list[str]:
        """A cell, its name in the centre, its output leaving at the top and its input coming in at the bottom."""
        inner = columns(name) + 2
        inner += 1 - inner % 2  # an odd width has a middle
        side = "─" * (inner // 2)
        top = "┴" if self.sketch.output else "─"
        return [f"┌{side}{top}{side}┐", f"│{_padded(name, inner, 'centre')}│", f"└{side}┬{side}┘"]

    def _copies(self) -> list[str]:
        """As many copies as there is room for."""
        for most in (6, 5, 4, 3, 2):
            rows = self._chain(most, with_labels=True)
            if max(map(columns, rows)) <= _WIDTH:
                return rows
        return self._chain(2, with_labels=False)

    def _chain(self, most: int, *, with_labels: bool) -> list[str]:
        """Copies next to each other: each part of the chain is seven lines of one width."""
        T, shown = self.sketch.T, self.sketch.shown_copies(most)
        parts = [self._state_arrow(0, with_labels=with_labels)]
        for n, following in zip(shown, [*shown[1:], T], strict=True):
            if n is None:
                omission = f" {self._ellipsis} {T - len(shown) + 1:,} more {self._ellipsis} "
                parts.append(_centred(["", "", "", omission, "", "", ""]))
            else:
                parts.append(self._copy(self.sketch.time(n)))
            received = following or 0 if n is None else n + 1
            parts.append(self._state_arrow(received, with_labels=with_labels))
        rows = ("".join(pieces) for pieces in zip(*parts, strict=True))
        return [row for row in rows if row.strip()]

    def _copy(self, t: int) -> list[str]:
        above = [f"o{t}", "↑"] if self.sketch.output else ["", ""]
        return _centred([*above, *self._box(str(t)), "↑", f"x{t}"])

    def _state_arrow(self, n: int, *, with_labels: bool) -> list[str]:
        """The state that copy number n receives; a second name stands under the arrow."""
        if not self.sketch.state:
            return [" "] * 7
        names = self.sketch.state_symbols if with_labels else ()
        labels = [f" {name}{self.sketch.state_time(n)} " for name in names]
        above, below = [*labels, "", ""][:2]
        arrow = "─" * (max([3, *map(columns, labels)]) - 1) + "→"
        return _centred(["", "", above, arrow, below, "", ""])

    def _tensors(self) -> list[str]:
        rows = [
            ["" if n else kind, self._shortened(one.name, 28), self._shortened(str(list(one.shape)), 24), one.dtype]
            for kind, labels in self.sketch.tensors.items()
            for n, one in enumerate(labels)
        ]  # fmt: skip
        origin = [f"initial state: {self.sketch.initial_state}"] if self.sketch.state else []
        return [*_aligned(rows), *origin]

    def _weights(self) -> list[str]:
        parameters = self.sketch.parameters
        if not parameters:
            return [self.sketch.sharing]
        facts = [[self._shortened(str(list(p.shape)), 16), f"{p.count:,}", p.remark] for p in parameters]
        facts.append(["", f"{self.sketch.count:,}", ""])
        taken = sum(2 + max(map(len, column)) for column in zip(*facts, strict=True))
        names = [*(self._shortened(p.name, max(4, _WIDTH - 2 - taken)) for p in parameters), "total"]
        rows = [["", name, *others] for name, others in zip(names, facts, strict=True)]
        return [self.sketch.sharing, *_aligned(rows, numbers=3)]


def _padded(line: str, width: int, side: str = "left") -> str:
    """A line filled up to a width, its text on the left, on the right or in the centre."""
    room = width - columns(line)
    before = {"left": 0, "centre": room // 2, "right": room}[side]
    return " " * before + line + " " * (room - before)


def _centred(lines: Sequence[str]) -> list[str]:
    """Lines filled up to the width of the longest."""
    width = max(map(columns, lines))
    return [_padded(line, width, "centre") for line in lines]


def _aligned(rows: Sequence[Sequence[str]], numbers: int | None = None) -> list[str]:
    """Rows as columns two spaces apart, the column of numbers to the right."""
    aligned = list[list[str]]()
    for n, column in enumerate(zip(*rows, strict=True)):
        width = max(map(columns, column))
        aligned.append([_padded(entry, width, "right" if n == numbers else "left") for entry in column])
    return ["  ".join(row) for row in zip(*aligned, strict=True)]
