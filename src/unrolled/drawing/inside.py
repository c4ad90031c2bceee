"""The inside of a cell: its recorded operations as a graph, each in the colour of the place where it runs."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from unrolled.drawing.graph_layout import placed
from unrolled.drawing.lettering import printable, shortened, text_width
from unrolled.plan.report import PLACES, PlannedOperation

_STYLE = (
    ".inside text{font:12px system-ui,Helvetica,Arial,sans-serif;fill:#111}"
    ".inside .given text,.inside .result text{font-style:italic;fill:#59636e}"
    ".inside .given rect,.inside .result rect{fill:none;stroke:#9aa5b1}"
    ".inside .edge{fill:none;stroke:#9aa5b1;stroke-width:1.2}.inside .edge.through{stroke:#d55e00}"
) + "".join(
    f".inside .{place} rect{{fill:{colour}}}"
    for place, colour in zip(PLACES, ("#e69f00", "#56b4e9", "#d55e00", "#009e73"), strict=True)
)


def inside(name: str, operations: Sequence[PlannedOperation], results: Sequence[tuple[str, int | str]]) -> str:
    """The graph as SVG: what a step reads on the left, its results on the right.

    Args:
        name: the cell's name.
        operations: those of the step, in order.
        results: what leaves the step: its name, and the operation that made it or the tensor that it is.

    Returns:
        '' without operations, and for more than can be read in a graph.
    """
    return str(_StepGraph(name, operations, results)) if 0 < len(operations) <= 160 else ""


class _StepGraph:
    """A step's graph, its nodes numbered: first the tensors that it reads, then its operations, then its results."""

    _MARGIN, _FONT_SIZE = 10.0, 12.0

    def __init__(
        self, name: str, operations: Sequence[PlannedOperation], results: Sequence[tuple[str, int | str]]
    ) -> None:
        self.name = name
        read = [source for operation in operations for source in operation.reads] + [source for _, source in results]
        tensors = list(dict.fromkeys(source for source in read if isinstance(source, str)))
        names = [operation.name.removeprefix("aten.").partition(".")[0].strip("_") for operation in operations]
        outputs = [result for result, _ in results]
        texts = [*tensors, *names, *outputs]
        self.first = len(tensors)  # the first operation
        places = [operation.place for operation in operations]
        self.kinds = ["given"] * len(tensors) + places + ["result"] * len(results)
        self.labels = [shortened(printable(text), 22, middle=True) for text in texts]
        self.titles = [
            *map(printable, tensors),
            *(f"{one.name}: {one.result}, {one.place}: {one.reason}" for one in operations),
            *map(printable, outputs),
        ]
        at: dict[int | str, int] = {source: n for n, source in enumerate(tensors)}
        at |= {number: len(tensors) + number for number in range(len(operations))}
        ends = range(len(at), len(texts))
        self.edges = [
            (at[source], at[n]) for n, operation in enumerate(operations) for source in dict.fromkeys(operation.reads)
        ]
        self.edges += [(at[source], end) for end, (_, source) in zip(ends, results, strict=True)]
        self.widths = [text_width(label, self._FONT_SIZE) + 14 for label in self.labels]
        self.placed = placed(self.widths, self.edges, ends)

    def __str__(self) -> str:
        root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "inside", "role": "img"})
        width, height = self.placed.width + 2 * self._MARGIN, self.placed.height + 2 * self._MARGIN
        root.attrib |= {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}"}
        ET.SubElement(root, "title").text = f"the operations of one step of {printable(self.name)}"
        ET.SubElement(root, "style").text = _STYLE
        for (a, b), points in zip(self.edges, self.placed.edges, strict=True):
            passes_on = self.kinds[a] == "through" and self.kinds[b] in ("through", "result")
            shape = {"class": f"edge {'through' if passes_on else 'plain'}", "d": self._curve(points)}
            ET.SubElement(root, "path", shape | {"data-from": f"{a}", "data-to": f"{b}"})
        for node in range(len(self.labels)):
            self._add_node(root, node)
        return ET.tostring(root, encoding="unicode")

    def _add_node(self, root: ET.Element, node: int) -> None:
        kind, width, height = self.kinds[node], self.widths[node], 22.0
        x, y = (value + self._MARGIN for value in self.placed.nodes[node])
        group = ET.SubElement(root, "g", {"class": f"node {kind}", "data-node": str(node)})
        if kind in PLACES:
            group.set("data-operation", str(node - self.first))
        ET.SubElement(group, "title").text = self.titles[node]
        box = {"x": x, "y": y - height / 2, "width": width, "height": height, "rx": 5}
        ET.SubElement(group, "rect", {key: f"{value:g}" for key, value in box.items()})
        place = {"x": f"{x + width / 2:g}", "y": f"{y + 4:g}", "text-anchor": "middle"}
        ET.SubElement(group, "text", place).text = self.labels[node]

    def _curve(self, points: Sequence[tuple[float, float]]) -> str:
        """Level through each column, and an S from one to the next."""
        moved = [(x + self._MARGIN, y + self._MARGIN) for x, y in points]
        path = f"M{moved[0][0]:.1f} {moved[0][1]:.1f}"
        for n, (x, y) in enumerate(moved[1:]):
            from_x, from_y = moved[n]
            middle = (from_x + x) / 2
            path += f"L{x:.1f} {y:.1f}" if n % 2 else f"C{middle:.1f} {from_y:.1f} {middle:.1f} {y:.1f} {x:.1f} {y:.1f}"
        return path
