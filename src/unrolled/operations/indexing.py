"""Indexing: entries read and written at places that are computed.

An index that is out of range reads and writes nothing: the numbers are declined, and torch raises its error for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from unrolled.internals import broadcast_shape
from unrolled.operations.index_rules import along_index, index, index_put, indices_of, scatter
from unrolled.operations.layout import RowLayout, UnsupportedError
from unrolled.operations.nodes import At, Put, Take, View, contiguous, replaced
from unrolled.operations.operation import Linear, Operation, lowers
from unrolled.operations.row_rules import Rows
from unrolled.operations.views import Views
from unrolled.recording.program import Op, Ref
from unrolled.recording.selection import Selected, selection


class Indexing(Views):
    """Gather and scatter, indices by tensors, tables."""

    def taken(self, source: View, index: View, dim: int, *, from_end: bool = False) -> View:
        """Entries of a dimension of a view: an index for each entry of the result."""
        read = View(source.node, index.dims, replaced(source.strides, dim, 0), source.offset)
        return self.add(Take(index.dims, source.dtype, read, (self._at(index, source, dim, from_end),)))

    def put(self, base: View, source: View, index: View, dim: int, *, added: bool, from_end: bool = False) -> View:
        """A view with entries written into a dimension: an index for each entry of what is written."""
        at = self._at(index, replace(base, strides=contiguous(base.dims)), dim, from_end)
        strides = replaced(contiguous(base.dims), dim, 0)
        return self.add(Put(base.dims, base.dtype, base, source, strides, (at,), added))

    def _at(self, index: View, view: View, dim: int, from_end: bool) -> At:
        if not view.dims[dim]:
            raise UnsupportedError("an index of what is empty")
        return At(index, view.strides[dim], view.dims[dim], from_end)

    # -- along one dimension, an index for each entry

    @lowers("gather", Operation(Rows.gather, linear=Linear.JOINTLY))
    def _gather(self, op: Op) -> list[View]:
        have, places = self.layout(op), self.layout(op, 2)
        if (have.place, have.many) != (places.place, places.many):
            raise UnsupportedError("an index that goes across rows")
        return [self.taken(self.argument(op, 0), self.argument(op, 2), have.dim(op.args[1], "an index"))]

    @lowers("scatter scatter_add scatter_reduce", Operation(scatter))
    def _scatter(self, op: Op) -> list[View]:
        have, places, written = self.layout(op), self.layout(op, 2), op.args[3]
        if (have.place, have.many) != (places.place, places.many):
            raise UnsupportedError("an index that goes across rows")
        base, index = self.argument(op, 0), self.argument(op, 2)
        source = self.written(written, base, index.dims)
        dim = have.dim(op.args[1], "an index")
        return [self.put(base, source, index, dim, added=self._adds(op))]

    def _adds(self, op: Op) -> bool:
        """Whether what a scatter writes is added to what is there."""
        how = self.argument(op, 4, dict(op.kwargs).get("reduce"))
        if how is None:
            return op.base == "scatter_add"
        if how not in ("add", "sum") or not self.argument(op, 5, dict(op.kwargs).get("include_self", True)):
            raise UnsupportedError(f"{op.base} by {how!r}")
        return True

    def written(self, source: Any, base: View, dims: tuple[int, ...]) -> View:
        """What is written, over these dimensions: the first entries of a view, or a number."""
        if not isinstance(source, Ref):
            return self.compute("literal", source, dims=(), dtype=base.dtype).broadcast(dims)
        view = self.views[source.value]
        return replace(view, dims=dims) if view.dims or not dims else view.broadcast(dims)

    # -- along one dimension, an index that is the same for all other entries

    @lowers("index_select", Operation(Rows.index_select, linear=Linear.JOINTLY))
    def _index_select(self, op: Op) -> list[View]:
        rank = len(self.layout(op).shape)
        dim, index = op.args[1] % max(rank, 1), op.args[2]
        dims = [Selected(None, -1) if d == dim else Selected(d, None) for d in range(rank)]
        return [self._selected_entries(op, dims, {dim: index}, from_end=False)]

    @lowers("embedding", Operation(Rows.embedding))
    def _embedding(self, op: Op) -> list[View]:
        index = op.args[1]
        dims = selection(2, {0: len(self.values[index.value].shape)})
        return [self._selected_entries(op, dims, {0: index}, from_end=False)]

    @lowers("index_add index_copy index_fill", Operation(along_index))
    def _along_index(self, op: Op) -> list[View]:
        base, have, index = self.argument(op, 0), self.layout(op), self.argument(op, 2)
        dim, source = have.dim(op.args[1], "an index"), op.args[3]
        if self.layout(op, 2).place is not None:
            raise UnsupportedError("an index that goes across rows")
        dims = replaced(base.dims, dim, index.dims[0] if index.dims else 1)
        view = self.written(source, base, dims)
        alpha = dict(op.kwargs).get("alpha", 1)
        if alpha != 1:
            view = self.compute("mul", view, alpha, dtype=base.dtype)
        strides = replaced((0,) * len(dims), dim, index.strides[0] if index.dims else 0)
        places = View(index.node, dims, strides, index.offset)
        fills = op.base == "index_fill"
        return [self.put(base, view, places, dim, added=op.base == "index_add", from_end=fills)]

    # -- along some dimensions, indices that broadcast

    @lowers("index _unsafe_index", Operation(index, linear=Linear.JOINTLY))
    def _index(self, op: Op) -> list[View]:
        indices = self._indices(op)
        return [self._selected_entries(op, self._dims_of(op, indices), indices, from_end=True)]

    def _selected_entries(
        self, op: Op, dims: Sequence[Selected], indices: Mapping[int, Ref], *, from_end: bool
    ) -> View:
        out, ref = self.layout_of(op), op.args[0]
        source = self._spread(ref, [d.own for d in dims], out)
        view, have = self.views[ref.value], RowLayout.of(self.values[ref.value])
        at = self._places(indices, dims, out, view, have, from_end=from_end)
        return self.add(Take(out.dims, view.dtype, source, at))

    @lowers("index_put _unsafe_index_put", Operation(index_put))
    def _index_put(self, op: Op) -> list[View]:
        indices, base, have, written = self._indices(op), self.argument(op, 0), self.layout(op), op.args[2]
        dims = self._dims_of(op, indices)
        place = next((r for r, d in enumerate(dims) if d.own is not None and d.own == have.place), None)
        area = RowLayout(self._shape_of_selected(op, dims, indices), place, 1)
        more = len(dims) - len(self.values[written.value].shape)
        source = self._spread(written, [r - more if r >= more else None for r in range(len(dims))], area)
        memory = View(base.node, base.dims, contiguous(base.dims))
        at = self._places(indices, dims, area, memory, have, from_end=True)
        own = [d.own for r, d in enumerate(dims) if r != place]
        strides = tuple(0 if d is None else memory.strides[have.dim(d)] for d in own)
        added = bool(self.argument(op, 3, False))
        return [self.add(Put(base.dims, base.dtype, base, source, strides, at, added))]

    def _places(
        self,
        indices: Mapping[int, Ref],
        dims: Sequence[Selected],
        area: RowLayout,
        memory: View,
        have: RowLayout,
        *,
        from_end: bool,
    ) -> tuple[At, ...]:
        """Where indices point to, over the dimensions that they select."""
        spread = {have.dim(d, "an index"): self._spread_index(index, dims, area) for d, index in indices.items()}
        return tuple(self._at(index, memory, d, from_end) for d, index in spread.items())

    def _indices(self, op: Op) -> dict[int, Ref]:
        found = indices_of(op.args[1])
        if self.layout(op).many != 1 or not found or any(not self._is_index(ref) for ref in found.values()):
            raise UnsupportedError(f"{op.base} by a mask")
        return found

    def _is_index(self, ref: Ref) -> bool:
        dtype = self.values[ref.value].dtype
        return not dtype.is_floating_point and dtype.itemsize > 1

    def _dims_of(self, op: Op, indices: Mapping[int, Ref]) -> list[Selected]:
        return selection(
            len(self.layout(op).shape), {d: len(self.values[ref.value].shape) for d, ref in indices.items()}
        )

    def _shape_of_selected(self, op: Op, dims: Sequence[Selected], indices: Mapping[int, Ref]) -> tuple[Any, ...]:
        own, shapes = self.layout(op).shape, [self.values[ref.value].shape for ref in indices.values()]
        if any(not isinstance(n, int) for shape in shapes for n in shape):
            raise UnsupportedError("an index that goes across rows")
        together = broadcast_shape(*cast("list[tuple[int, ...]]", shapes))
        return tuple(together[d.of_index] if d.of_index is not None else own[d.own or 0] for d in dims)

    def _spread_index(self, ref: Ref, dims: Sequence[Selected], out: RowLayout) -> View:
        rank = len(self.values[ref.value].shape)
        own = [d.of_index + rank if d.of_index is not None and d.of_index + rank >= 0 else None for d in dims]
        return self._spread(ref, own, out)

    def _spread(self, ref: Ref, own: Sequence[int | None], out: RowLayout) -> View:
        """A value over the dimensions of a row of `out`: for each of torch's, which of the value's own it is."""
        view, have = self.views[ref.value], RowLayout.of(self.values[ref.value])
        meets = have.place is None or (out.place is not None and own[out.place] == have.place)
        if have.many != 1 or out.many != 1 or not meets:
            raise UnsupportedError("an index that goes across rows")
        if out.place is not None and have.place is None:
            d = own[out.place]
            if d is not None and have.shape[d] != 1:
                raise UnsupportedError("an index of what is as long as the rows are")
        rest = [d for r, d in enumerate(own) if r != out.place]
        strides = tuple(0 if d is None or have.shape[d] == 1 else view.strides[have.dim(d)] for d in rest)
        return View(view.node, out.dims, strides, view.offset)
