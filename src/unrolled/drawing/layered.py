"""Where the nodes of a graph without cycles are drawn: in columns, from what is read to what is made of it.

Source: K. Sugiyama, S. Tagawa and M. Toda, "Methods for visual understanding of hierarchical system structures", IEEE
Trans. SMC 11 (1981): layers, an order within each that crosses few edges, then places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

_SWEEPS = 12
_ROW, _SLIM = 32.0, 12.0
"""How much height a node takes, and an edge that passes its column."""
_GAP = 34.0
"""Between columns."""


@dataclass(frozen=True)
class Placed:
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


@dataclass
class _Graph:
    """Nodes and, after them, one stand-in for each column that an edge passes.

    Attributes:
        column: of each node or stand-in.
        widths: likewise.
        heights: likewise.
        chains: for each edge the nodes and stand-ins that it goes through.
        y: where the middle of each is.
    """

    column: list[int]
    widths: list[float]
    heights: list[float]
    chains: list[list[int]] = field(default_factory=list)
    y: list[float] = field(default_factory=list)


def placed(widths: Sequence[float], edges: Sequence[tuple[int, int]], last: Sequence[int] = ()) -> Placed:
    """Place the nodes of a graph.

    Args:
        widths: how wide each node is.
        edges: pairs of nodes, from and to; a node comes after all that lead to it.
        last: nodes that all stand in the last column.

    Example:
        >>> placed([10, 10, 20], [(0, 2), (1, 2)]).nodes
        ((0.0, 16.0), (0.0, 48.0), (44.0, 32.0))
    """
    graph = _with_stand_ins(widths, edges, _columns(len(widths), edges, last))
    columns = [[n for n, at in enumerate(graph.column) if at == c] for c in range(max(graph.column) + 1)]
    before, after = _neighbours(graph)
    graph.y = [0.0] * len(graph.column)
    for column in columns:
        _spread(graph, column, [0.0] * len(column))
    for sweep in range(_SWEEPS):
        for column, beside in [(c, before) for c in columns] + [(c, after) for c in reversed(columns)]:
            wanted = [_mean([graph.y[m] for m in beside[n]], graph.y[n]) for n in column]
            if sweep < _SWEEPS - 2:  # the last sweeps straighten what the others have put in order
                pairs = sorted(zip(wanted, column, strict=True), key=lambda pair: pair[0])
                wanted, column[:] = [y for y, _ in pairs], [n for _, n in pairs]
            _spread(graph, column, wanted)
    return _drawn(graph, columns, len(widths))


def _columns(count: int, edges: Sequence[tuple[int, int]], last: Sequence[int]) -> list[int]:
    """As far from the first column as the longest way there; what nothing leads to stands next to who reads it."""
    column = [0] * count
    for a, b in sorted(edges, key=lambda edge: edge[1]):
        column[b] = max(column[b], column[a] + 1)
    for n in set(range(count)) - {b for _, b in edges}:
        column[n] = max(min((column[b] for a, b in edges if a == n), default=1) - 1, 0)
    end = max([max(column), *(column[a] + 1 for a, b in edges if b in last)])
    return [end if n in last else at for n, at in enumerate(column)]


def _with_stand_ins(widths: Sequence[float], edges: Sequence[tuple[int, int]], column: list[int]) -> _Graph:
    graph = _Graph(list(column), list(widths), [_ROW] * len(widths))
    for a, b in edges:
        passed = range(column[a] + 1, column[b])
        first = len(graph.column)
        graph.column += passed
        graph.widths += [0.0] * len(passed)
        graph.heights += [_SLIM] * len(passed)
        graph.chains.append([a, *range(first, first + len(passed)), b])
    return graph


def _neighbours(graph: _Graph) -> tuple[list[list[int]], list[list[int]]]:
    before, after = ([list[int]() for _ in graph.column] for _ in range(2))
    for chain in graph.chains:
        for a, b in pairwise(chain):
            after[a].append(b)
            before[b].append(a)
    return before, after


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _spread(graph: _Graph, column: Sequence[int], wanted: Sequence[float]) -> None:
    """Put a column's nodes where they want to be, in their order: blocks that meet move as one."""
    blocks: list[tuple[float, float, list[int]]] = []  # the top that is wanted, the height, the nodes
    for n, y in zip(column, wanted, strict=True):
        top, height, nodes = y - graph.heights[n] / 2, graph.heights[n], [n]
        while blocks and blocks[-1][0] + blocks[-1][1] > top:
            above, tall, others = blocks.pop()
            many, few = len(others), len(nodes)
            top = (above * many + (top - tall) * few) / (many + few)
            height, nodes = tall + height, others + nodes
        blocks.append((top, height, nodes))
    for top, _, nodes in blocks:
        for n in nodes:
            graph.y[n] = top + graph.heights[n] / 2
            top += graph.heights[n]


def _drawn(graph: _Graph, columns: Sequence[Sequence[int]], count: int) -> Placed:
    top = min(y - h / 2 for y, h in zip(graph.y, graph.heights, strict=True))
    height = max(y + h / 2 for y, h in zip(graph.y, graph.heights, strict=True)) - top
    lefts, wide, x = list[float](), list[float](), 0.0
    for column in columns:
        wide.append(max(graph.widths[n] for n in column))
        lefts.append(x)
        x += wide[-1] + _GAP

    def left(n: int) -> float:
        c = graph.column[n]
        return lefts[c] + (wide[c] - graph.widths[n]) / 2 if n < count else lefts[c]

    def right(n: int) -> float:
        return left(n) + (graph.widths[n] if n < count else wide[graph.column[n]])

    ways = tuple(
        tuple(
            point
            for k, n in enumerate(chain)
            for point in ((left(n), graph.y[n] - top), (right(n), graph.y[n] - top))
            if not (k == 0 and point[0] == left(n)) and not (k == len(chain) - 1 and point[0] == right(n))
        )
        for chain in graph.chains
    )
    return Placed(x - _GAP, height, tuple((left(n), graph.y[n] - top) for n in range(count)), ways)
