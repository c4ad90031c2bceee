"""Where the nodes of a graph without cycles are drawn: in columns, from what is read to what is made of it.

Source: K. Sugiyama, S. Tagawa and M. Toda, "Methods for visual understanding of hierarchical system structures", IEEE
Trans. SMC 11 (1981): layers, an order within each that crosses few edges, then places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class PlacedGraph:
    """A drawn graph.

    Attributes:
        width: of the whole.
        height: of the whole.
        nodes: for each node the x of its left end and the y of its middle.
        edges: for each edge the points that it passes, two for each column.
    """

    width: float
    height: float
    nodes: tuple[tuple[float, float], ...]
    edges: tuple[tuple[tuple[float, float], ...], ...]


def placed(widths: Sequence[float], edges: Sequence[tuple[int, int]], last: Sequence[int] = ()) -> PlacedGraph:
    """Place the nodes of a graph.

    Args:
        widths: how wide each node is.
        edges: pairs of nodes, from and to; a node comes after all that lead to it.
        last: nodes that all stand in the last column.

    Example:
        >>> placed([10, 10, 20], [(0, 2), (1, 2)]).nodes
        ((0.0, 16.0), (0.0, 48.0), (44.0, 32.0))
    """
    return _ColumnGraph(widths, edges, _columns_of(len(widths), edges, last)).placed()


def _columns_of(count: int, edges: Sequence[tuple[int, int]], last: Sequence[int]) -> list[int]:
    """As far from the first column as the longest way there; what nothing leads to stands next to what reads it."""
    column = [0] * count
    for a, b in sorted(edges, key=lambda edge: edge[1]):
        column[b] = max(column[b], column[a] + 1)
    for n in set(range(count)) - {b for _, b in edges}:
        column[n] = max(min((column[b] for a, b in edges if a == n), default=1) - 1, 0)
    end = max([max(column), *(column[a] + 1 for a, b in edges if b in last)])
    return [end if n in last else at for n, at in enumerate(column)]


class _ColumnGraph:
    """A graph's nodes and, after them, one stand-in for each column that an edge passes.

    Attributes:
        count: how many nodes there are, without the stand-ins.
        column: of each node or stand-in.
        widths: likewise.
        heights: likewise.
        y: where the middle of each is.
        chains: for each edge the nodes and stand-ins that it goes through.
        columns: for each column what stands in it, from the top.
    """

    def __init__(self, widths: Sequence[float], edges: Sequence[tuple[int, int]], column: list[int]) -> None:
        self.count = len(widths)
        self.column, self.widths, self.heights = list(column), list(widths), [32.0] * len(widths)
        self.chains: list[list[int]] = []
        for a, b in edges:
            passed = range(column[a] + 1, column[b])
            first = len(self.column)
            self.column += passed
            self.widths += [0.0] * len(passed)
            self.heights += [12.0] * len(passed)  # an edge takes less room than a node
            self.chains.append([a, *range(first, first + len(passed)), b])
        self.y = [0.0] * len(self.column)
        self.columns = [[n for n, at in enumerate(self.column) if at == c] for c in range(max(self.column) + 1)]

    def placed(self) -> PlacedGraph:
        """Sweep over the columns in both directions, each node drawn to the middle of its neighbours."""
        for column in self.columns:
            self._spread(column, [0.0] * len(column))
        sources, readers = self._neighbours()
        sweeps = 12
        for sweep in range(sweeps):
            forwards = [(column, sources) for column in self.columns]
            for column, neighbours in forwards + [(column, readers) for column in reversed(self.columns)]:
                wanted = [self._mean_y(neighbours[n], self.y[n]) for n in column]
                if sweep < sweeps - 2:  # the last sweeps straighten what the others have put in order
                    pairs = sorted(zip(wanted, column, strict=True), key=lambda pair: pair[0])
                    wanted, column[:] = [y for y, _ in pairs], [n for _, n in pairs]
                self._spread(column, wanted)
        return self._with_points()

    def _neighbours(self) -> tuple[list[list[int]], list[list[int]]]:
        """For each node or stand-in what leads to it, and what it leads to."""
        sources, readers = ([list[int]() for _ in self.column] for _ in range(2))
        for chain in self.chains:
            for a, b in pairwise(chain):
                readers[a].append(b)
                sources[b].append(a)
        return sources, readers

    def _mean_y(self, nodes: Sequence[int], default: float) -> float:
        return sum(self.y[n] for n in nodes) / len(nodes) if nodes else default

    def _spread(self, column: Sequence[int], wanted: Sequence[float]) -> None:
        """Put a column's nodes where they want to be, in their order: blocks that meet move as one."""
        blocks: list[tuple[float, float, list[int]]] = []  # the top that is wanted, the height, the nodes
        for n, y in zip(column, wanted, strict=True):
            top, height, nodes = y - self.heights[n] / 2, self.heights[n], [n]
            while blocks and blocks[-1][0] + blocks[-1][1] > top:
                above, tall, others = blocks.pop()
                many, few = len(others), len(nodes)
                top = (above * many + (top - tall) * few) / (many + few)
                height, nodes = tall + height, others + nodes
            blocks.append((top, height, nodes))
        for top, _, nodes in blocks:
            for n in nodes:
                self.y[n] = top + self.heights[n] / 2
                top += self.heights[n]

    def _with_points(self) -> PlacedGraph:
        """The graph as it is drawn: columns next to each other, a node in the middle of its column."""
        gap = 34.0
        top = min(y - h / 2 for y, h in zip(self.y, self.heights, strict=True))
        height = max(y + h / 2 for y, h in zip(self.y, self.heights, strict=True)) - top
        ends, x = [(0.0, 0.0)] * len(self.column), 0.0
        for column in self.columns:
            wide = max(self.widths[n] for n in column)
            for n in column:
                left = x + (wide - self.widths[n]) / 2
                # A stand-in is as wide as its column: edges are level there.
                ends[n] = (left, left + self.widths[n]) if n < self.count else (x, x + wide)
            x += wide + gap
        points = [((left, y - top), (right, y - top)) for (left, right), y in zip(ends, self.y, strict=True)]
        edges = tuple(
            (points[a][1], *(point for n in passed for point in points[n]), points[b][0])
            for a, *passed, b in self.chains
        )
        return PlacedGraph(x - gap, height, tuple(left for left, _ in points[: self.count]), edges)
