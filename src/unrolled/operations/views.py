"""Views: operations that show the entries that are there in another shape or order, or some of them."""

from __future__ import annotations

from collections.abc import Sequence

from unrolled.operations.layout import UnsupportedError
from unrolled.operations.lowering import Lowering
from unrolled.operations.nodes import Compute, View, contiguous, replaced
from unrolled.operations.operation import OPERATIONS, Cost, Linear, Operation, lowers
from unrolled.operations.row_rules import Rows, along
from unrolled.recording.program import Op, Size


class Views(Lowering):
    """Views, slices, splits, permutations, expansions; what most of them are made of."""

    @lowers("alias detach clone", Operation.moving(Rows.first))
    @lowers("lift_fresh positive", Operation())
    @lowers("real", Operation(Rows.pointwise))
    def _unchanged(self, op: Op) -> list[View]:
        return [self.argument(op, 0)]

    @lowers("_to_copy", Operation(Rows.first, cost=Cost.LIGHT, linear=Linear.JOINTLY))
    def _to_copy(self, op: Op) -> list[View]:
        return [self.cast(self.argument(op, 0), dict(op.kwargs).get("dtype"))]

    @lowers("to", Operation(Rows.first, cost=Cost.FUSED, linear=Linear.JOINTLY))
    def _to(self, op: Op) -> list[View]:
        return [self.cast(self.argument(op, 0), op.args[1])]

    @lowers("view _unsafe_view reshape", Operation.moving(Rows.view))
    @lowers("unsqueeze", Operation.moving(Rows.unsqueeze))
    @lowers("squeeze", Operation.moving(Rows.squeeze))
    def _view(self, op: Op) -> list[View]:
        view, have, want = self.argument(op, 0), self.layout(op), self.layout_of(op)
        if (have.place is None) != (want.place is None) or have.before != want.before:
            raise UnsupportedError("a view that moves the batch")
        return [self.reshaped(view, want.dims)]

    def reshaped(self, view: View, dims: tuple[int, ...]) -> View:
        """A row's entries in another shape; copied where no strides show them so."""
        strides = _restrided(view, dims)
        if strides is None:
            view = self.compute("same", view, dtype=view.dtype)
            return View(view.node, dims, contiguous(dims))
        return View(view.node, dims, strides, view.offset)

    @lowers("expand", Operation.moving(Rows.expand, alike=True))
    def _expand(self, op: Op) -> list[View]:
        out = self.layout_of(op)
        view = self.aligned(op.args[0], out) if out.place is not None else self.argument(op, 0)
        return [view.broadcast(out.dims)]

    @lowers("repeat", Operation(Rows.repeat, alike=True))
    def _repeat(self, op: Op) -> list[View]:
        out, times = self.layout_of(op), op.args[1]
        if out.place is None or times[out.place] != 1 or out.many != 1:
            raise UnsupportedError("a repetition of rows")
        view = self.aligned(op.args[0], out)
        times = [n for d, n in enumerate(times) if d != out.place]
        sizes = (1,) * (len(times) - len(view.dims)) + view.dims
        pairs = tuple(n for pair in zip(times, sizes, strict=True) for n in pair)
        single = tuple(n for size in sizes for n in (1, size))
        whole = self.compute("same", self.reshaped(view, single).broadcast(pairs), dtype=view.dtype)
        return [self.reshaped(whole, out.dims)]

    @lowers("permute", Operation.moving(Rows.permute))
    def _permute(self, op: Op) -> list[View]:
        return [self.argument(op, 0).permuted(self.layout(op).order(op.args[1]))]

    @lowers("transpose", Operation.moving(Rows.transpose))
    def _transpose(self, op: Op) -> list[View]:
        return [self._swapped(op, op.args[1], op.args[2])]

    @lowers("t", Operation(Rows.t, linear=Linear.JOINTLY, moves=True))
    def _t(self, op: Op) -> list[View]:
        return [self._swapped(op, 0, -1)]

    def _swapped(self, op: Op, a: int, b: int) -> View:
        order = list(range(len(self.layout(op).shape)))
        order[a], order[b] = order[b], order[a]
        return self.argument(op, 0).permuted(self.layout(op).order(order))

    @lowers("flip", Operation(along(1, default=-1), linear=Linear.JOINTLY))
    def _flip(self, op: Op) -> list[View]:
        view = self.argument(op, 0)
        for d in op.args[1]:
            view = view.flipped(self.layout(op).dim(d, "a flip"))
        return [view]

    @lowers("diagonal", Operation(Rows.diagonal))
    def _diagonal(self, op: Op) -> list[View]:
        view, have = self.argument(op, 0), self.layout(op)
        one, other = (have.dim(self.argument(op, i, i - 2), "a diagonal") for i in (2, 3))
        shift = self.argument(op, 1, 0)
        length = self.shape_of(op)[-1]
        step = view.strides[one] + view.strides[other]
        kept = [d for d in range(len(view.dims)) if d not in (one, other)]
        start = max(shift, 0) * view.strides[other] - min(shift, 0) * view.strides[one]
        rest = view.permuted(kept)
        return [View(view.node, (*rest.dims, length), (*rest.strides, step), view.offset + start)]

    @lowers("unfold", Operation(along(1)))
    def _unfold(self, op: Op) -> list[View]:
        view, dim = self.argument(op, 0), self.layout(op).dim(op.args[1], "a window")
        strides = (*view.strides[:dim], view.strides[dim] * op.args[3], *view.strides[dim + 1 :], view.strides[dim])
        return [View(view.node, self.shape_of(op), strides, view.offset)]

    def cut(self, view: View, dim: int, start: int, length: int, step: int = 1) -> View:
        """A slice along a dimension; through cheap element-wise computations it goes to what these read."""
        node, dims = view.node, replaced(view.dims, dim, length)
        if type(node) is Compute and view.whole and OPERATIONS[node.name].cost == Cost.REGISTER:
            from_end = dim - len(view.dims)
            arguments = [
                self._cut_aligned(x, from_end, start, length, step) if isinstance(x, View) else x
                for x in node.arguments
            ]
            return self.compute(node.name, *arguments, dims=dims, dtype=node.dtype)
        strides = replaced(view.strides, dim, view.strides[dim] * step)
        return View(node, dims, strides, view.offset + start * view.strides[dim])

    def _cut_aligned(self, view: View, from_end: int, start: int, length: int, step: int) -> View:
        dim = len(view.dims) + from_end
        if dim < 0 or view.dims[dim] == 1:
            return view
        return self.cut(view, dim, start, length, step)

    @lowers("slice", Operation.moving(along(1, default=0)))
    def _slice(self, op: Op) -> list[View]:
        view, have = self.argument(op, 0), self.layout(op)
        axis = self.argument(op, 1, 0)
        start, stop, step = self.argument(op, 2), self.argument(op, 3), self.argument(op, 4, 1)
        if have.is_batch(axis):
            if start in (None, 0) and (stop is None or isinstance(stop, Size) or stop >= 2**62) and step == 1:
                return [view]
            raise UnsupportedError("a slice of the batch")
        dim = have.dim(axis)
        begin, end, stride = slice(start, stop, step).indices(view.dims[dim])
        return [self.cut(view, dim, begin, len(range(begin, end, stride)), stride)]

    @lowers("narrow", Operation(along(1)))
    def _narrow(self, op: Op) -> list[View]:
        dim = self.layout(op).dim(op.args[1], "a slice")
        return [self.cut(self.argument(op, 0), dim, op.args[2], op.args[3])]

    @lowers("select", Operation.moving(Rows.select))
    def _select(self, op: Op) -> list[View]:
        view, dim = self.argument(op, 0), self.layout(op).dim(op.args[1], "a selection")
        return [self.selected(view, dim, op.args[2] % view.dims[dim])]

    def selected(self, view: View, dim: int, index: int) -> View:
        """One entry of a dimension."""
        part = self.cut(view, dim, index, 1)
        return part.permuted([d for d in range(len(part.dims)) if d != dim])

    @lowers("unbind", Operation(Rows.select))
    def _unbind(self, op: Op) -> list[View]:
        view, dim = self.argument(op, 0), self.layout(op).dim(self.argument(op, 1, 0), "a selection")
        return [self.selected(view, dim, index) for index in range(view.dims[dim])]

    @lowers("glu", Operation(along(1, default=-1)))
    def _glu(self, op: Op) -> list[View]:
        view, dim = self.argument(op, 0), self.layout(op).dim(self.argument(op, 1, -1), "a gate")
        half = view.dims[dim] // 2
        gate = self.compute("sigmoid", self.cut(view, dim, half, half))
        return [self.compute("mul", self.cut(view, dim, 0, half), gate)]

    @lowers("split split_with_sizes", Operation.moving(along(2, default=0)))
    @lowers("unsafe_split", Operation(along(2, default=0), cost=Cost.FUSED, moves=True))
    def _split(self, op: Op) -> list[View]:
        view, step = self.argument(op, 0), op.args[1]
        dim = self.layout(op).dim(self.argument(op, 2, 0), "a split")
        lengths = [self.shape_of(op, i)[dim] if v >= 0 else None for i, v in enumerate(op.outputs)]
        starts = (
            [sum(step[:i]) for i in range(len(step))] if isinstance(step, tuple) else range(0, view.dims[dim], step)
        )
        return [
            self.cut(view, dim, start, length) if length is not None else view
            for start, length in zip(starts, lengths, strict=False)
        ]


def _restrided(view: View, dims: Sequence[int]) -> tuple[int, ...] | None:
    """The strides that show the same entries in another shape; None if there are none."""
    if not dims:
        return ()
    if view.strides == contiguous(view.dims):
        return contiguous(dims)
    if [n for n in view.dims if n != 1] == [n for n in dims if n != 1]:
        left = iter([s for n, s in zip(view.dims, view.strides, strict=True) if n != 1])
        return tuple(0 if n == 1 else next(left) for n in dims)
    return None
