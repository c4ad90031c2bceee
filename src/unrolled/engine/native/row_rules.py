"""Lowering operations that put rows together, multiply them or reduce them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from unrolled.engine.native.nodes import (
    Copy,
    Join,
    Leaf,
    Product,
    Reduce,
    UnsupportedError,
    View,
    contiguous,
    without_rows,
)
from unrolled.engine.native.rules import Rules
from unrolled.engine.native.scalars import Scalar
from unrolled.plan.program import Op

__all__ = ["ConstantRules", "JoinRules", "ProductRules", "ReductionRules"]


class JoinRules(Rules):
    """What writes pieces side by side: joins, and the backward of slices."""

    def do_cat(self, op: Op) -> list[View]:
        pieces = [self.views[ref.value] for ref in op.args[0]]
        dims = self.shape_of(op)
        dim = self.given(op, 1, dict(op.kwargs).get("dim", 0)) % (len(dims) + 1) - 1
        if dim < 0:
            raise UnsupportedError("a join along the batch")
        return [self.joined(dims, dim, pieces, pieces[0].dtype)]

    def do_stack(self, op: Op) -> list[View]:
        pieces = [self.views[ref.value] for ref in op.args[0]]
        dims = self.shape_of(op)
        dim = self.given(op, 1, 0) % (len(dims) + 1) - 1
        if dim < 0:
            raise UnsupportedError("a stack along the batch")
        thick = [
            View(p.node, (*p.dims[:dim], 1, *p.dims[dim:]), (*p.strides[:dim], 0, *p.strides[dim:]), p.offset)
            for p in pieces
        ]
        return [self.joined(dims, dim, thick, pieces[0].dtype)]

    def joined(self, dims: tuple[int, ...], dim: int, pieces: Sequence[View], dtype: torch.dtype) -> View:
        """Pieces written side by side along a dimension."""
        join = Join(dims, dtype)
        place = View(join, dims, contiguous(dims))
        start = 0
        for piece in pieces:
            length = piece.dims[dim]
            part = (*dims[:dim], length, *dims[dim + 1 :])
            target = View(join, part, place.strides, start * place.strides[dim])
            copy = Copy(part, dtype, "copy", (piece,), target)
            self.nodes.append(copy)
            join.pieces.append(copy)
            start += length
        self.nodes.append(join)
        return place

    def do_slice_backward(self, op: Op) -> list[View]:
        view, dims = self.given(op, 0), self.shape_of(op)
        dim = op.args[2] % (len(dims) + 1) - 1
        start, stop, step = op.args[3], op.args[4], op.args[5]
        if dim < 0 or step != 1:
            raise UnsupportedError("the backward of a slice with a step")
        begin, end, _ = slice(start, stop).indices(dims[dim])
        return [self._padded(view, dims, dim, begin, dims[dim] - end)]

    def do_select_backward(self, op: Op) -> list[View]:
        view, dims = self.given(op, 0), self.shape_of(op)
        dim = op.args[2] % (len(dims) + 1) - 1
        if dim < 0:
            raise UnsupportedError("the backward of a selection of one row")
        index = op.args[3] % dims[dim]
        thick = View(
            view.node,
            (*view.dims[:dim], 1, *view.dims[dim:]),
            (*view.strides[:dim], 0, *view.strides[dim:]),
            view.offset,
        )
        return [self._padded(thick, dims, dim, index, dims[dim] - index - 1)]

    def _padded(self, view: View, dims: tuple[int, ...], dim: int, before: int, after: int) -> View:
        pieces = []
        for length in (before, None, after):
            if length is None:
                pieces.append(view)
            elif length:
                part = (*dims[:dim], length, *dims[dim + 1 :])
                pieces.append(self.compute("literal", 0.0, dims=part, dtype=view.dtype))
        return self.joined(dims, dim, pieces, view.dtype)


class ProductRules(Rules):
    """Rows times a fixed matrix."""

    def do_mm(self, op: Op) -> list[View]:
        return [self._product(self.given(op, 0), self.given(op, 1))]

    def do_addmm(self, op: Op) -> list[View]:
        if op.kwargs:
            raise UnsupportedError("addmm with factors")
        return [self.compute("add", self._product(self.given(op, 1), self.given(op, 2)), self.given(op, 0))]

    def _product(self, row: View, matrix: View) -> View:
        leaf = matrix.node
        if self.rowless(row) or not self.rowless(matrix) or len(row.dims) != 1 or not isinstance(leaf, Leaf):
            raise UnsupportedError("a product that is not of rows with a fixed matrix")
        return self.add(Product((leaf.dims[1],), self.real, self.in_memory(row), leaf))


class ReductionRules(Rules):
    """Sums, extremes, moments and softmax along dimensions of a row."""

    def reduced(self, name: str, view: View, dims: Sequence[int]) -> View:
        """A reduction that keeps its dimensions, with length 1."""
        kept = [d for d in range(len(view.dims)) if d not in dims]
        ordered = self.ordered(view, [*kept, *dims])
        node = Reduce(tuple(view.dims[d] for d in kept), self.real, name, ordered, prod(view.dims[d] for d in dims))
        result = self.add(node)
        shape = tuple(1 if d in dims else n for d, n in enumerate(view.dims))
        return View(result.node, shape, contiguous(shape))

    def _dims(self, op: Op, view: View, given: Any) -> list[int]:
        if given is None or given == ():
            raise UnsupportedError("a reduction over the batch")
        dims = sorted(self.dim(op, view, d) for d in (given if isinstance(given, tuple) else (given,)))
        if dims[0] < 0 or self.rowless(view):
            raise UnsupportedError("a reduction over the batch")
        return dims

    def _reduction(self, name: str) -> Callable[[Op], list[View]]:
        def rule(op: Op) -> list[View]:
            view = self.given(op, 0)
            keywords = dict(op.kwargs)
            dims = self._dims(op, view, self.given(op, 1, keywords.get("dim")))
            if view.dtype == torch.bool:
                view = self.compute("cast", view)
            result = self.reduced("sum" if name == "mean" else name, view, dims)
            if name == "mean":
                result = self.compute("mul", result, 1.0 / prod(view.dims[d] for d in dims))
            return [self._shaped(op, 0, result)]

        return rule

    @property
    def do_sum(self) -> Callable[[Op], list[View]]:
        return self._reduction("sum")

    @property
    def do_mean(self) -> Callable[[Op], list[View]]:
        return self._reduction("mean")

    @property
    def do_amax(self) -> Callable[[Op], list[View]]:
        return self._reduction("amax")

    @property
    def do_amin(self) -> Callable[[Op], list[View]]:
        return self._reduction("amin")

    def do_max(self, op: Op) -> list[View]:
        if len(op.outputs) != 2 or op.outputs[1] >= 0:
            raise UnsupportedError("the place of a maximum")
        view = self.given(op, 0)
        return [self._shaped(op, 0, self.reduced("amax", view, self._dims(op, view, op.args[1])))]

    def do_var(self, op: Op) -> list[View]:
        return [self._shaped(op, 0, self._moments(op)[0])]

    def do_std(self, op: Op) -> list[View]:
        return [self._shaped(op, 0, self.compute("sqrt", self._moments(op)[0]))]

    def do_var_mean(self, op: Op) -> list[View]:
        return [self._shaped(op, output, moment) for output, moment in enumerate(self._moments(op))]

    def _shaped(self, op: Op, output: int, view: View) -> View:
        """A whole node in the shape that the operation gives it."""
        dims = self.shape_of(op, output)
        return View(view.node, dims, contiguous(dims))

    def _moments(self, op: Op) -> tuple[View, View]:
        """Variance and mean, with the dimensions kept."""
        view, keywords = self.given(op, 0), dict(op.kwargs)
        dims = self._dims(op, view, self.given(op, 1, keywords.get("dim")))
        count = prod(view.dims[d] for d in dims)
        # The older overloads take `unbiased` by position, the newer ones `correction` by name.
        correction = int(op.args[2]) if len(op.args) > 2 else keywords.get("correction", 1)
        mean = self.compute("mul", self.reduced("sum", view, dims), 1.0 / count)
        apart = self.compute("sub", view, mean)
        total = self.reduced("sum", self.compute("mul", apart, apart), dims)
        scale = 1.0 / (count - correction) if count > correction else float("nan")
        return self.compute("mul", total, scale), mean

    def do_softmax(self, op: Op) -> list[View]:
        view = self.given(op, 0)
        dims = self._dims(op, view, op.args[1])
        powers = self.compute("exp", self.compute("sub", view, self.reduced("amax", view, dims)))
        return [self.compute("div", powers, self.reduced("sum", powers, dims))]

    def do_softmax_backward_data(self, op: Op) -> list[View]:
        grad, output = self.given(op, 0), self.given(op, 1)
        dims = self._dims(op, output, op.args[2])
        total = self.reduced("sum", self.compute("mul", grad, output), dims)
        return [self.compute("mul", output, self.compute("sub", grad, total))]


class ConstantRules(Rules):
    """Values made of numbers."""

    def do_zeros_like(self, op: Op) -> list[View]:
        return [self._literal(op, 0.0)]

    do_zeros = do_new_zeros = do_zeros_like

    def do_ones_like(self, op: Op) -> list[View]:
        return [self._literal(op, 1.0)]

    do_ones = do_new_ones = do_ones_like

    def do_full(self, op: Op) -> list[View]:
        return [self._literal(op, op.args[-1])]

    do_full_like = do_new_full = do_full

    def do_scalar_tensor(self, op: Op) -> list[View]:
        return [self._literal(op, op.args[0])]

    def _literal(self, op: Op, number: Scalar) -> View:
        value = self.values[op.outputs[0]]
        return self.compute("literal", number, dims=without_rows(value)[1], dtype=self.checked(value.dtype))
