"""Lowering: a loop's program as nodes and views, operation by operation."""

from __future__ import annotations

import torch

from unrolled.engine.native.nodes import Leaf, Lowered, Node, UnsupportedError, View, without_rows
from unrolled.engine.native.row_rules import ConstantRules, JoinRules, ProductRules, ReductionRules
from unrolled.engine.native.scalars import ELEMENTWISE
from unrolled.engine.native.view_rules import ViewRules
from unrolled.plan.loops import LoopProgram
from unrolled.plan.program import Op

__all__ = ["lower"]


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
        rows, dims = without_rows(loop.program.values[value])
        if not rows or (views[value].dtype, views[value].dims) != (loop.program.values[value].dtype, dims):
            raise UnsupportedError(f"to keep a {loop.program.values[value]} of every step")
    totals = [lowering.in_memory(views[v]) for v, _ in loop.totals]
    emitted, following = [views[v] for v in loop.emitted], [views[v] for v in loop.next_states]
    return Lowered(lowering.nodes, emitted, following, totals, lowering.real)


class _Lowering(ViewRules, JoinRules, ProductRules, ReductionRules, ConstantRules):
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
                self.leaf(kind, position, value)

    def leaf(self, kind: str, position: int, value: int) -> None:
        known = self.values[value]
        rows, dims = without_rows(known)
        if not rows and kind != "fixed":
            raise UnsupportedError(f"a {kind} without a batch, {known}")
        self.views[value] = self.add(Leaf(dims, self.checked(known.dtype), kind, position, rows))

    def run(self, op: Op) -> None:
        name = op.name.removeprefix("aten.")
        base = name.partition(".")[0]
        rule = getattr(self, f"do_{base.strip('_')}", None)
        if rule is not None:
            results = rule(op)
        elif base in ELEMENTWISE:
            results = [self.elementwise(op, base)]
        else:
            raise UnsupportedError(name)
        for value, view in zip(op.outputs, results, strict=False):
            if value >= 0:
                self.views[value] = view
