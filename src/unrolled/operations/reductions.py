"""Reductions along dimensions of a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from unrolled.operations.layout import UnsupportedError
from unrolled.operations.nodes import Reduce, Scan, View, contiguous
from unrolled.operations.operation import Cost, Linear, Operation, lowers
from unrolled.operations.row_rules import Rows, along
from unrolled.operations.views import Views
from unrolled.recording.program import Op


class Reductions(Views):
    """Sums, extremes, moments and softmax along dimensions of a row."""

    def reduced(self, name: str, view: View, dims: Sequence[int]) -> View:
        """A reduction that keeps its dimensions, with length 1; of integers it is one of 64 bits."""
        view = self.addable(view)
        kept = [d for d in range(len(view.dims)) if d not in dims]
        ordered = view.permuted([*kept, *dims])
        node = Reduce(tuple(view.dims[d] for d in kept), view.dtype, name, ordered, prod(view.dims[d] for d in dims))
        result = self.add(node)
        shape = tuple(1 if d in dims else n for d, n in enumerate(view.dims))
        return View(result.node, shape, contiguous(shape))

    def addable(self, view: View) -> View:
        """A view's entries as reductions take them: floating-point numbers, which bools become too, or integers."""
        whole = view.dtype not in (self.real, torch.bool)
        return self.cast(view, torch.int64 if whole else self.real)

    def _dims(self, op: Op, named: Any, index: int = 0) -> list[int]:
        have = self.layout(op, index)
        if (named is None or named == ()) and have.place is None:
            named = tuple(range(len(have.shape)))
        if named is None or named == ():
            raise UnsupportedError("a reduction along the batch")
        return sorted(have.dim(d, "a reduction") for d in (named if isinstance(named, tuple) else (named,)))

    @lowers("sum", Operation(along(1, 2), cost=Cost.FUSED, linear=Linear.JOINTLY))
    @lowers("mean amax amin", Operation(along(1, 2), cost=Cost.FUSED))
    @lowers("prod", Operation(along(1, 2)))
    def _reduction(self, op: Op) -> list[View]:
        dims = self._dims(op, self.argument(op, 1, dict(op.kwargs).get("dim")))
        view = self.argument(op, 0)
        result = self.reduced("sum" if op.base == "mean" else op.base, view, dims)
        if op.base == "mean":
            result = self.compute("mul", result, 1.0 / prod(view.dims[d] for d in dims))
        return [self._counted(op, result)]

    @lowers("any all", Operation(along(1, 2)))
    def _truth(self, op: Op) -> list[View]:
        """Whether any or all entries are not zero; NaN is not."""
        view = self.compute("cast", self.compute("ne", self.argument(op, 0), 0, dtype=torch.bool))
        extreme = "amax" if op.base == "any" else "amin"
        result = self.reduced(extreme, view, self._dims(op, self.argument(op, 1)))
        return [self.compute("ne", self._shaped(op, 0, result), 0, dtype=torch.bool)]

    def _counted(self, op: Op, result: View) -> View:
        """A whole node as the operation gives it: in its shape and its dtype."""
        result, dtype = self._shaped(op, 0, result), self.checked(self.values[op.outputs[0]].dtype)
        return self.cast(result, dtype)

    def _shaped(self, op: Op, output: int, view: View) -> View:
        """A whole node in the shape that the operation gives it, if it gives it."""
        dims = self.shape_of(op, output) if op.outputs[output] >= 0 else view.dims
        return View(view.node, dims, contiguous(dims))

    @lowers("var", Operation(along(1, 2), cost=Cost.FUSED))
    @lowers("var_mean", Operation(along(1, 3), cost=Cost.FUSED))
    @lowers("std", Operation(along(1, 2)))
    @lowers("std_mean", Operation(along(1, 3)))
    def _moments(self, op: Op) -> list[View]:
        view, keywords = self.argument(op, 0), dict(op.kwargs)
        dims = self._dims(op, self.argument(op, 1, keywords.get("dim")))
        count = prod(view.dims[d] for d in dims)
        # The older overloads take `unbiased` by position, the newer ones `correction` by name.
        correction = int(op.args[2]) if len(op.args) > 2 else keywords.get("correction", 1)
        mean = self.compute("mul", self.reduced("sum", view, dims), 1.0 / count)
        deviation = self.compute("sub", view, mean)
        total = self.reduced("sum", self.compute("mul", deviation, deviation), dims)
        scale = 1.0 / (count - correction) if count > correction else float("nan")
        moment = self.compute("mul", total, scale)
        if op.base.startswith("std"):
            moment = self.compute("sqrt", moment)
        results = (moment, mean)[: len(op.outputs)]
        return [self._shaped(op, output, view) for output, view in enumerate(results)]

    @lowers("count_nonzero", Operation(along(1, 2)))
    def _count_nonzero(self, op: Op) -> list[View]:
        there = self.compute("ne", self.argument(op, 0), 0, dtype=torch.bool)
        return [self._counted(op, self.reduced("sum", there, self._dims(op, self.argument(op, 1))))]

    @lowers("cumsum cumprod logcumsumexp", Operation(along(1, default=-1)))
    def _running(self, op: Op) -> list[View]:
        view, (dim,) = self.argument(op, 0), self._dims(op, op.args[1])
        whole = self.values[op.outputs[0]].dtype != self.real
        view = self.cast(view, torch.int64 if whole else self.real)
        order = [*(d for d in range(len(view.dims)) if d != dim), dim]
        running = self._running_total(op.base, view.permuted(order))
        result = running.permuted([order.index(d) for d in range(len(order))])
        return [self.cast(result, self.checked(self.values[op.outputs[0]].dtype))]

    def _running_total(self, name: str, view: View) -> View:
        return self.add(Scan(view.dims, view.dtype, name, view, view.dims[-1]))

    @lowers("tril triu", Operation(Rows.triangle))
    def _triangle(self, op: Op) -> list[View]:
        """Entries on one side of a diagonal, found by counting along both dimensions; zeros on the other."""
        view, have = self.argument(op, 0), self.layout(op)
        down, across = (
            self._running_total("cumsum", self.compute("literal", 1.0, dims=(view.dims[have.dim(d)],)))
            for d in (-2, -1)
        )
        beyond = self.compute("sub", across, down.unsqueezed(1))
        kept = self.compute("le" if op.base == "tril" else "ge", beyond, self.argument(op, 1, 0), dtype=torch.bool)
        return [self.compute("where", kept, view, 0, dtype=view.dtype)]

    @lowers("_softmax", Operation(along(1, default=-1), cost=Cost.FUSED))
    def _softmax(self, op: Op) -> list[View]:
        view = self.argument(op, 0)
        dims = self._dims(op, op.args[1])
        powers = self.compute("exp", self.compute("sub", view, self.reduced("amax", view, dims)))
        return [self.compute("div", powers, self.reduced("sum", powers, dims))]

    @lowers("_safe_softmax", Operation(along(1), cost=Cost.FUSED))
    def _safe_softmax(self, op: Op) -> list[View]:
        """Zeros where there is nothing but -inf."""
        view = self.argument(op, 0)
        dims = self._dims(op, op.args[1])
        top = self.reduced("amax", view, dims)
        blind = self.compute("eq", top, -math.inf, dtype=torch.bool)
        powers = self.compute("exp", self.compute("sub", view, self.compute("masked_fill", top, blind, 0.0)))
        total = self.compute("masked_fill", self.reduced("sum", powers, dims), blind, 1.0)
        return [self.compute("div", powers, total)]

    @lowers("_softmax_backward_data", Operation(along(2), cost=Cost.FUSED))
    def _softmax_backward(self, op: Op) -> list[View]:
        grad, output = self.argument(op, 0), self.argument(op, 1)
        dims = self._dims(op, op.args[2])
        total = self.reduced("sum", self.compute("mul", grad, output), dims)
        return [self.compute("mul", output, self.compute("sub", grad, total))]
