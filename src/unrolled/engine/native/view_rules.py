"""Lowering operations that only look at what is there in another way."""

from __future__ import annotations

from collections.abc import Sequence

from unrolled.engine.native.layout import UnsupportedError
from unrolled.engine.native.nodes import Compute, Copy, View, contiguous
from unrolled.engine.native.rules import Rules
from unrolled.engine.native.scalars import ELEMENTWISE
from unrolled.recording.program import Op, Size


class ViewRules(Rules):
    """Views, slices, splits, permutations, expansions."""

    def do_alias(self, op: Op) -> list[View]:
        return [self.given(op, 0)]

    do_detach = do_clone = do_lift_fresh = do_real = do_positive = do_alias

    def do_to_copy(self, op: Op) -> list[View]:
        return [self.cast(self.given(op, 0), dict(op.kwargs).get("dtype"))]

    def do_to(self, op: Op) -> list[View]:
        return [self.cast(self.given(op, 0), op.args[1])]

    def do_view(self, op: Op) -> list[View]:
        view, have, want = self.given(op, 0), self.layout(op), self.layout_of(op)
        if (have.place is None) != (want.place is None) or have.before != want.before:
            raise UnsupportedError("a view that moves the batch")
        return [self.reshaped(view, want.dims)]

    do_unsafe_view = do_reshape = do_unsqueeze = do_squeeze = do_view

    def reshaped(self, view: View, dims: tuple[int, ...]) -> View:
        """A row's entries in another shape; copied where no strides show them so."""
        strides = _restrided(view, dims)
        if strides is None:
            view = self.compute("copy", view, dtype=view.dtype)
            return View(view.node, dims, contiguous(dims))
        return View(view.node, dims, strides, view.offset)

    def do_expand(self, op: Op) -> list[View]:
        out = self.layout_of(op)
        view = self.aligned(op.args[0], out) if out.place is not None else self.given(op, 0)
        return [self.spread(view, out.dims)]

    def do_repeat(self, op: Op) -> list[View]:
        out, times = self.layout_of(op), op.args[1]
        if out.place is None or times[out.place] != 1 or out.many != 1:
            raise UnsupportedError("a repetition of rows")
        view = self.aligned(op.args[0], out)
        times = [n for d, n in enumerate(times) if d != out.place]
        sizes = (1,) * (len(times) - len(view.dims)) + view.dims
        pairs = tuple(n for pair in zip(times, sizes, strict=True) for n in pair)
        single = tuple(n for size in sizes for n in (1, size))
        whole = self.compute("copy", self.spread(self.reshaped(view, single), pairs), dtype=view.dtype)
        return [self.reshaped(whole, out.dims)]

    def do_permute(self, op: Op) -> list[View]:
        return [self.ordered(self.given(op, 0), self.layout(op).order(op.args[1]))]

    def do_transpose(self, op: Op) -> list[View]:
        return [self._swapped(op, op.args[1], op.args[2])]

    def do_t(self, op: Op) -> list[View]:
        return [self._swapped(op, 0, -1)]

    def _swapped(self, op: Op, a: int, b: int) -> View:
        order = list(range(len(self.layout(op).shape)))
        order[a], order[b] = order[b], order[a]
        return self.ordered(self.given(op, 0), self.layout(op).order(order))

    def do_flip(self, op: Op) -> list[View]:
        view = self.given(op, 0)
        for d in op.args[1]:
            view = _turned(view, self.layout(op).dim(d, "a flip"))
        return [view]

    def do_diagonal(self, op: Op) -> list[View]:
        view, have = self.given(op, 0), self.layout(op)
        one, other = (have.dim(self.given(op, i, i - 2), "a diagonal") for i in (2, 3))
        aside = self.given(op, 1, 0)
        length = self.shape_of(op)[-1]
        step = view.strides[one] + view.strides[other]
        kept = [d for d in range(len(view.dims)) if d not in (one, other)]
        start = max(aside, 0) * view.strides[other] - min(aside, 0) * view.strides[one]
        rest = self.ordered(view, kept)
        return [View(view.node, (*rest.dims, length), (*rest.strides, step), view.offset + start)]

    def do_unfold(self, op: Op) -> list[View]:
        view, dim = self.given(op, 0), self.layout(op).dim(op.args[1], "a window")
        strides = (*view.strides[:dim], view.strides[dim] * op.args[3], *view.strides[dim + 1 :], view.strides[dim])
        return [View(view.node, self.shape_of(op), strides, view.offset)]

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
        view, have = self.given(op, 0), self.layout(op)
        along = self.given(op, 1, 0)
        start, stop, step = self.given(op, 2), self.given(op, 3), self.given(op, 4, 1)
        if have.is_batch(along):
            if start in (None, 0) and (stop is None or isinstance(stop, Size) or stop >= 2**62) and step == 1:
                return [view]
            raise UnsupportedError("a slice of the batch")
        dim = have.dim(along)
        begin, end, stride = slice(start, stop, step).indices(view.dims[dim])
        return [self.cut(view, dim, begin, len(range(begin, end, stride)), stride)]

    def do_narrow(self, op: Op) -> list[View]:
        dim = self.layout(op).dim(op.args[1], "a slice")
        return [self.cut(self.given(op, 0), dim, op.args[2], op.args[3])]

    def do_select(self, op: Op) -> list[View]:
        view, dim = self.given(op, 0), self.layout(op).dim(op.args[1], "a selection")
        return [self._selected(view, dim, op.args[2] % view.dims[dim])]

    def _selected(self, view: View, dim: int, index: int) -> View:
        part = self.cut(view, dim, index, 1)
        return self.ordered(part, [d for d in range(len(part.dims)) if d != dim])

    def do_unbind(self, op: Op) -> list[View]:
        view, dim = self.given(op, 0), self.layout(op).dim(self.given(op, 1, 0), "a selection")
        return [self._selected(view, dim, index) for index in range(view.dims[dim])]

    def do_glu(self, op: Op) -> list[View]:
        view, dim = self.given(op, 0), self.layout(op).dim(self.given(op, 1, -1), "a gate")
        half = view.dims[dim] // 2
        gate = self.compute("sigmoid", self.cut(view, dim, half, half))
        return [self.compute("mul", self.cut(view, dim, 0, half), gate)]

    def do_split(self, op: Op) -> list[View]:
        view, step = self.given(op, 0), op.args[1]
        dim = self.layout(op).dim(self.given(op, 2, 0), "a split")
        lengths = [self.shape_of(op, i)[dim] if v >= 0 else None for i, v in enumerate(op.outputs)]
        starts = (
            [sum(step[:i]) for i in range(len(step))] if isinstance(step, tuple) else range(0, view.dims[dim], step)
        )
        return [
            self.cut(view, dim, start, length) if length is not None else view
            for start, length in zip(starts, lengths, strict=False)
        ]

    do_split_with_sizes = do_unsafe_split = do_split


def _turned(view: View, dim: int) -> View:
    strides = (*view.strides[:dim], -view.strides[dim], *view.strides[dim + 1 :])
    return View(view.node, view.dims, strides, view.offset + max(view.dims[dim] - 1, 0) * view.strides[dim])


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
