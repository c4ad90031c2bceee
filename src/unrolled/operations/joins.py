"""Joins: operations that write tensors side by side; and values that are made of numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from unrolled.operations.layout import RowLayout, UnsupportedError
from unrolled.operations.nodes import Join, Scalar, Scan, View, Write, contiguous, replaced
from unrolled.operations.operation import Cost, Linear, Operation, lowers
from unrolled.operations.row_rules import Rows, along
from unrolled.operations.views import Views
from unrolled.recording.program import Op, Size


class Joins(Views):
    """Joins, padding, the backward of slices, and constants."""

    @lowers("cat", Operation.moving(Rows.cat))
    def _cat(self, op: Op) -> list[View]:
        refs, out = op.args[0], self.layout_of(op)
        dim = out.dim(self.argument(op, 1, dict(op.kwargs).get("dim", 0)), "a join")
        pieces = [self.aligned(ref, out) for ref in refs if len(self.values[ref.value].shape) == len(out.shape)]
        return [self.joined(out.dims, dim, pieces, pieces[0].dtype)]

    @lowers("stack", Operation(Rows.stack, linear=Linear.JOINTLY, moves=True))
    def _stack(self, op: Op) -> list[View]:
        out = self.layout_of(op)
        dim = out.dim(self.argument(op, 1, 0), "a stack")
        pieces = [self.views[ref.value].unsqueezed(dim) for ref in op.args[0]]
        return [self.joined(out.dims, dim, pieces, pieces[0].dtype)]

    def joined(self, dims: tuple[int, ...], dim: int, pieces: Sequence[View], dtype: torch.dtype) -> View:
        """Pieces written side by side along a dimension."""
        starts = accumulate((piece.dims[dim] for piece in pieces), initial=0)
        return self.placed(dims, dim, [(piece, start, 1) for piece, start in zip(pieces, starts, strict=False)], dtype)

    def placed(
        self, dims: tuple[int, ...], dim: int, pieces: Sequence[tuple[View, int, int]], dtype: torch.dtype
    ) -> View:
        """Pieces written along a dimension, each from some entry on in some steps; together they are all there is."""
        join = Join(dims, dtype)
        place = View(join, dims, contiguous(dims))
        for piece, start, step in pieces:
            part = replaced(dims, dim, piece.dims[dim])
            strides = replaced(place.strides, dim, place.strides[dim] * step)
            write = Write(part, dtype, "same", (piece,), View(join, part, strides, start * place.strides[dim]))
            self.nodes.append(write)
            join.pieces.append(write)
        self.nodes.append(join)
        return place

    @lowers("slice_backward", Operation.moving(Rows.slice_backward))
    def _slice_backward(self, op: Op) -> list[View]:
        view, out = self.argument(op, 0), self.layout_of(op)
        dim = out.dim(op.args[2], "the backward of a slice")
        begin, _, _ = slice(op.args[3], op.args[4]).indices(out.dims[dim])
        return [self.padded(view, out.dims, dim, begin, op.args[5])]

    @lowers("select_backward", Operation.moving(Rows.select_backward))
    def _select_backward(self, op: Op) -> list[View]:
        view, out = self.argument(op, 0), self.layout_of(op)
        dim = out.dim(op.args[2], "the backward of a selection")
        return [self.padded(view.unsqueezed(dim), out.dims, dim, op.args[3] % out.dims[dim])]

    @lowers("slice_scatter", Operation.moving(Rows.slice_scatter))
    def _slice_scatter(self, op: Op) -> list[View]:
        whole, part, out = self.argument(op, 0), self.argument(op, 1), self.layout_of(op)
        axis = self.argument(op, 2, 0)
        start, stop, step = self.argument(op, 3), self.argument(op, 4), self.argument(op, 5, 1)
        if out.is_batch(axis) and start in (None, 0) and (stop is None or isinstance(stop, Size) or stop >= 2**62):
            return [part]
        dim = out.dim(axis, "a write")
        begin, _, _ = slice(start, stop).indices(out.dims[dim])
        return [self.put_into(whole.broadcast(out.dims), part, dim, begin, step)]

    @lowers("select_scatter", Operation.moving(Rows.select_scatter))
    def _select_scatter(self, op: Op) -> list[View]:
        whole, part, out = self.argument(op, 0), self.argument(op, 1), self.layout_of(op)
        dim = out.dim(op.args[2], "a write")
        return [self.put_into(whole.broadcast(out.dims), part.unsqueezed(dim), dim, op.args[3] % out.dims[dim])]

    def padded(
        self, view: View, dims: tuple[int, ...], dim: int, begin: int, step: int = 1, fill: Scalar = 0.0
    ) -> View:
        """A view put into a dimension of what is otherwise all one number."""
        return self.put_into(self.compute("literal", fill, dims=dims, dtype=view.dtype), view, dim, begin, step)

    def put_into(self, whole: View, part: View, dim: int, begin: int, step: int = 1) -> View:
        """A view in which the entries of a dimension from some on, in some steps, are those of another one."""
        length, count = whole.dims[dim], part.dims[dim]
        end = min(begin + step * count, length)
        runs = [range(begin), *(range(begin + between, end, step) for between in range(1, step)), range(end, length)]
        pieces = [(part, begin, step)] if count else []
        pieces += [(self.cut(whole, dim, run.start, len(run), run.step), run.start, run.step) for run in runs if run]
        return self.placed(whole.dims, dim, pieces, whole.dtype)

    @lowers("constant_pad_nd", Operation(Rows.pad, linear=Linear.JOINTLY, fill=2))
    def _constant_pad_nd(self, op: Op) -> list[View]:
        view, have = self.argument(op, 0), self.layout(op)
        sides, fill = op.args[1], self.argument(op, 2, 0)
        for back, (before, after) in enumerate(zip(sides[::2], sides[1::2], strict=True)):
            if before or after:
                dim = have.dim(-1 - back, "padding")
                left = view.dims[dim] + min(before, 0) + min(after, 0)
                view = self.cut(view, dim, max(-before, 0), left)
                longer = replaced(view.dims, dim, left + max(before, 0) + max(after, 0))
                view = self.padded(view, longer, dim, max(before, 0), 1, float(fill))
        return [view]

    @lowers("roll", Operation(along(2)))
    def _roll(self, op: Op) -> list[View]:
        view, have = self.argument(op, 0), self.layout(op)
        if not self.argument(op, 2, ()):
            raise UnsupportedError("a roll along the batch")
        for shift, d in zip(op.args[1], op.args[2], strict=True):
            dim = have.dim(d, "a roll")
            length = view.dims[dim]
            last = shift % length if length else 0
            parts = [self.cut(view, dim, length - last, last), self.cut(view, dim, 0, length - last)]
            view = self.joined(view.dims, dim, parts, view.dtype)
        return [view]

    # -- values that are made of numbers alone

    @lowers("zeros new_zeros", Operation(alike=True))
    @lowers("zeros_like", Operation(Rows.first))
    def _zeros(self, op: Op) -> list[View]:
        return self._literal(op, 0.0)

    @lowers("ones new_ones", Operation(alike=True))
    @lowers("ones_like", Operation(Rows.first))
    def _ones(self, op: Op) -> list[View]:
        return self._literal(op, 1.0)

    @lowers("full", Operation(alike=True, cost=Cost.FUSED, moves=True))
    @lowers("new_full", Operation(alike=True))
    @lowers("full_like", Operation(Rows.first))
    @lowers("scalar_tensor", Operation(alike=True, cost=Cost.FUSED))
    def _full(self, op: Op) -> list[View]:
        return self._literal(op, op.args[-1])

    @lowers("arange", Operation())
    def _arange(self, op: Op) -> list[View]:
        """Counted: a running sum of ones."""
        known = self.values[op.outputs[0]]
        ends = op.args
        start, step = (ends[0] if len(ends) > 1 else 0), (ends[2] if len(ends) > 2 else 1)
        dims, dtype = RowLayout.of(known).dims, self.checked(known.dtype)
        kind = self.real if dtype == self.real else torch.int64
        ones = self.compute("literal", 1, dims=dims, dtype=kind)
        counted = self.add(Scan(dims, kind, "cumsum", ones, dims[0]))
        steps = self.compute("mul", counted, step, dtype=kind)
        return [self.cast(self.compute("add", steps, start - step, dtype=kind), dtype)]

    def _literal(self, op: Op, number: Scalar) -> list[View]:
        value = self.values[op.outputs[0]]
        return [self.compute("literal", number, dims=RowLayout.of(value).dims, dtype=self.checked(value.dtype))]
