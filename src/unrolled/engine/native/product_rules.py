"""Lowering products: rows times a fixed matrix, and a row's matrices times each other."""

from __future__ import annotations

from unrolled.engine.native.layout import UnsupportedError
from unrolled.engine.native.nodes import Compute, Leaf, Product, View, thick
from unrolled.engine.native.reduction_rules import ReductionRules
from unrolled.engine.native.scalars import Scalar
from unrolled.recording.program import Op


class ProductRules(ReductionRules):
    """Products by the kernel where the matrix is fixed and of two dimensions; others entry by entry, added up."""

    def do_mm(self, op: Op) -> list[View]:
        return [self._by_matrix(op, 0, 1)]

    def do_addmm(self, op: Op) -> list[View]:
        return [self._added(op, self._by_matrix(op, 1, 2))]

    def do_bmm(self, op: Op) -> list[View]:
        return [self._batched(op, 0, 1)]

    def do_baddbmm(self, op: Op) -> list[View]:
        return [self._added(op, self._batched(op, 1, 2))]

    def do_mv(self, op: Op) -> list[View]:
        if self.layout(op, 0).place != 0 or self.layout(op, 1).place is not None:
            raise UnsupportedError("a product that is not of rows with a fixed vector")
        return [self._contracted(self.given(op, 0), self.given(op, 1))]

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
        row, matrix = self.given(op, left), self.given(op, right)
        leaf = matrix.node
        fixed = isinstance(leaf, Leaf) and not leaf.rows and matrix.whole
        if self.layout(op, left).place != 0 or not isinstance(leaf, Leaf) or not fixed:
            raise UnsupportedError("a product that is not of rows with a fixed matrix")
        if not _readable(row):
            row = self.compute("copy", row, dtype=row.dtype)
        return self.add(Product((*row.dims[:-1], leaf.dims[1]), self.real, row, leaf))

    def _batched(self, op: Op, left: int, right: int) -> View:
        """Matrices `[n, k]` times matrices `[k, m]`; the batch is n, or m, or counts them."""
        one, other = self.layout(op, left), self.layout(op, right)
        a, b = self.given(op, left), self.given(op, right)
        if (one.place, other.place) not in ((0, 0), (1, None), (None, 2)):
            raise UnsupportedError("a batched product that adds up over the batch")
        if one.place == 1 and one.many == 1:
            a = thick(a, len(a.dims) - 1)
        if other.place == 2 and other.many == 1:
            b = thick(b, len(b.dims))
        turned = self.ordered(b, [*range(len(b.dims) - 2), len(b.dims) - 1, len(b.dims) - 2])
        result = self._contracted(thick(a, len(a.dims) - 1), thick(turned, len(turned.dims) - 2))
        return self.reshaped(result, self.shape_of(op))

    def _contracted(self, a: View, b: View) -> View:
        """Entries multiplied, and added up along the last dimension."""
        terms = self.compute("mul", a, b)
        result = self.reduced("sum", terms, [len(terms.dims) - 1])
        return self.reshaped(result, terms.dims[:-1])


def _readable(row: View) -> bool:
    """Whether the kernel finds the rows where a view has them: each a run, and one after the other if many."""
    if len(row.dims) > 1:
        return row.whole and not isinstance(row.node, Leaf)
    return row.strides == (1,) and (row.whole or not isinstance(row.node, Compute))
