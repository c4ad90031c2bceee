"""The inside of a cell: its recorded operations as a graph, each in the colour of the place where it runs."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from unrolled.drawing.layered import placed
from unrolled.drawing.lettering import extent, printable, shortened
from unrolled.plan.report import PLACES, PlannedOperation

MOST_OPERATIONS = 160
"""Of a step with more than so many a graph can no longer be read."""

_SIZE, _HEIGHT, _MARGIN, _LETTERS = 12.0, 22.0, 10.0, 22
_COLOURS = dict(zip(PLACES, ("#e69f00", "#56b4e9", "#d55e00", "#009e73"), strict=True))
_STYLE = (
    ".inside text{font:12px system-ui,Helvetica,Arial,sans-serif;fill:#111}"
    ".inside .given text,.inside .result text{font-style:italic;fill:#59636e}"
    ".inside .given rect,.inside .result rect{fill:none;stroke:#9aa5b1}"
    ".inside .edge{fill:none;stroke:#9aa5b1;stroke-width:1.2}.inside .edge.through{stroke:#d55e00}"
    + "".join(f".inside .{place} rect{{fill:{colour}}}" for place, colour in _COLOURS.items())
)


def inside(name: str, operations: Sequence[PlannedOperation], results: Sequence[tuple[str, int | str]]) -> str:
    """The graph as SVG: what a step is given on the left, what it hands out on the right.

    Args:
        name: the cell's name.
        operations: those of the step, in order, at most `MOST_OPERATIONS`.
        results: what leaves the step: its name, and the operation that made it or the tensor that it is.
    """
    read = [source for operation in operations for source in operation.reads] + [source for _, source in results]
    given = list(dict.fromkeys(source for source in read if isinstance(source, str)))
    at: dict[int | str, int] = {source: n for n, source in enumerate(given)}
    at |= {number: len(given) + number for number in range(len(operations))}
    ends = range(len(given) + len(operations), len(given) + len(operations) + len(results))
    edges = [(at[source], at[n]) for n, operation in enumerate(operations) for source in dict.fromkeys(operation.reads)]
    edges += [(at[source], end) for end, (_, source) in zip(ends, results, strict=True)]
    names = [*given, *(_short(operation.name) for operation in operations), *(result for result, _ in results)]
    kinds = ["given"] * len(given) + [operation.place for operation in operations] + ["result"] * len(results)
    letters = [shortened(printable(text), _LETTERS, middle=True) for text in names]
    drawn = placed([extent(text, _SIZE) + 14 for text in letters], edges, ends)
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "inside", "role": "img"})
    width, height = drawn.width + 2 * _MARGIN, drawn.height + 2 * _MARGIN
    root.attrib |= {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}"}
    ET.SubElement(root, "title").text = f"the operations of one step of {printable(name)}"
    ET.SubElement(root, "style").text = _STYLE
    for (a, b), points in zip(edges, drawn.edges, strict=True):
        kind = "through" if kinds[a] == "through" and kinds[b] in ("through", "result") else "plain"
        ET.SubElement(
            root, "path", {"class": f"edge {kind}", "d": _curve(points), "data-from": f"{a}", "data-to": f"{b}"}
        )
    for n, ((x, y), text) in enumerate(zip(drawn.nodes, letters, strict=True)):
        number = n - len(given)
        whole = _told(operations[number]) if 0 <= number < len(operations) else printable(names[n])
        _node(root, (x + _MARGIN, y + _MARGIN), text, kinds[n], whole, n, number)
    return ET.tostring(root, encoding="unicode")


def _node(root: ET.Element, at: tuple[float, float], text: str, kind: str, whole: str, node: int, number: int) -> None:
    x, y = at
    group = ET.SubElement(root, "g", {"class": f"node {kind}", "data-node": str(node)})
    if kind in PLACES:
        group.set("data-operation", str(number))
    ET.SubElement(group, "title").text = whole
    width = extent(text, _SIZE) + 14
    box = {"x": x, "y": y - _HEIGHT / 2, "width": width, "height": _HEIGHT, "rx": 5}
    ET.SubElement(group, "rect", {key: f"{value:g}" for key, value in box.items()})
    letters = ET.SubElement(group, "text", {"x": f"{x + width / 2:g}", "y": f"{y + 4:g}", "text-anchor": "middle"})
    letters.text = text


def _short(name: str) -> str:
    return name.removeprefix("aten.").partition(".")[0].strip("_")


def _told(operation: PlannedOperation) -> str:
    return f"{operation.name}: {operation.result}, {operation.place}: {operation.reason}"


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """Level through each column, and an S from one to the next."""
    moved = [(x + _MARGIN, y + _MARGIN) for x, y in points]
    path = f"M{moved[0][0]:.1f} {moved[0][1]:.1f}"
    for n, (x, y) in enumerate(moved[1:]):
        before_x, before_y = moved[n]
        middle = (before_x + x) / 2
        path += f"L{x:.1f} {y:.1f}" if n % 2 else f"C{middle:.1f} {before_y:.1f} {middle:.1f} {y:.1f} {x:.1f} {y:.1f}"
    return path
