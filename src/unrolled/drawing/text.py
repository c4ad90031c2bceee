"""A sketch as text: at most 80 columns of box-drawing characters, or of ASCII where those cannot be shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from unrolled.drawing.lettering import ELLIPSIS, columns, listed, printable, shortened
from unrolled.drawing.sketch import ORIGINS, Leaf, Sketch, shown_copies

WIDTH = 80

_TO_ASCII = str.maketrans("┌┐└┘├┤┬┴│─→←↑", "++++++++|-><^")


def text(*sketches: Sketch, ascii: bool = False) -> str:
    """The picture as lines of text.

    Args:
        sketches: what is to be drawn, one below the other.
        ascii: whether to do without box-drawing characters and other letters than ASCII's.
    """
    drawn = "\n\n".join(_drawn(sketch, _Pen(ascii)) for sketch in sketches)
    return drawn.translate(_TO_ASCII) if ascii else drawn


def _drawn(sketch: Sketch, pen: _Pen) -> str:
    blocks = [
        _heading(sketch, pen),
        _rolled(sketch, pen),
        _unrolled(sketch, pen),
        _flows(sketch, pen),
        _weights(sketch, pen),
    ]
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks if block) + "\n"


@dataclass(frozen=True)
class _Pen:
    """How names are written: in full Unicode or in ASCII."""

    ascii: bool

    @property
    def mark(self) -> str:
        return "..." if self.ascii else ELLIPSIS

    def name(self, text: str) -> str:
        if self.ascii:
            text = text.encode("ascii", "backslashreplace").decode()
        return printable(text).replace("�", "?") if self.ascii else printable(text)

    def cut(self, text: str, room: int) -> str:
        return shortened(self.name(text), room, middle=True, mark=self.mark)


def _heading(sketch: Sketch, pen: _Pen) -> list[str]:
    return [*_wrapped(pen.name(sketch.title)), sketch.span]


def _wrapped(line: str) -> list[str]:
    """A name of any length, in full."""
    lines = [""]
    for character in line:
        if columns(lines[-1] + character) > WIDTH:
            lines.append("")
        lines[-1] += character
    return lines


def _padded(line: str, width: int, side: str = "left") -> str:
    """A line filled up to a width, its text on one side or in the centre."""
    room = width - columns(line)
    before = {"left": 0, "centre": room // 2, "right": room}[side]
    return " " * before + line + " " * (room - before)


def _rolled(sketch: Sketch, pen: _Pen) -> list[str]:
    name = shortened(pen.name(sketch.cell), 40, mark=pen.mark)
    inner = columns(name) + 2
    inner += 1 - inner % 2  # an odd width has a middle
    half = inner // 2
    state = "  " + ", ".join(sketch.state_symbols)
    leaves, returns = ("├───┐", "│←──┘") if sketch.state else ("│", "│")
    above = [" " * (half + 3) + "o[t]", " " * (half + 4) + "↑"] if sketch.output else []
    indented = partial(str.__add__, "   ")
    box = [
        f"┌{'─' * half}{'┴' if sketch.output else '─'}{'─' * half}┐",
        f"│{' ' * inner}{leaves}",
        f"│{_padded(name, inner, 'centre')}│" + (f"   │{state}" if sketch.state else ""),
        f"│{' ' * inner}{returns}",
        f"└{'─' * half}┬{'─' * half}┘",
    ]
    return [*above, *map(indented, box), " " * (half + 4) + "↑", " " * (half + 3) + "x[t]"]


def _unrolled(sketch: Sketch, pen: _Pen) -> list[str]:
    """The copies, as many as there is room for."""
    rows: list[str] = []
    for most, labelled in [(6, True), (5, True), (4, True), (3, True), (2, True), (2, False)]:
        rows = _chain(sketch, pen, shown_copies(sketch.T, most), labelled=labelled)
        if max(map(columns, rows)) <= WIDTH:
            break
    return rows


def _chain(sketch: Sketch, pen: _Pen, shown: Sequence[int | None], *, labelled: bool) -> list[str]:
    """The copies side by side: each part of the chain is seven lines of one width."""
    parts = [_handed(sketch, 0, labelled)]
    for n, following in zip(shown, [*shown[1:], sketch.T], strict=True):
        parts.append(_omission(sketch.T - len(shown) + 1, pen) if n is None else _copy(sketch, n))
        parts.append(_handed(sketch, following or 0 if n is None else n + 1, labelled))
    rows = ("".join(pieces) for pieces in zip(*parts, strict=True))
    return [row for row in rows if row.strip()]


def _copy(sketch: Sketch, n: int) -> list[str]:
    t = sketch.time(n)
    inner = len(str(t)) + 2
    inner += 1 - inner % 2
    half = inner // 2
    above = [f"o{t}", "↑"] if sketch.output else ["", ""]
    lines = [
        *(_padded(line, inner + 2, "centre") for line in above),
        f"┌{'─' * half}{'┴' if sketch.output else '─'}{'─' * half}┐",
        f"│{_padded(str(t), inner, 'centre')}│",
        f"└{'─' * half}┬{'─' * half}┘",
        _padded("↑", inner + 2, "centre"),
        _padded(f"x{t}", inner + 2, "centre"),
    ]
    return _even(lines)


def _handed(sketch: Sketch, n: int, labelled: bool) -> list[str]:
    if not sketch.state:
        return [" "] * 7
    names = sketch.state_symbols if labelled else ()
    labels = [f" {name}{sketch.handed(n)} " for name in names]
    width = max([3, *map(len, labels)])
    above, below = (_padded(line, width, "centre") for line in [*labels, "", ""][:2])
    return [" " * width] * 2 + [above, "─" * (width - 1) + "→", below] + [" " * width] * 2


def _omission(count: int, pen: _Pen) -> list[str]:
    return _even(["", "", "", f" {pen.mark} {count:,} more {pen.mark} ", "", "", ""])


def _even(lines: Sequence[str]) -> list[str]:
    width = max(map(columns, lines))
    return [_padded(line, width, "centre") for line in lines]


def _flows(sketch: Sketch, pen: _Pen) -> list[str]:
    rows = [["" if n else kind, *_told(leaf, pen)] for kind, leaves in sketch.flows for n, leaf in enumerate(leaves)]
    lines = _aligned(rows)
    return [*lines, f"initial state: {ORIGINS[sketch.origin]}"] if sketch.state else lines


def _told(leaf: Leaf, pen: _Pen) -> list[str]:
    return [pen.cut(leaf.name, 28), pen.cut(listed(leaf.shape), 24), leaf.dtype]


def _weights(sketch: Sketch, pen: _Pen) -> list[str]:
    if not sketch.parameters:
        return [sketch.sharing]
    facts = [[pen.cut(listed(p.shape), 16), f"{p.count:,}", p.remark] for p in sketch.parameters]
    facts.append(["", f"{sketch.count:,}", ""])
    taken = sum(2 + max(map(len, column)) for column in zip(*facts, strict=True))
    names = [*(pen.cut(p.name, max(4, WIDTH - 2 - taken)) for p in sketch.parameters), "total"]
    rows = [["", name, *told] for name, told in zip(names, facts, strict=True)]
    return [sketch.sharing, *_aligned(rows, numbers=3)]


def _aligned(rows: Sequence[Sequence[str]], numbers: int | None = None) -> list[str]:
    """Rows as columns two spaces apart, the column of numbers to the right."""
    widths = [max(map(columns, column)) for column in zip(*rows, strict=True)]
    sides = ["right" if column == numbers else "left" for column in range(len(widths))]
    return ["  ".join(_cells(row, widths, sides)) for row in rows]


def _cells(row: Sequence[str], widths: Sequence[int], sides: Sequence[str]) -> Iterable[str]:
    return (_padded(entry, width, side) for entry, width, side in zip(row, widths, sides, strict=True))
