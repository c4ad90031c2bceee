"""Lowering: a loop's program as nodes and views, operation by operation."""

from __future__ import annotations

import torch

from unrolled.operations.elementwise import Arithmetic
from unrolled.operations.joins import Constants, Joins
from unrolled.operations.layout import Layout, UnsupportedError
from unrolled.operations.nodes import Input, Lowered, Node, View
from unrolled.operations.operation import operation_of
from unrolled.operations.products import Products
from unrolled.plan.loops import LoopProgram
from unrolled.recording.program import Op


def state_buffers(loop: LoopProgram) -> list[int]:
    """For each state the number of its buffer: that of the emitted value that becomes the next state.

    A second state that the same value replaces has a buffer of its own, after all that is emitted, since it does not
    begin as the first one does.
    """
    buffers: list[int] = []
    count = len(loop.emitted)
    for value in loop.next_states:
        buffer = loop.emitted.index(value)
        if buffer in buffers:
            buffer, count = count, count + 1
        buffers.append(buffer)
    return buffers


def lower(loop: LoopProgram) -> Lowered:
    """Lower a loop.

    Raises:
        UnsupportedError: naming the first operation, dtype or shape that this engine does not emit.
    """
    lowering = _Lowering(loop)
    for op in loop.program.ops:
        lowering.run(op)
    views = lowering.views
    for value in loop.emitted:
        known = loop.program.values[value]
        layout = Layout.of(known)
        if layout.place is None or (views[value].dtype, views[value].dims) != (known.dtype, layout.dims):
            raise UnsupportedError(f"to keep a {known} of every step")
    if not all(Layout.of(loop.program.values[value]).first for value in (*loop.states, *loop.next_states)):
        raise UnsupportedError("a state whose batch is not its first dimension")
    totals = [lowering.in_memory(views[v]) for v, _ in loop.totals]
    emitted, next_states = [views[v] for v in loop.emitted], [views[v] for v in loop.next_states]
    buffers = zip(next_states, state_buffers(loop), strict=True)
    emitted += [view for view, number in buffers if number >= len(loop.emitted)]
    return Lowered(lowering.nodes, emitted, next_states, totals, lowering.real)


class _Lowering(Arithmetic, Joins, Products, Constants):
    def __init__(self, loop: LoopProgram) -> None:
        self.values = loop.program.values
        self.nodes: list[Node] = []
        self.views: dict[int, View] = {}
        floats = {self.values[v].dtype for v in loop.program.inputs if self.values[v].dtype.is_floating_point}
        if len(floats) != 1 or not floats <= {torch.float32, torch.float64}:
            raise UnsupportedError(f"values of {', '.join(sorted(map(str, floats))) or 'no floating dtype'}")
        (self.real,) = floats
        for kind, group in (("sequence", loop.sequences), ("fixed", loop.fixed), ("state", loop.states)):
            for position, value in enumerate(group):
                self._input(kind, position, value)

    def _input(self, kind: str, position: int, value: int) -> None:
        known = self.values[value]
        layout = Layout.of(known)
        if layout.place is None and kind != "fixed":
            raise UnsupportedError(f"a {kind} without a batch, {known}")
        node = Input(layout.dims, self.checked(known.dtype), kind, position, layout.place is not None)
        self.views[value] = self.add(node)

    def run(self, op: Op) -> None:
        operation = operation_of(op)
        if operation.lower is not None:
            results = operation.lower(self, op)
        elif operation.expression:
            results = [self.elementwise(op, op.base)]
        else:
            raise UnsupportedError(op.name.removeprefix("aten."))
        for value, view in zip(op.outputs, results, strict=False):
            if value >= 0:
                self.views[value] = view
