"""Row rules: for each kind of operation in which dimension its results have the rows of the batch.

A rule is a method of `Rows`. An operation that has no rule, or whose rule does not apply, couples rows until proved
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

from unrolled.recording.program import Op, Program, Ref, Size

Place: TypeAlias = int | None
"""The dimension of the rows; None for a value without rows."""


class CouplesRowsError(Exception):
    """An operation that is not proved to act row by row; the message says why."""


@dataclass(frozen=True)
class Rows:
    """One operation of a program, and where the rows of the values before it are.

    Every method that returns a list of places is a rule: the places of the rows in the operation's results.

    Raises:
        CouplesRowsError: by every rule, where a row of the result may depend on other rows.
    """

    program: Program
    op: Op
    places: Mapping[int, int]

    def arg(self, index: int, default: Any = None) -> Any:
        """An argument by its position."""
        return self.op.args[index] if index < len(self.op.args) else default

    def keyword(self, name: str, default: Any = None) -> Any:
        """An argument by its name."""
        return dict(self.op.kwargs).get(name, default)

    def shape(self, ref: Ref) -> tuple[int | Size, ...]:
        """The shape of a value that the operation reads."""
        return self.program.values[ref.value].shape

    def place(self, ref: Any) -> Place:
        """Where the rows of an argument are."""
        return self.places.get(ref.value) if isinstance(ref, Ref) else None

    def out(self, index: int = 0) -> tuple[int | Size, ...]:
        """The shape of a result."""
        return self.program.values[self.op.outputs[index]].shape

    def refusal(self, why: str) -> CouplesRowsError:
        """The error that names the operation and says why it couples rows."""
        return CouplesRowsError(f"{self.op.name} {why}")

    # -- rules for many operations

    def all_at(self, place: Place) -> list[Place]:
        """The same place in all results."""
        return [place if value >= 0 else None for value in self.op.outputs]

    def first(self) -> list[Place]:
        """Where the first argument has them."""
        return self.all_at(self.place(self.arg(0)))

    def pointwise(self) -> list[Place]:
        """What is done entry by entry: all that is read must have its rows in the same place."""
        rank = len(self.out())
        found = set()
        for value in self.op.inputs:
            if value in self.places:
                shape, place = self.program.values[value].shape, self.places[value]
                found.add((place + rank - len(shape), shape[place]))
        if len(found) != 1:
            raise self.refusal("combines rows with other rows")
        place, size = found.pop()
        if self.out()[place] != size:
            raise self.refusal("combines rows with another dimension")
        return self.all_at(place)

    def created(self, *, alike: bool) -> list[Place]:
        """Results of no operand with rows: the dimension as long as the batch, if all rows of it are alike."""
        return [self._created(value, alike) for value in self.op.outputs]

    def _created(self, value: int, alike: bool) -> Place:
        shape = self.program.values[value].shape if value >= 0 else ()
        sized = [d for d, n in enumerate(shape) if isinstance(n, Size)]
        if not sized:
            return None
        if len(sized) > 1 or shape[sized[0]].constant or not alike:  # type: ignore[union-attr]
            raise self.refusal("makes a tensor whose shape depends on the batch size")
        return sized[0]

    # -- products

    def mm(self) -> list[Place]:
        """A product of two matrices, one of which has no rows of the batch."""
        left, right = self._factors()
        return self.all_at(self._product(left, right, 0, 1))

    def addmm(self) -> list[Place]:
        """A product with a bias."""
        place = self.mm()[0]
        bias = self.arg(0)
        have = self.place(bias)
        if have is not None and have + 2 - len(self.shape(bias)) != place:
            raise self.refusal("adds rows to other rows")
        return [place]

    def bmm(self) -> list[Place]:
        """Products of many matrices: the batch counts them, or is in one factor."""
        left, right = self._factors()
        return [0] if (left, right) == (0, 0) else [self._product(left, right, 1, 2)]

    def _factors(self) -> tuple[Place, Place]:
        left, right = self.op.args[-2:] if len(self.op.args) == 2 else self.op.args[1:3]
        return self.place(left), self.place(right)

    def _product(self, left: Place, right: Place, row: int, column: int) -> int:
        if left == row and right is None:
            return row
        if right == column and left is None:
            return column
        raise self.refusal("multiplies rows with rows")

    # -- the same entries in another shape

    def t(self) -> list[Place]:
        """All dimensions in reverse."""
        return self._reordered(lambda rank: range(rank)[::-1])

    def transpose(self) -> list[Place]:
        """Two dimensions exchanged."""

        def order(rank: int) -> Sequence[int]:
            dims = list(range(rank))
            a, b = self.arg(1), self.arg(2)
            dims[a], dims[b] = dims[b], dims[a]
            return dims

        return self._reordered(order)

    def permute(self) -> list[Place]:
        """Dimensions in an order that an argument names."""
        return self._reordered(lambda rank: [d % rank for d in self.arg(1)])

    def _reordered(self, order: Callable[[int], Sequence[int]]) -> list[Place]:
        ref = self.arg(0)
        return [list(order(len(self.shape(ref)))).index(self.place(ref))]  # type: ignore[arg-type]

    def view(self) -> list[Place]:
        """Another shape, in which as many entries lie before the rows as before."""
        ref = self.arg(0)
        place, shape, new = self.place(ref), self.shape(ref), self.out()
        assert place is not None
        before = _entries(shape[:place])
        for d, n in enumerate(new):
            # What a row has may become so many rows of a dimension: they lie one after the other.
            whole = isinstance(n, Size) and n.constant == 0
            if whole and before is not None and _entries(new[:d]) == before:
                return [d]
        raise self.refusal("merges the rows with another dimension")

    def expand(self) -> list[Place]:
        """New dimensions in front."""
        ref = self.arg(0)
        place = self.place(ref)
        assert place is not None
        return [place + len(self.out()) - len(self.shape(ref))]

    def repeat(self) -> list[Place]:
        """New dimensions in front, and others repeated: not that of the rows."""
        (place,) = self.expand()
        if self.arg(1)[place] != 1:
            raise self.refusal("puts rows behind rows")
        return [place]

    def unsqueeze(self) -> list[Place]:
        """A new dimension of length 1."""
        place, rank = self.place(self.arg(0)), len(self.out())
        assert place is not None
        return [place + 1 if self.arg(1) % rank <= place else place]

    def squeeze(self) -> list[Place]:
        """Dimensions of length 1 taken out."""
        ref = self.arg(0)
        place, shape = self.place(ref), self.shape(ref)
        if self.arg(1) is None:
            raise self.refusal("without a dimension would drop a batch of one")
        dims = _dims(self.arg(1), len(shape))
        if place is None or place in dims:
            raise self.refusal("of the rows would drop a batch of one")
        return [place - sum(d < place and shape[d] == 1 for d in dims)]

    def select(self) -> list[Place]:
        """One entry of a dimension, which goes."""
        ref = self.arg(0)
        place, dim = self.place(ref), self.arg(1, 0) % len(self.shape(ref))
        if place is None or place == dim:
            raise self.refusal("takes one row")
        return self.all_at(place - 1 if dim < place else place)

    def diagonal(self) -> list[Place]:
        """The diagonal of two dimensions, which go; it becomes the last one."""
        ref = self.arg(0)
        place, dims = self.place(ref), {self.arg(i, i - 2) % len(self.shape(ref)) for i in (2, 3)}
        if place is None or place in dims:
            raise self.refusal("goes along the rows")
        return [place - sum(d < place for d in dims)]

    def triangle(self) -> list[Place]:
        """A triangle of the last two dimensions."""
        place = self.place(self.arg(0))
        if place is None or place >= len(self.out()) - 2:
            raise self.refusal("goes along the rows")
        return [place]

    # -- joins

    def cat(self) -> list[Place]:
        """Tensors one after the other along a dimension."""
        places = {self.place(ref) for ref in self.arg(0)}
        dim = self.arg(1, self.keyword("dim", 0)) % len(self.out())
        if len(places) != 1 or dim in places:
            raise self.refusal("joins along the rows")
        return [places.pop()]

    def stack(self) -> list[Place]:
        """Tensors one after the other along a new dimension."""
        places = {self.place(ref) for ref in self.arg(0)}
        place = places.pop() if len(places) == 1 else None
        if place is None:
            raise self.refusal("stacks rows with other rows")
        return [place + 1 if self.arg(1, 0) % len(self.out()) <= place else place]

    def slice_backward(self) -> list[Place]:
        """A gradient put into zeros: rows stay if another dimension was cut."""
        return self._put_into_zeros(self.place(self.arg(0)), self.arg(2) % len(self.out()))

    def select_backward(self) -> list[Place]:
        """Likewise, where one entry of a dimension was taken."""
        place, dim = self.place(self.arg(0)), self.arg(2) % len(self.out())
        return self._put_into_zeros(place + 1 if place is not None and dim <= place else place, dim)

    def _put_into_zeros(self, place: Place, dim: int) -> list[Place]:
        if place is None or place == dim:
            raise self.refusal("puts rows among rows")
        return [place]

    def slice_scatter(self) -> list[Place]:
        """A tensor in which a part of one dimension is another one."""
        return self._put_into(self.place(self.arg(1)), self.arg(2, 0))

    def select_scatter(self) -> list[Place]:
        """Likewise, one entry of a dimension."""
        place, dim = self.place(self.arg(1)), self.arg(2) % len(self.out())
        return self._put_into(place + 1 if place is not None and dim <= place else place, dim)

    def diagonal_scatter(self) -> list[Place]:
        """Likewise, the diagonal of two dimensions."""
        place, rank = self.place(self.arg(0)), len(self.out())
        dims = {self.arg(i, i - 3) % rank for i in (3, 4)}
        part = self.place(self.arg(1))
        if place is None or place in dims or part != place - sum(d < place for d in dims):
            raise self.refusal("puts rows among rows")
        return [place]

    def _put_into(self, part: Place, dim: int) -> list[Place]:
        place = self.place(self.arg(0))
        if place is None or place != part or place == dim % len(self.out()):
            raise self.refusal("puts rows among rows")
        return [place]

    def pad(self) -> list[Place]:
        """Numbers put around the last dimensions."""
        place = self.place(self.arg(0))
        if place is None or place >= len(self.out()) - len(self.arg(1)) // 2:
            raise self.refusal("pads the rows")
        return [place]

    # -- entries taken by an index

    def embedding(self) -> list[Place]:
        """Rows of a table that is the same for the whole batch."""
        if self.place(self.arg(0)) is not None:
            raise self.refusal("looks rows up in rows")
        return [self.place(self.arg(1))]

    def gather(self) -> list[Place]:
        """Entries of a dimension, by an index with rows of its own."""
        source, index = self.arg(0), self.arg(2)
        dim = self.arg(1) % len(self.shape(source))
        if self.place(source) != self.place(index) or self.place(source) == dim:
            raise self.refusal("gathers across rows")
        return [self.place(index)]

    def index_select(self) -> list[Place]:
        """Entries of a dimension, by an index that is the same for the whole batch."""
        ref = self.arg(0)
        place = self.place(ref)
        if place is None or place == self.arg(1) % len(self.shape(ref)) or self.place(self.arg(2)) is not None:
            raise self.refusal("picks rows")
        return [place]

    # -- normalisations

    def layer_norm(self) -> list[Place]:
        """Over the last dimensions."""
        ref = self.arg(0)
        place, rank = self.place(ref), len(self.shape(ref))
        if place is None or place >= rank - len(self.arg(1)):
            raise self.refusal("normalises over the rows")
        return self.all_at(place)

    def group_norm(self) -> list[Place]:
        """Over all dimensions but the first, which has the rows."""
        if self.place(self.arg(0)) != 0:
            raise self.refusal("normalises over the rows")
        return self.all_at(0)

    def layer_norm_backward(self) -> list[Place]:
        """Of the input alone: gradients of the weights are sums over the rows."""
        place = self.place(self.arg(1))
        if place is None or any(v >= 0 for v in self.op.outputs[1:]):
            raise self.refusal("sums over the rows")
        return [place, None, None]


def along(index: int, keepdim: int | None = None, *, default: Any = None) -> Callable[[Rows], list[Place]]:
    """A rule for what works along some dimensions, which must not be that of the rows.

    Args:
        index: the position of the argument that names the dimensions.
        keepdim: that of the argument that says whether they stay, with length 1; None for what always keeps them.
        default: the dimensions if none are named; None for all.
    """

    def rule(rows: Rows) -> list[Place]:
        ref = rows.arg(0)
        place, rank = rows.place(ref), len(rows.shape(ref))
        dims = _dims(rows.arg(index, rows.keyword("dim", default)), rank)
        if place is None or place in dims:
            raise rows.refusal("works along the rows")
        kept = keepdim is None or rows.arg(keepdim, rows.keyword("keepdim", False))
        return rows.all_at(place if kept else place - sum(d < place for d in dims))

    return rule


def _dims(named: Any, rank: int) -> set[int]:
    """Dimensions as an argument names them; none named means all."""
    if named is None or named == ():
        return set(range(rank))
    return {d % max(rank, 1) for d in (named if isinstance(named, tuple) else (named,))}


def _entries(sizes: Sequence[int | Size]) -> int | None:
    """How many entries a shape has; None if that depends on the batch."""
    numbers = [n for n in sizes if not isinstance(n, Size)]
    return prod(numbers) if len(numbers) == len(sizes) else None
