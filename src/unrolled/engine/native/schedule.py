"""Scheduling: which nodes are computed together in one pass over a row, and which of them need memory.

A kernel is a product, a reduction, an access to computed places, or all element-wise computations of one shape at one
level. A computation may be used by another of the same kernel without being stored, if that reads it entry by entry;
its sum over the row is added up on the way. Levels are taken as late as possible, so that what is computed is used
while it is at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from unrolled.operations.nodes import (
    Compute,
    Convolution,
    Find,
    Input,
    Join,
    Lowered,
    MatrixProduct,
    Node,
    Product,
    Put,
    Reduce,
    Scan,
    Take,
    View,
    Write,
)

MOST_COMPUTATIONS = 48
"""In one kernel: the compiler's time for one of twice the length is more than twice as long."""

_ALONE = Product | Convolution | MatrixProduct | Reduce | Take | Put | Find


class Kernels:
    """A lowered loop in the order in which it is run.

    Emitted views that are no node's whole memory become computations of their own first.

    Attributes:
        order: for each kernel its nodes: one that is alone in it, or computations of one shape.
        stored: for each node that needs memory the number of the buffer that it is, or None for scratch memory.
        sums: sums over a whole row, added up while it is computed: by what they are sums of.
    """

    def __init__(self, lowered: Lowered) -> None:
        self.stored: dict[Node, int | None] = {**_emitted(lowered)}
        wanted = [view.node for view in (*lowered.next_states, *lowered.totals)]
        self._nodes = _needed(lowered.nodes, [*self.stored, *wanted])
        self._levels: dict[Node, int] = {}
        self._set_levels()
        self.order = self._ordered()
        self._kernel = {node: number for number, nodes in enumerate(self.order) for node in nodes}
        summed = [view.node for view in lowered.totals if not isinstance(view.node, Input)]
        for node in [*summed, *self._read_from_memory()]:
            self.stored.setdefault(node, None)
        self.sums: dict[Node, list[Reduce]] = {}
        for node in self._nodes:
            if isinstance(node, Reduce) and _added_on_the_way(node):
                self.sums.setdefault(node.source.node, []).append(node)

    def in_register(self, view: View, reader: Node) -> bool:
        """Whether a reader takes a value out of a register, since the same kernel has just computed it."""
        return _entry_by_entry(view, reader) and self._kernel[view.node] == self._kernel[reader]

    def _set_levels(self) -> None:
        """As early as operands allow; for computations then as late as readers allow."""
        levels = self._levels
        for node in self._nodes:
            if isinstance(node, Join):
                levels[node] = max(levels[piece] for piece in node.pieces)
            elif isinstance(node, Input):
                levels[node] = 0
            else:
                levels[node] = max([1, *(levels[view.node] + _levels_between(view, node) for view in node.views)])
        latest: dict[Node, int] = {}
        for node in reversed(self._nodes):
            if type(node) is Compute and node in latest:
                levels[node] = max(levels[node], latest[node])
            for view in node.views:
                bound = levels[node] - _levels_between(view, node)
                latest[view.node] = min(latest.get(view.node, bound), bound)

    def _ordered(self) -> list[list[Node]]:
        kernels: dict[tuple[object, ...], list[Node]] = {}
        for node in self._nodes:
            if _added_on_the_way(node):
                continue
            if isinstance(node, _ALONE):
                kernels[self._levels[node], 0, id(node)] = [node]
            elif isinstance(node, Compute):
                kernels.setdefault((self._levels[node], 1, node.dims), []).append(node)
        ordered = [kernels[key] for key in sorted(kernels, key=lambda key: key[:2])]
        many = MOST_COMPUTATIONS
        return [nodes[start : start + many] for nodes in ordered for start in range(0, len(nodes), many)]

    def _read_from_memory(self) -> Iterator[Node]:
        """Nodes whose entries others read out of memory."""
        for node in self._nodes:
            if isinstance(node, _ALONE | Join):
                yield node
            for view in () if _added_on_the_way(node) else node.views:
                if isinstance(view.node, Compute) and not self.in_register(view, node):
                    yield view.node


def _entry_by_entry(view: View, reader: Node) -> bool:
    """Whether entry i of a computation reads entry i of another one."""
    node = view.node
    return type(node) is Compute and isinstance(reader, Compute) and view.whole and node.dims == reader.dims


def _levels_between(view: View, reader: Node) -> int:
    """How many levels a reader must be after what it reads: none, if they can be in one kernel."""
    return 0 if _entry_by_entry(view, reader) else 1


def _added_on_the_way(node: Node) -> bool:
    """Whether a node is the sum over a whole row of an element-wise computation."""
    if not isinstance(node, Reduce) or isinstance(node, Scan) or node.name != "sum" or node.size != 1:
        return False
    if not node.dtype.is_floating_point:
        return False
    source = node.source.node
    return node.source.whole and type(source) is Compute and source.dtype == node.dtype


def _emitted(lowered: Lowered) -> dict[Node, int]:
    """The nodes whose memory is a buffer, and which."""
    found: dict[Node, int] = {}
    for number, view in enumerate(lowered.emitted):
        node = view.node
        if isinstance(node, Input) or not view.whole or node in found:
            node = Compute(view.dims, view.dtype, "same", (view,))
            lowered.nodes.append(node)
        found[node] = number
    return found


def _needed(nodes: Sequence[Node], wanted: Sequence[Node]) -> list[Node]:
    """The nodes that the wanted ones depend on, these included."""
    needed = set(wanted)
    kept = []
    for node in reversed(nodes):
        if node in needed or (isinstance(node, Write) and node.target.node in needed):
            needed.update(view.node for view in node.views)
            if isinstance(node, Join):
                needed.update(node.pieces)
            kept.append(node)
    return list(reversed(kept))
