"""Scheduling: which nodes are computed together in one pass over a row, and which of them need memory.

A kernel is a product, a reduction, or all element-wise computations of one shape at one level. A computation may be
used by another of the same kernel without being stored, if that reads it entry by entry; its sum over the row is added
up on the way. Levels are taken as late as possible, so that what is computed is used while it is at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unrolled.operations.nodes import Compute, Input, Join, Lowered, Node, Product, Reduce, Scan, View, Write


@dataclass
class Kernel:
    """Nodes that are computed in one pass: one product, one reduction, or computations of one shape."""

    nodes: list[Node]


@dataclass
class Scheduled:
    """A lowered loop in the order in which it is run.

    Attributes:
        kernels: in order.
        homes: for each node that needs memory the emitted tensor that it is, or None for scratch memory.
        levels: which level each node is on.
        sums: sums over a whole row, added up while it is computed: by what they are sums of.
    """

    kernels: list[Kernel]
    homes: dict[Node, int | None]
    levels: dict[Node, int]
    sums: dict[Node, list[Reduce]]


def local(view: View, reader: Node) -> bool:
    """Whether a reader in the same kernel can take the value out of a register."""
    node = view.node
    return (
        isinstance(reader, Compute)
        and isinstance(node, Compute)
        and not isinstance(node, Write)
        and view.whole
        and (node.dims == reader.dims)
    )


def schedule(lowered: Lowered) -> Scheduled:
    """Order a lowered loop; emitted views that are no node's whole memory become copies first."""
    homes = _emitted_homes(lowered)
    nodes = _alive(lowered.nodes, [*homes, *(view.node for view in (*lowered.next_states, *lowered.totals))])
    levels = _levels(nodes, homes)
    added = {view.node: None for view in lowered.totals if not isinstance(view.node, Input) and view.node not in homes}
    sums: dict[Node, list[Reduce]] = {}
    for node in nodes:
        if isinstance(node, Reduce) and _on_the_way(node):
            sums.setdefault(node.source.node, []).append(node)
    return Scheduled(_kernels(nodes, levels), homes | added | _scratch(nodes, levels, homes), levels, sums)


def _on_the_way(node: Node) -> bool:
    """Whether a node is the sum over a whole row of an element-wise computation."""
    if not isinstance(node, Reduce) or isinstance(node, Scan) or node.name != "sum" or node.size != 1:
        return False
    source = node.source.node
    return node.source.whole and type(source) is Compute and source.dtype == node.dtype


def _emitted_homes(lowered: Lowered) -> dict[Node, int | None]:
    homes: dict[Node, int | None] = {}
    for position, view in enumerate(lowered.emitted):
        node = view.node
        if isinstance(node, Input) or not view.whole or node in homes:
            node = Compute(view.dims, view.dtype, "same", (view,))
            lowered.nodes.append(node)
        homes[node] = position
    return homes


def _alive(nodes: Sequence[Node], wanted: Sequence[Node]) -> list[Node]:
    needed = set(wanted)
    kept = []
    for node in reversed(nodes):
        if node in needed or (isinstance(node, Write) and node.target.node in needed):
            needed.update(view.node for view in node.views)
            if isinstance(node, Join):
                needed.update(node.pieces)
            kept.append(node)
    return list(reversed(kept))


def _levels(nodes: Sequence[Node], homes: dict[Node, int | None]) -> dict[Node, int]:
    levels: dict[Node, int] = {}
    for node in nodes:
        if isinstance(node, Join):
            levels[node] = max(levels[piece] for piece in node.pieces)
            continue
        after = [_after(view, node, levels) for view in node.views]
        levels[node] = 0 if isinstance(node, Input) else max([1, *after])
    return _late(nodes, levels)


def _after(view: View, reader: Node, levels: dict[Node, int]) -> int:
    """The first level at which a reader can read a view."""
    if isinstance(view.node, Input):
        return 1
    return levels[view.node] + (0 if local(view, reader) else 1)


def _late(nodes: Sequence[Node], levels: dict[Node, int]) -> dict[Node, int]:
    """Move element-wise computations to the last level that their readers allow."""
    latest: dict[Node, int] = {}
    for node in reversed(nodes):
        if type(node) is Compute and node in latest:
            levels[node] = max(levels[node], latest[node])
        for view in node.views:
            bound = levels[node] - (0 if local(view, node) else 1)
            latest[view.node] = min(latest.get(view.node, bound), bound)
    return levels


def _kernels(nodes: Sequence[Node], levels: dict[Node, int]) -> list[Kernel]:
    groups: dict[tuple[object, ...], Kernel] = {}
    for node in nodes:
        if _on_the_way(node):
            continue
        if isinstance(node, Product | Reduce):
            groups[levels[node], 0, id(node)] = Kernel([node])
        elif isinstance(node, Compute):
            groups.setdefault((levels[node], 1, node.dims), Kernel([])).nodes.append(node)
    return [groups[key] for key in sorted(groups, key=lambda key: key[:2])]


def _scratch(nodes: Sequence[Node], levels: dict[Node, int], homes: dict[Node, int | None]) -> dict[Node, int | None]:
    """Nodes that others read out of memory, beside those that are emitted."""
    found: dict[Node, int | None] = {}
    for node in nodes:
        if isinstance(node, Product | Reduce | Join) and node not in homes:
            found[node] = None
        for view in () if _on_the_way(node) else node.views:
            apart = levels[view.node] != levels[node] or not local(view, node)
            if isinstance(view.node, Compute) and apart and view.node not in homes:
                found[view.node] = None
    return found
