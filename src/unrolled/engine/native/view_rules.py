"""Lowering operations that only look at what is there in another way."""

from __future__ import annotations

from unrolled.engine.native.nodes import Compute, Copy, UnsupportedError, View, contiguous, without_rows
from unrolled.engine.native.rules import Rules
from unrolled.engine.native.scalars import ELEMENTWISE
from unrolled.plan.program import Op, Size

__all__ = ["ViewRules"]


class ViewRules(Rules):
    """Views, slices, splits, permutations, expansions."""

    def do_alias(self, op: Op) -> list[View]:
        return [self.given(op, 0)]

    do_detach = do_clone = do_lift_fresh = do_alias

    def do_to_copy(self, op: Op) -> list[View]:
        view, dtype = self.given(op, 0), dict(op.kwargs).get("dtype")
        if dtype in (None, view.dtype):
            return [view]
        return [self.compute("cast", view, dtype=self.checked(dtype))]

    def do_to(self, op: Op) -> list[View]:
        view, dtype = self.given(op, 0), op.args[1]
        return [view if dtype == view.dtype else self.compute("cast", view, dtype=self.checked(dtype))]

    def do_view(self, op: Op) -> list[View]:
        view, dims = self.given(op, 0), self.shape_of(op)
        strides = _restrided(view, dims)
        if strides is None:
            view = self.compute("copy", view, dtype=view.dtype)
            return [View(view.node, dims, contiguous(dims))]
        return [View(view.node, dims, strides, view.offset)]

    do_unsafe_view = do_reshape = do_unsqueeze = do_squeeze = do_view

    def do_expand(self, op: Op) -> list[View]:
        view, dims = self.given(op, 0), self.shape_of(op)
        added = len(dims) - len(view.dims)
        if added < 0 or self.rowless(view):
            raise UnsupportedError("expand over the batch")
        strides = (0,) * added + tuple(
            0 if have == 1 and want != 1 else stride
            for have, want, stride in zip(view.dims, dims[added:], view.strides, strict=True)
        )
        return [View(view.node, dims, strides, view.offset)]

    def do_permute(self, op: Op) -> list[View]:
        view = self.given(op, 0)
        rank = self.rank(op, view)
        order = [d % rank - (rank - len(view.dims)) for d in op.args[1]]
        if not self.rowless(view):
            if order[0] != -1:
                raise UnsupportedError("a permutation that moves the batch")
            order = order[1:]
        return [self.ordered(view, order)]

    def do_transpose(self, op: Op) -> list[View]:
        view = self.given(op, 0)
        a, b = (self.dim(op, view, op.args[i]) for i in (1, 2))
        if min(a, b) < 0:
            raise UnsupportedError("a transposition that moves the batch")
        order = list(range(len(view.dims)))
        order[a], order[b] = order[b], order[a]
        return [self.ordered(view, order)]

    def do_t(self, op: Op) -> list[View]:
        raise UnsupportedError("a transposition that moves the batch")

    def cut(self, view: View, dim: int, start: int, length: int, step: int = 1) -> View:
        """A slice along a dimension; through cheap element-wise computations it goes to what these read."""
        node = view.node
        if isinstance(node, Compute) and not isinstance(node, Copy) and view.whole and ELEMENTWISE[node.name].cheap:
            rank = len(view.dims)
            arguments = [
                self._cut_aligned(argument, dim - rank, start, length, step) if isinstance(argument, View) else argument
                for argument in node.arguments
            ]
            dims = (*view.dims[:dim], length, *view.dims[dim + 1 :])
            return self.compute(node.name, *arguments, dims=dims, dtype=node.dtype)
        dims = (*view.dims[:dim], length, *view.dims[dim + 1 :])
        strides = (*view.strides[:dim], view.strides[dim] * step, *view.strides[dim + 1 :])
        return View(node, dims, strides, view.offset + start * view.strides[dim])

    def _cut_aligned(self, view: View, from_end: int, start: int, length: int, step: int) -> View:
        dim = len(view.dims) + from_end
        if dim < 0 or view.dims[dim] == 1:
            return view
        return self.cut(view, dim, start, length, step)

    def do_slice(self, op: Op) -> list[View]:
        view = self.given(op, 0)
        dim = self.dim(op, view, self.given(op, 1, 0))
        start, stop, step = self.given(op, 2), self.given(op, 3), self.given(op, 4, 1)
        if dim < 0:
            if start in (None, 0) and (stop is None or isinstance(stop, Size) or stop >= 2**62) and step == 1:
                return [view]
            raise UnsupportedError("a slice of the batch")
        begin, end, stride = slice(start, stop, step).indices(view.dims[dim])
        return [self.cut(view, dim, begin, len(range(begin, end, stride)), stride)]

    def do_select(self, op: Op) -> list[View]:
        view = self.given(op, 0)
        dim = self.dim(op, view, op.args[1])
        if dim < 0:
            raise UnsupportedError("a selection of one row")
        part = self.cut(view, dim, op.args[2] % view.dims[dim], 1)
        drop = [d for d in range(len(part.dims)) if d != dim]
        return [self.ordered(part, drop)]

    def do_split(self, op: Op) -> list[View]:
        view = self.given(op, 0)
        dim = self.dim(op, view, self.given(op, 2, 0))
        if dim < 0:
            raise UnsupportedError("a split of the batch")
        lengths = [without_rows(self.values[v])[1][dim] if v >= 0 else None for v in op.outputs]
        step = op.args[1]
        starts = (
            [sum(step[:i]) for i in range(len(step))] if isinstance(step, tuple) else range(0, view.dims[dim], step)
        )
        return [
            self.cut(view, dim, start, length) if length is not None else view
            for start, length in zip(starts, lengths, strict=False)
        ]

    do_split_with_sizes = do_unsafe_split = do_split


def _restrided(view: View, dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides that show the same entries in another shape; None if there are none."""
    if not dims:
        return ()
    if view.strides == contiguous(view.dims):
        return contiguous(dims)
    if [n for n in view.dims if n != 1] == [n for n in dims if n != 1]:
        left = iter([s for n, s in zip(view.dims, view.strides, strict=True) if n != 1])
        return tuple(0 if n == 1 else next(left) for n in dims)
    return None
