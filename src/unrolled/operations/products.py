"""Products: rows times a fixed matrix, and a row's matrices times each other."""

from __future__ import annotations

from unrolled.internals import broadcast_shape
from unrolled.operations.layout import UnsupportedError
from unrolled.operations.nodes import Compute, Input, MatrixProduct, Product, Scalar, View
from unrolled.operations.operation import Cost, Linear, Operation, lowers
from unrolled.operations.reductions import Reductions
from unrolled.operations.row_rules import Rows
from unrolled.recording.program import Op


class Products(Reductions):
    """Products by the kernel where the matrix is fixed and of two dimensions; others matrix by matrix."""

    @lowers("mm", Operation(Rows.mm, cost=Cost.MATRIX, linear=Linear.EACH, contracts=(1, 0), factors=(0, 1)))
    def _mm(self, op: Op) -> list[View]:
        return [self._by_matrix(op, 0, 1)]

    @lowers("addmm", Operation(Rows.addmm, cost=Cost.MATRIX, factors=(1, 2)))
    def _addmm(self, op: Op) -> list[View]:
        return [self._added(op, self._by_matrix(op, 1, 2))]

    @lowers("bmm", Operation(Rows.bmm, linear=Linear.EACH, contracts=(2, 1), factors=(0, 1)))
    def _bmm(self, op: Op) -> list[View]:
        return [self._batched(op, 0, 1)]

    @lowers("baddbmm", Operation(Rows.bmm, factors=(1, 2)))
    def _baddbmm(self, op: Op) -> list[View]:
        return [self._added(op, self._batched(op, 1, 2))]

    @lowers("mv", Operation(Rows.mm, linear=Linear.EACH))
    def _mv(self, op: Op) -> list[View]:
        if self.layout(op, 0).place != 0 or self.layout(op, 1).place is not None:
            raise UnsupportedError("a product that is not of rows with a fixed vector")
        row = self.argument(op, 0)
        return [self.reshaped(self._multiplied(row.unsqueezed(0), self.argument(op, 1).unsqueezed(1)), row.dims[:-1])]

    def _added(self, op: Op, result: View) -> View:
        """What is added to a product. A factor of zero hides even NaN."""
        factors = dict(op.kwargs)
        beta, alpha = factors.get("beta", 1), factors.get("alpha", 1)
        result = self._scaled(result, alpha)
        if beta == 0:
            return result
        return self.compute("add", result, self._scaled(self.aligned(op.args[0], self.layout_of(op)), beta))

    def _scaled(self, view: View, factor: Scalar) -> View:
        return view if factor == 1 else self.compute("mul", view, factor)

    def _by_matrix(self, op: Op, left: int, right: int) -> View:
        row, matrix = self.argument(op, left), self.argument(op, right)
        leaf = matrix.node
        if self.layout(op, left).place != 0 or not isinstance(leaf, Input) or leaf.rows:
            raise UnsupportedError("a product that is not of rows with a fixed matrix")
        if not _readable(row):
            row = self.compute("same", row, dtype=row.dtype)
        return self.add(Product((*row.dims[:-1], matrix.dims[1]), self.real, row, matrix))

    def _batched(self, op: Op, left: int, right: int) -> View:
        """Matrices `[n, k]` times matrices `[k, m]`; the batch is n, or m, or counts them."""
        one, other = self.layout(op, left), self.layout(op, right)
        a, b = self.argument(op, left), self.argument(op, right)
        if (one.place, other.place) not in ((0, 0), (1, None), (None, 2)):
            raise UnsupportedError("a batched product that adds up over the batch")
        if one.place == 1 and one.many == 1:
            a = a.unsqueezed(len(a.dims) - 1)
        if other.place == 2 and other.many == 1:
            b = b.unsqueezed(len(b.dims))
        return self.reshaped(self._multiplied(a, b), self.shape_of(op))

    def _multiplied(self, a: View, b: View) -> View:
        """Matrices `[..., n, k]` times `[..., k, m]`. One column is a row of the product turned around."""
        many = broadcast_shape(a.dims[:-2], b.dims[:-2])
        if b.dims[-1] == 1:
            a, b = _turned(b), _turned(a)
        n, m = a.dims[-2], b.dims[-1]
        a, b = (view.broadcast((*many, *view.dims[-2:])) for view in (a, b))
        return self.add(MatrixProduct((*many, n, m), self.real, a, b))


def _turned(view: View) -> View:
    rank = len(view.dims)
    return view.permuted([*range(rank - 2), rank - 1, rank - 2])


def _readable(row: View) -> bool:
    """Whether the kernel finds the rows where a view has them: each a run, and one after the other if many."""
    if len(row.dims) > 1:
        return row.whole and not isinstance(row.node, Input)
    return row.strides == (1,) and (row.whole or not isinstance(row.node, Compute))
