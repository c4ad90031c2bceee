"""Element-wise computations in C: one loop over the entries of a row for all of those in a kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from unrolled.engine.native.memory import Memory
from unrolled.engine.native.schedule import Kernels
from unrolled.engine.native.text import c_type, index, literal, merged, nest
from unrolled.operations.nodes import Compute, Scalar, View, Write, contiguous
from unrolled.operations.operation import OPERATIONS


class EntryLoop:
    """Element-wise computations of one shape: what is done for each row, and a loop over its entries.

    Args:
        memory: the memory of nodes.
        kernels: the loop that they belong to.
        nodes: the computations, in order.

    Attributes:
        axes: the loops over a row's entries: how many there are, and the last of the dimensions that each goes over.
        reads: for each view that is read from memory the name of the variable that it is read into.
        made: for each computation the name of the variable that has its result.
        before: lines for each row.
        inside: lines for each entry.
    """

    def __init__(self, memory: Memory, kernels: Kernels, nodes: Sequence[Compute]) -> None:
        self.memory, self.kernels, self.nodes, self.dims = memory, kernels, nodes, nodes[0].dims
        read = (view for node in nodes for view in node.views if not self.kernels.in_register(view, node))
        views = dict.fromkeys(read)
        written = [node.target.strides for node in nodes if isinstance(node, Write)]
        read_at = [view.broadcast(self.dims).strides for view in views]
        self.axes = merged(self.dims, [contiguous(self.dims), *written, *read_at])
        self.reads = {view: f"a{number}" for number, view in enumerate(views)}
        self.made = {node: f"v{number}" for number, node in enumerate(nodes)}
        self.before: list[str] = []
        self.inside: list[str] = []

    def lines(self) -> Iterator[str]:
        """The C for one row."""
        for view, name in self.reads.items():
            self._read(view, name)
        for node in self.nodes:
            self._compute(node)
        totals = [(node, total) for node in self.nodes for total in self.kernels.sums.get(node, ())]
        sums = [f"sum{number}" for number in range(len(totals))]
        self.before += [f"real {name} = 0;" for name in sums]
        self.inside += [f"{name} += {self.made[node]};" for name, (node, _) in zip(sums, totals, strict=True)]
        yield from self.before
        yield from nest([n for n, _ in self.axes], self.inside, sums=sums)
        for name, (_, total) in zip(sums, totals, strict=True):
            yield f"{self.memory.pointer(total, written=True)}[b] = {name};"

    def _at(self, strides: Sequence[int]) -> str:
        return index([strides[dim] for _, dim in self.axes])

    def _read(self, view: View, name: str) -> None:
        kind, row, strides = c_type(view.node), self.memory.row_of(view), view.broadcast(self.dims).strides
        if not any(strides):
            self.before.append(f"const {kind} {name} = *({row});")
            return
        self.before.append(f"const {kind} *const {name}_at = {row};")
        self.inside.append(f"const {kind} {name} = {name}_at[{self._at(strides)}];")

    def _argument(self, argument: View | Scalar, node: Compute) -> str:
        if not isinstance(argument, View):
            return literal(argument, whole=node.whole_numbers)
        if self.kernels.in_register(argument, node):
            return self.made[argument.node]  # type: ignore[index]
        return self.reads[argument]

    def _compute(self, node: Compute) -> None:
        name, kind = self.made[node], c_type(node)
        arguments = [self._argument(argument, node) for argument in node.arguments]
        operation = OPERATIONS[node.name]
        expression = operation.integers if node.whole_numbers else operation.expression
        declined = self.memory.declined() if "{declined}" in expression else ""
        expression = expression.format(*arguments, type=kind, declined=declined)
        register = "int" if node.dtype == torch.bool else kind
        self.inside.append(f"const {register} {name} = {expression};")
        if isinstance(node, Write):
            target = node.target
        elif node in self.kernels.stored:
            target = View(node, self.dims, contiguous(self.dims))
        else:
            return
        self.before.append(f"{kind} *const {name}_to = {self.memory.row_of(target, written=True)};")
        self.inside.append(f"{name}_to[{self._at(target.strides)}] = ({kind}){name};")
