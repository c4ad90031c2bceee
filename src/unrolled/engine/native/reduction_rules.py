"""Lowering reductions along dimensions of a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from unrolled.engine.native.layout import UnsupportedError
from unrolled.engine.native.nodes import Reduce, Scan, View, contiguous
from unrolled.engine.native.view_rules import ViewRules
from unrolled.recording.program import Op


class ReductionRules(ViewRules):
    """Sums, extremes, moments and softmax along dimensions of a row."""

    def reduced(self, name: str, view: View, dims: Sequence[int]) -> View:
        """A reduction that keeps its dimensions, with length 1."""
        kept = [d for d in range(len(view.dims)) if d not in dims]
        ordered = self.ordered(view, [*kept, *dims])
        node = Reduce(tuple(view.dims[d] for d in kept), self.real, name, ordered, prod(view.dims[d] for d in dims))
        result = self.add(node)
        shape = tuple(1 if d in dims else n for d, n in enumerate(view.dims))
        return View(result.node, shape, contiguous(shape))

    def _dims(self, op: Op, given: Any, index: int = 0) -> list[int]:
        have = self.layout(op, index)
        if given is None or given == () or have.place is None:
            raise UnsupportedError("a reduction along the batch")
        return sorted(have.dim(d, "a reduction") for d in (given if isinstance(given, tuple) else (given,)))

    def _reduction(self, name: str) -> Callable[[Op], list[View]]:
        def rule(op: Op) -> list[View]:
            dims = self._dims(op, self.given(op, 1, dict(op.kwargs).get("dim")))
            view = self.cast(self.given(op, 0), self.real)
            result = self.reduced("sum" if name == "mean" else name, view, dims)
            if name == "mean":
                result = self.compute("mul", result, 1.0 / prod(view.dims[d] for d in dims))
            return [self.counted(op, result)]

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

    @property
    def do_prod(self) -> Callable[[Op], list[View]]:
        return self._reduction("prod")

    def do_any(self, op: Op) -> list[View]:
        return [self._truth(op, "amax")]

    def do_all(self, op: Op) -> list[View]:
        return [self._truth(op, "amin")]

    def _truth(self, op: Op, name: str) -> View:
        """Whether any or all entries are not zero; NaN is not."""
        view = self.compute("cast", self.compute("ne", self.given(op, 0), 0, dtype=torch.bool))
        result = self.reduced(name, view, self._dims(op, self.given(op, 1)))
        return self.compute("ne", self._shaped(op, 0, result), 0, dtype=torch.bool)

    def counted(self, op: Op, result: View) -> View:
        """A whole node as the operation gives it: in its shape, a count of bools as integers."""
        result, dtype = self._shaped(op, 0, result), self.checked(self.values[op.outputs[0]].dtype)
        return result if dtype == self.real else self.compute("cast", result, dtype=dtype)

    def do_max(self, op: Op) -> list[View]:
        if len(op.outputs) != 2 or op.outputs[1] >= 0:
            raise UnsupportedError("the place of a maximum")
        view = self.given(op, 0)
        return [self._shaped(op, 0, self.reduced("amax", view, self._dims(op, op.args[1])))]

    def do_var(self, op: Op) -> list[View]:
        return [self._shaped(op, 0, self._moments(op)[0])]

    def do_std(self, op: Op) -> list[View]:
        return [self._shaped(op, 0, self.compute("sqrt", self._moments(op)[0]))]

    def do_std_mean(self, op: Op) -> list[View]:
        var, mean = self._moments(op)
        return [self._shaped(op, 0, self.compute("sqrt", var)), self._shaped(op, 1, mean)]

    def do_var_mean(self, op: Op) -> list[View]:
        return [self._shaped(op, output, moment) for output, moment in enumerate(self._moments(op))]

    def _shaped(self, op: Op, output: int, view: View) -> View:
        """A whole node in the shape that the operation gives it, if it gives it."""
        dims = self.shape_of(op, output) if op.outputs[output] >= 0 else view.dims
        return View(view.node, dims, contiguous(dims))

    def _moments(self, op: Op) -> tuple[View, View]:
        """Variance and mean, with the dimensions kept."""
        view, keywords = self.given(op, 0), dict(op.kwargs)
        dims = self._dims(op, self.given(op, 1, keywords.get("dim")))
        count = prod(view.dims[d] for d in dims)
        # The older overloads take `unbiased` by position, the newer ones `correction` by name.
        correction = int(op.args[2]) if len(op.args) > 2 else keywords.get("correction", 1)
        mean = self.compute("mul", self.reduced("sum", view, dims), 1.0 / count)
        apart = self.compute("sub", view, mean)
        total = self.reduced("sum", self.compute("mul", apart, apart), dims)
        scale = 1.0 / (count - correction) if count > correction else float("nan")
        return self.compute("mul", total, scale), mean

    def do_cumsum(self, op: Op) -> list[View]:
        view, (dim,) = self.given(op, 0), self._dims(op, op.args[1])
        order = [*(d for d in range(len(view.dims)) if d != dim), dim]
        turned = self.ordered(view, order)
        scan = self.add(Scan(turned.dims, self.real, "cumsum", turned, view.dims[dim]))
        return [self.ordered(scan, [order.index(d) for d in range(len(order))])]

    def do_softmax(self, op: Op) -> list[View]:
        view = self.given(op, 0)
        dims = self._dims(op, op.args[1])
        powers = self.compute("exp", self.compute("sub", view, self.reduced("amax", view, dims)))
        return [self.compute("div", powers, self.reduced("sum", powers, dims))]

    def do_softmax_backward_data(self, op: Op) -> list[View]:
        grad, output = self.given(op, 0), self.given(op, 1)
        dims = self._dims(op, op.args[2])
        total = self.reduced("sum", self.compute("mul", grad, output), dims)
        return [self.compute("mul", output, self.compute("sub", grad, total))]
