"""Rows first: what a step does with time-major matrices, `[L, B, K]` taken as `[L * B, K]`, is done with `[B * L, K]`.

`nn.MultiheadAttention` and `nn.Transformer` lay sequences out so inside, whatever they are given. A product with a
weight does not mind the order of its rows; but where those of the batch lie apart, no dimension is the batch's.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any, TypeAlias

import torch

from unrolled.recording.program import Op, Program, Ref, Size, Value

Shape: TypeAlias = tuple[int | Size, ...]

_ROW = Size(1, 0)
_RESHAPE, _PERMUTE = torch.ops.aten.reshape.default, torch.ops.aten.permute.default
_PRODUCTS = {"mm": (0,), "addmm": (1,)}
"""Products of rows with a matrix: the position of the rows."""


def rows_first(program: Program) -> Program:
    """A step program that computes the same, in which rows lie before what they are merged with."""
    return _Turning(program).turned()


class _Turning:
    """Writes a program anew; for each value whose rows came second there is one in which they come first."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values = list(program.values)
        self.ops: list[Op] = []
        self.first: dict[int, int] = {}

    def turned(self) -> Program:
        """The program, without what is no longer read."""
        for op in self.program.ops:
            if not (self._reshaped(op) if op.target is _RESHAPE else self._by_rows(op)):
                self.ops.append(op)
        if not self.first:
            return self.program
        return Program(tuple(self.values), self.program.inputs, tuple(self.ops), self.program.outputs).pruned()

    def _reshaped(self, op: Op) -> bool:
        """Whether a reshape makes of a turned value one that is as it was, and is written already."""
        (source,), (made,) = op.inputs, op.outputs
        have, out = self.values[source].shape, self.values[made].shape
        if source not in self.first:
            before = next((d for d, n in enumerate(have) if isinstance(n, Size)), 0)
            single = (*have[:before], *_single(have[before]), *have[before + 1 :]) if before else have
            if before and _merged(single, out, before):
                source = source if single == have else self._reshape(source, single)
                order = [before, *range(before), *range(before + 1, len(single))]
                self.first[made] = self._reshape(self._permute(source, order), out)
            return False
        if out and out[0] == have[0]:
            self.first[made] = self._reshape(self.first[source], out)
            return False
        before = out.index(_ROW) if _ROW in out else 0
        if not before or not _merged(out, have, before):
            return False
        apart = self._reshape(self.first[source], (_ROW, *out[:before], *out[before + 1 :]))
        order = [*range(1, before + 1), 0, *range(before + 1, len(out))]
        self.ops.append(Op(_PERMUTE, (Ref(apart), tuple(order)), (), (made,)))
        return True

    def _by_rows(self, op: Op) -> bool:
        """Write an operation that acts row by row once more for turned values; it is itself kept for other readers."""
        read = [v for v in op.inputs if v in self.first]
        if read and len(op.outputs) == 1 and self._minds_no_order(op, read):
            (made,) = op.outputs
            self.first[made] = self._add(replace(op, args=self._replaced(op.args)), self.values[made].shape)
        return False

    def _minds_no_order(self, op: Op, read: list[int]) -> bool:
        out = self.values[op.outputs[0]].shape
        others = [self.values[v].shape for v in op.inputs if v not in self.first]
        if any(isinstance(n, Size) for shape in others for n in shape):
            return False
        if op.base in _PRODUCTS:
            (rows,) = _PRODUCTS[op.base]
            return op.args[rows] == Ref(read[0]) and len(read) == 1 and (op.base == "mm" or len(others[0]) == 1)
        pointwise = torch.Tag.pointwise in getattr(op.target, "tags", ())
        alike = all(self.values[v].shape[0] == out[0] and len(self.values[v].shape) == len(out) for v in read)
        return pointwise and alike and all(len(shape) < len(out) or shape[0] == 1 for shape in others)

    def _replaced(self, tree: Any) -> Any:
        if isinstance(tree, Ref):
            return Ref(self.first.get(tree.value, tree.value))
        return tuple(map(self._replaced, tree)) if type(tree) is tuple else tree

    def _permute(self, value: int, order: list[int]) -> int:
        shape = tuple(self.values[value].shape[d] for d in order)
        return self._add(Op(_PERMUTE, (Ref(value), tuple(order)), (), (value,)), shape)

    def _reshape(self, value: int, shape: Shape) -> int:
        return self._add(Op(_RESHAPE, (Ref(value), shape), (), (value,)), shape)

    def _add(self, op: Op, shape: Shape) -> int:
        """Write an operation whose result is a new value, of the kind of the one that it names."""
        made = len(self.values)
        self.values.append(Value(shape, self.values[op.outputs[0]].dtype))
        self.ops.append(replace(op, outputs=(made,)))
        return made


def _single(many: int | Size) -> Shape:
    """A dimension that holds several entries of each row, as one of rows and one of entries."""
    if not isinstance(many, Size) or many.constant or many.per_row == 1:
        return (many,)
    return _ROW, many.per_row


def _merged(apart: Shape, together: Shape, before: int) -> bool:
    """Whether dimensions up to and with the rows are one in another shape, and as many entries follow."""
    sizes = [*apart[:before], *apart[before + 1 :], *together[1:]]
    if not together or any(isinstance(n, Size) for n in sizes):
        return False
    many, left, right = (_entries(shape) for shape in (apart[:before], apart[before + 1 :], together[1:]))
    return together[0] == Size(many, 0) != _ROW and left == right


def _entries(shape: Shape) -> int:
    return prod(n for n in shape if not isinstance(n, Size))
