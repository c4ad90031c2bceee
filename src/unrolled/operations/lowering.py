"""Lowering: the program of one step, rewritten operation by operation as nodes over a row of the batch.

This is what the rules of all families are made of: the view of an argument, a computation, a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from unrolled.internals import broadcast_shape
from unrolled.operations.layout import RowLayout, UnsupportedError
from unrolled.operations.nodes import Compute, Input, Node, Scalar, View, contiguous
from unrolled.operations.operation import OPERATIONS, operation_of
from unrolled.recording.program import Op, Ref, Value

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Lowering:
    """The base of all families of operations.

    Attributes:
        values: what is known of the program's values.
        nodes: the nodes written so far.
        views: for each value that was lowered, where its entries are.
        real: the dtype of all floating-point numbers.
    """

    def __init__(self, values: Sequence[Value], real: torch.dtype) -> None:
        self.values, self.real = values, real
        self.nodes: list[Node] = []
        self.views: dict[int, View] = {}

    def input(self, kind: str, position: int, value: int) -> None:
        """Make a value an input."""
        known = self.values[value]
        layout = RowLayout.of(known)
        self.views[value] = self.add(
            Input(layout.dims, self.checked(known.dtype), kind, position, layout.place is not None)
        )

    def run(self, op: Op) -> None:
        """Write an operation in nodes.

        Raises:
            UnsupportedError: if nobody said how, or not for such arguments.
        """
        operation = operation_of(op)
        if operation.lower is not None:
            results = operation.lower(self, op)
        elif operation.expression or operation.integers:
            results = [self.elementwise(op, op.base)]
        else:
            raise UnsupportedError(op.name.removeprefix("aten."))
        self.views |= {value: view for value, view in zip(op.outputs, results, strict=False) if value >= 0}

    def checked(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype, if this engine has it."""
        if dtype not in (self.real, torch.bool, *_INTEGERS):
            raise UnsupportedError(f"values of {dtype} beside {self.real}")
        return dtype

    def add(self, node: Node) -> View:
        """Add a node; the view of all of it."""
        self.nodes.append(node)
        return View(node, node.dims, contiguous(node.dims))

    def argument(self, op: Op, index: int, default: Any = None) -> Any:
        """An argument: the view of a value, or a number as it is."""
        arg = op.args[index] if index < len(op.args) else default
        return self.views[arg.value] if isinstance(arg, Ref) else arg

    def layout(self, op: Op, index: int = 0) -> RowLayout:
        """Where the batch is in an argument."""
        return RowLayout.of(self.values[op.args[index].value])

    def layout_of(self, op: Op, output: int = 0) -> RowLayout:
        """Where the batch is in a result."""
        return RowLayout.of(self.values[op.outputs[output]])

    def aligned(self, arg: Any, out: RowLayout) -> Any:
        """An argument as an element-wise operation reads it: rows with rows, what has none broadcast over them."""
        if not isinstance(arg, Ref):
            return arg
        view, have = self.views[arg.value], RowLayout.of(self.values[arg.value])
        if out.place is None:
            return view
        where = out.place - (len(out.shape) - len(have.shape))
        if have.place is not None:
            if (have.place, have.many) != (where, out.many):
                raise UnsupportedError("an operation of rows with other rows")
            return view
        if where < 0 or out.many > 1:
            return view
        if have.shape[where] != 1:
            raise UnsupportedError("an operation of rows with what is as long as they are")
        return view.permuted([d for d in range(len(view.dims)) if d != where])

    def compute(
        self, name: str, *arguments: View | Scalar, dims: Sequence[int] | None = None, dtype: Any = None
    ) -> View:
        """Add an element-wise computation, broadcast as in torch."""
        shapes = [view.dims for view in arguments if isinstance(view, View)]
        found = tuple(dims) if dims is not None else broadcast_shape(*shapes)
        return self.add(Compute(found, dtype or self.real, name, tuple(arguments)))

    def cast(self, view: View, dtype: torch.dtype | None) -> View:
        """A view's entries in another dtype."""
        if dtype is None or dtype == view.dtype:
            return view
        if dtype == torch.bool:
            return self.compute("ne", view, 0, dtype=dtype)
        cut_off = view.dtype.is_floating_point and not dtype.is_floating_point
        return self.compute("cut_off" if cut_off else "cast", view, dtype=self.checked(dtype))

    def elementwise(self, op: Op, name: str, done: Sequence[str] = ()) -> View:
        """Lower an operation that is one expression for each entry; `done` keywords have chosen the expression."""
        out, keywords = self.layout_of(op), {key: value for key, value in op.kwargs if key not in done}
        operation = OPERATIONS[name]
        dtype = self.checked(self.values[op.outputs[0]].dtype)
        arguments = self._numbers(name, [self.aligned(arg, out) for arg in op.args], dtype)
        if keywords.get("alpha", 1) != 1:
            arguments[1] = self.compute("mul", arguments[1], keywords["alpha"], dtype=dtype)
        arguments += [keywords.get(keyword, default) for keyword, default in operation.keywords]
        harmless = ("alpha", "dtype", "layout", "device", "pin_memory", "memory_format")
        unknown = set(keywords).difference(harmless, dict(operation.keywords))
        if unknown:
            raise UnsupportedError(f"{op.name} with {', '.join(sorted(unknown))}")
        return self.compute(name, *arguments, dims=out.dims, dtype=dtype)

    def _numbers(self, name: str, arguments: Sequence[Any], dtype: torch.dtype) -> list[Any]:
        """Arguments of one kind, as torch promotes them: C would divide bools as integers."""
        operation = OPERATIONS[name]
        if not self.among_integers(arguments, dtype):
            return [self._number(x, dtype) if i != operation.condition else x for i, x in enumerate(arguments)]
        if not operation.integers:
            raise UnsupportedError(f"{name} of integers")
        return [int(x) if isinstance(x, float) else x for x in arguments]

    def among_integers(self, arguments: Sequence[Any], dtype: torch.dtype) -> bool:
        """Whether what makes this dtype of some arguments is arithmetic of integers.

        Raises:
            UnsupportedError: if integers are compared with a number as numbers of another dtype than the loop's.
        """
        kinds = {x.dtype for x in arguments if isinstance(x, View)} | {dtype}
        if self.real in kinds or kinds == {torch.bool}:
            return False
        if dtype == torch.bool and any(isinstance(x, float) for x in arguments):
            if self.real != torch.get_default_dtype():
                raise UnsupportedError("integers beside a floating-point number")
            return False
        return True

    def _number(self, arg: Any, dtype: torch.dtype) -> Any:
        if not isinstance(arg, View) or (arg.dtype == torch.bool and dtype != self.real):
            return arg
        return self.cast(arg, self.real)

    def in_memory(self, row: View) -> View:
        """A view of entries that lie one after the other."""
        if row.strides != (1,) or (isinstance(row.node, Compute) and not row.whole):
            return self.compute("same", row, dtype=row.dtype)
        return row

    def shape_of(self, op: Op, output: int = 0) -> tuple[int, ...]:
        """The shape of an operation's result, without the batch."""
        return self.layout_of(op, output).dims
