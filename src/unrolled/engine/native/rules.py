"""What the rules of lowering are made of: the view of an argument, a computation, a shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from unrolled.engine.native.nodes import Compute, Leaf, Node, UnsupportedError, View, contiguous, without_rows
from unrolled.engine.native.scalars import ELEMENTWISE, Scalar
from unrolled.plan.program import Op, Ref, Value

__all__ = ["Rules"]


class Rules:
    """The base of all rules: a method `do_<name>` lowers one operation."""

    values: Sequence[Value]
    nodes: list[Node]
    views: dict[int, View]
    real: torch.dtype

    def checked(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype, if this engine has it."""
        if dtype not in (self.real, torch.bool):
            raise UnsupportedError(f"values of {dtype} beside {self.real}")
        return dtype

    def add(self, node: Node) -> View:
        """Add a node; the view of all of it."""
        self.nodes.append(node)
        return View(node, node.dims, contiguous(node.dims))

    def given(self, op: Op, index: int, default: Any = None) -> Any:
        """An argument: the view of a value, or a number as it is."""
        arg = op.args[index] if index < len(op.args) else default
        return self.views[arg.value] if isinstance(arg, Ref) else arg

    def rowless(self, view: View) -> bool:
        """Whether a view is of a fixed value without a batch."""
        return isinstance(view.node, Leaf) and not view.node.rows

    def compute(
        self, name: str, *arguments: View | Scalar, dims: Sequence[int] | None = None, dtype: Any = None
    ) -> View:
        """Add an element-wise computation, broadcast as in torch."""
        shapes = [view.dims for view in arguments if isinstance(view, View)]
        found = tuple(dims) if dims is not None else tuple(torch.broadcast_shapes(*shapes))
        return self.add(Compute(found, dtype or self.real, name, tuple(arguments)))

    def elementwise(self, op: Op, name: str) -> View:
        """Lower an operation that is one expression for each entry."""
        out = self.values[op.outputs[0]]
        rows, dims = without_rows(out)
        if not rows:
            raise UnsupportedError(f"{name} of values without a batch inside of a loop")
        arguments = [self.given(op, i) for i in range(len(op.args))]
        keywords = dict(op.kwargs)
        alpha = keywords.pop("alpha", 1)
        if alpha != 1:
            arguments[1] = self.compute("mul", arguments[1], alpha)
        arguments += ELEMENTWISE[name].keywords(keywords)
        return self.compute(name, *arguments, dims=dims, dtype=self.checked(out.dtype))

    def in_memory(self, row: View) -> View:
        """A view of entries that lie one after the other."""
        if row.strides != (1,) or (isinstance(row.node, Compute) and not row.whole):
            return self.compute("copy", row, dtype=row.dtype)
        return row

    def shape_of(self, op: Op, output: int = 0) -> tuple[int, ...]:
        """The shape of an operation's result, without the batch."""
        return without_rows(self.values[op.outputs[output]])[1]

    def rank(self, op: Op, view: View) -> int:
        """How many dimensions torch counts."""
        return len(view.dims) + (not self.rowless(view))

    def dim(self, op: Op, view: View, dim: int) -> int:
        """A dimension as torch counts it, as the view does: the batch is not counted."""
        rank = self.rank(op, view)
        return dim % rank - (rank - len(view.dims))

    def ordered(self, view: View, order: Sequence[int]) -> View:
        """A view with its dimensions in another order."""
        dims, strides = tuple(view.dims[d] for d in order), tuple(view.strides[d] for d in order)
        return View(view.node, dims, strides, view.offset)
