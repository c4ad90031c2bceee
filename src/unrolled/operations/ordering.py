"""Ordering: places of the largest and the smallest, of what is sorted, and of numbers among sorted ones.

The values are then read at those places. Where equal numbers leave it to an algorithm of torch's which of them comes
first, the numbers are declined if there are any, and torch does it.
"""

from __future__ import annotations

import torch

from unrolled.operations.index_rules import search
from unrolled.operations.indexing import Indexing
from unrolled.operations.layout import UnsupportedError
from unrolled.operations.nodes import Find, View
from unrolled.operations.operation import Operation, lowers
from unrolled.operations.reductions import Reductions
from unrolled.operations.row_rules import along
from unrolled.recording.program import Op


class Ordering(Indexing, Reductions):
    """Maxima with their places, sorting, running maxima, search."""

    def places(self, name: str, view: View, dim: int, count: int) -> View:
        """The places that a function finds along a dimension, which keeps its position; so many of them."""
        order = [*(d for d in range(len(view.dims)) if d != dim), dim]
        turned = self.comparable(view).permuted(order)
        found = self.add(Find((*turned.dims[:-1], count), torch.int64, name, turned))
        return found.permuted([order.index(d) for d in range(len(order))])

    def comparable(self, view: View) -> View:
        """A view as functions of C take it: of floating-point numbers, or of integers of 64 bits."""
        return view if view.dtype == self.real else self.cast(view, torch.int64)

    def _with_values(self, op: Op, places: View, dim: int, *, kept: bool = True) -> list[View]:
        """The entries at these places, and the places; without their dimension, of length 1, unless that is kept."""
        results = [self.taken(self.argument(op, 0), places, dim), places]
        if kept:
            return results
        return [view.permuted([d for d in range(len(view.dims)) if d != dim]) for view in results]

    # -- the largest and the smallest

    @lowers("argmax argmin", Operation(along(1, 2)))
    def _arg_extreme(self, op: Op) -> list[View]:
        (dim,) = self._dims(op, self.argument(op, 1, dict(op.kwargs).get("dim")))
        places = self.places(op.base, self.argument(op, 0), dim, 1)
        return [self.reshaped(places, self.shape_of(op))]

    @lowers("max min", Operation(along(1, 2)))
    def _extreme(self, op: Op) -> list[View]:
        if len(op.outputs) != 2:
            raise UnsupportedError(f"{op.base} along the batch")
        (dim,) = self._dims(op, op.args[1])
        if op.outputs[1] < 0:
            return [self._counted(op, self.reduced(f"a{op.base}", self.argument(op, 0), [dim]))]
        places = self.places(f"arg{op.base}", self.argument(op, 0), dim, 1)
        return self._with_values(op, places, dim, kept=bool(self.argument(op, 2, False)))

    @lowers("cummax cummin", Operation(along(1, default=-1)))
    def _running_extreme(self, op: Op) -> list[View]:
        view, (dim,) = self.argument(op, 0), self._dims(op, op.args[1])
        return self._with_values(op, self.places(op.base, view, dim, view.dims[dim]), dim)

    # -- sorting

    @lowers("sort", Operation(along(1, default=-1)))
    def _sort(self, op: Op) -> list[View]:
        view, keywords = self.argument(op, 0), dict(op.kwargs)
        (dim,) = self._dims(op, self.argument(op, 1, keywords.get("dim", -1)))
        down = self.argument(op, 2, keywords.get("descending", False))
        name = f"sorted_{'down' if down else 'up'}{'' if keywords.get('stable') else '_apart'}"
        return self._with_values(op, self.places(name, view, dim, view.dims[dim]), dim)

    @lowers("argsort", Operation(along(1, default=-1)))
    def _argsort(self, op: Op) -> list[View]:
        return self._sort(op)[1:]

    @lowers("topk", Operation(along(2, default=-1)))
    def _topk(self, op: Op) -> list[View]:
        (dim,) = self._dims(op, self.argument(op, 2, -1))
        largest = self.argument(op, 3, True)
        if not self.argument(op, 4, True):
            raise UnsupportedError("topk whose results are in no order")
        places = self.places(f"sorted_{'down' if largest else 'up'}_apart", self.argument(op, 0), dim, op.args[1])
        return self._with_values(op, places, dim)

    @lowers("median", Operation(along(1, 2)))
    def _median(self, op: Op) -> list[View]:
        if len(op.outputs) != 2:
            raise UnsupportedError("a median along the batch")
        view, (dim,) = self.argument(op, 0), self._dims(op, op.args[1])
        return self._with_values(op, self.places("median", view, dim, 1), dim, kept=bool(self.argument(op, 2, False)))

    @lowers("kthvalue", Operation(along(2, 3, default=-1)))
    def _kthvalue(self, op: Op) -> list[View]:
        view, (dim,) = self.argument(op, 0), self._dims(op, self.argument(op, 2, -1))
        places = self.places("sorted_up_apart", view, dim, view.dims[dim])
        one = self.cut(places, dim, op.args[1] - 1, 1)
        return self._with_values(op, one, dim, kept=bool(self.argument(op, 3, False)))

    # -- among sorted numbers

    @lowers("searchsorted", Operation(search(1, 0)))
    def _searchsorted(self, op: Op) -> list[View]:
        keywords = dict(op.kwargs)
        if keywords.get("sorter") is not None:
            raise UnsupportedError("a search with a sorter")
        right = self.argument(op, 3, keywords.get("right", False)) or keywords.get("side") == "right"
        return [self._searched(op, 0, 1, bool(right))]

    @lowers("bucketize", Operation(search(0, 1)))
    def _bucketize(self, op: Op) -> list[View]:
        return [self._searched(op, 1, 0, bool(self.argument(op, 3, dict(op.kwargs).get("right", False))))]

    def _searched(self, op: Op, boundaries: int, values: int, right: bool) -> View:
        ordered, wanted = (self.argument(op, n) for n in (boundaries, values))
        if not isinstance(wanted, View) or ordered.dtype != wanted.dtype:
            raise UnsupportedError("a search for numbers of another kind")
        ordered, wanted = self.comparable(ordered), self.comparable(wanted)
        if len(ordered.dims) == 1:
            ordered = ordered.broadcast((*wanted.dims[:-1], *ordered.dims)) if wanted.dims else ordered
            flat = not wanted.dims
            wanted = wanted.unsqueezed(0) if flat else wanted
        name = "upper_bound" if right else "lower_bound"
        found = self.add(Find(wanted.dims, torch.int64, name, ordered, wanted))
        dtype = self.checked(self.values[op.outputs[0]].dtype)
        return self.cast(self.reshaped(found, self.shape_of(op)), dtype)
