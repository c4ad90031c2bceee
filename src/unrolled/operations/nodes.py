"""Nodes and views: the program of a step as computations on the entries of one row of the batch.

Every value is a `View` of some node's memory: an offset, and one stride for each dimension that is not the batch.
Slices, splits, selections, permutations and expansions are views and cost nothing. What is left are the kinds of node:
inputs, element-wise computations, products with a fixed matrix and of a row's own matrices, reductions along dimensions
of a row, joins, whose pieces are written side by side, and what reads, writes or finds entries at computed places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TypeAlias

import torch

Scalar: TypeAlias = int | float | bool | None
"""A number among the arguments of a computation; None for a bound that is not there."""


@dataclass(eq=False)
class Node:
    """Something that holds numbers for each row.

    Attributes:
        dims: its shape without the batch.
        dtype: of its entries.
    """

    dims: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Entries per row."""
        return prod(self.dims)

    @property
    def views(self) -> Sequence[View]:
        """What it reads."""
        return ()


@dataclass(eq=False)
class Input(Node):
    """A sequence, a fixed value or a state, by its position among them; `rows` is False for one without a batch."""

    kind: str = ""
    position: int = 0
    rows: bool = True


@dataclass(frozen=True)
class View:
    """Some entries of a node: entry `(i, j, ...)` is at `offset + i * strides[0] + j * strides[1] + ...`."""

    node: Node
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def whole(self) -> bool:
        """Whether it is the node itself, entry by entry."""
        return self.offset == 0 and self.dims == self.node.dims and self.strides == contiguous(self.dims)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its entries."""
        return self.node.dtype

    def permuted(self, order: Sequence[int]) -> View:
        """Its dimensions in another order, or only some of them."""
        return replace(self, dims=tuple(self.dims[d] for d in order), strides=tuple(self.strides[d] for d in order))

    def unsqueezed(self, dim: int) -> View:
        """With one more dimension, of length 1."""
        dims, strides = (*self.dims[:dim], 1, *self.dims[dim:]), (*self.strides[:dim], 0, *self.strides[dim:])
        return replace(self, dims=dims, strides=strides)

    def flipped(self, dim: int) -> View:
        """A dimension in reverse."""
        strides = replaced(self.strides, dim, -self.strides[dim])
        return replace(self, strides=strides, offset=self.offset + max(self.dims[dim] - 1, 0) * self.strides[dim])

    def broadcast(self, dims: tuple[int, ...]) -> View:
        """Broadcast to a shape, as in torch."""
        new = (0,) * (len(dims) - len(self.dims))
        own = (0 if have == 1 else stride for have, stride in zip(self.dims, self.strides, strict=True))
        return replace(self, dims=dims, strides=(*new, *own))


@dataclass(eq=False)
class Compute(Node):
    """An element-wise computation; its arguments are views, broadcast as in torch, and numbers."""

    name: str = ""
    arguments: tuple[View | Scalar, ...] = ()

    @property
    def views(self) -> Sequence[View]:
        """What it reads."""
        return [argument for argument in self.arguments if isinstance(argument, View)]

    @property
    def whole_numbers(self) -> bool:
        """Whether it is arithmetic of integers: if it reads some and no others, or makes them of nothing."""
        read = {view.dtype for view in self.views} or {self.dtype}
        return not any(dtype.is_floating_point for dtype in read) and read != {torch.bool}


@dataclass(eq=False)
class Product(Node):
    """A row, or each of a row's rows `[..., K]`, times a fixed matrix: a view `[K..., N]` of a fixed value."""

    row: View = None  # type: ignore[assignment]
    matrix: View = None  # type: ignore[assignment]

    @property
    def views(self) -> Sequence[View]:
        """What it reads."""
        return [self.row]


@dataclass(eq=False)
class Convolution(Node):
    """What windows see, `[windows..., K...]`, times a fixed matrix, a view `[K..., N]`: `[N, windows...]`."""

    seen: View = None  # type: ignore[assignment]
    matrix: View = None  # type: ignore[assignment]

    @property
    def views(self) -> Sequence[View]:
        """What it reads."""
        return [self.seen]


@dataclass(eq=False)
class MatrixProduct(Node):
    """A row's matrices `[..., N, K]` times others of it, or fixed ones, `[..., K, M]`."""

    left: View = None  # type: ignore[assignment]
    right: View = None  # type: ignore[assignment]

    @property
    def views(self) -> Sequence[View]:
        """What it reads."""
        return [self.left, self.right]


@dataclass(eq=False)
class Reduce(Node):
    """A sum, maximum or minimum along the last dimensions of a view: `inner` entries for each one left."""

    name: str = ""
    source: View = None  # type: ignore[assignment]
    inner: int = 1

    @property
    def views(self) -> Sequence[View]:
        """What it reads."""
        return [self.source]


@dataclass(eq=False)
class Scan(Reduce):
    """A running sum along the last dimension of a view, entry by entry: its dimensions are the view's."""


@dataclass(frozen=True)
class At:
    """A place along a dimension that an index names.

    Attributes:
        index: the indices, in the shape of what is read or written.
        stride: of the dimension, in the memory that is read or written.
        size: how long it is.
        from_end: whether negative indices count from its end.
    """

    index: View
    stride: int
    size: int
    from_end: bool


@dataclass(eq=False)
class Take(Node):
    """Entries of a view, which has stride 0 in its dimensions, read at computed places."""

    source: View = None  # type: ignore[assignment]
    at: tuple[At, ...] = ()

    @property
    def views(self) -> Sequence[View]:
        """What it reads."""
        return [self.source, *(at.index for at in self.at)]


@dataclass(eq=False)
class Put(Node):
    """A view's entries, some of them replaced by others at computed places, or added to; one after the other.

    Attributes:
        base: the view.
        source: what is written.
        strides: where, but for the computed places: one for each dimension of the source.
        at: the computed places.
        added: whether what is written is added to what is there.
    """

    base: View = None  # type: ignore[assignment]
    source: View = None  # type: ignore[assignment]
    strides: tuple[int, ...] = ()
    at: tuple[At, ...] = ()
    added: bool = False

    @property
    def views(self) -> Sequence[View]:
        """What it reads."""
        return [self.base, self.source, *(at.index for at in self.at)]


@dataclass(eq=False)
class Find(Node):
    """Places of entries along the last dimension of a view, found by a function of C: `name` in `ordering.c`.

    Attributes:
        name: the function.
        source: what is looked through, `[..., n]`; the node is `[..., m]`.
        wanted: what is looked for, if that is more than the function's name says: `[..., m]`.
    """

    name: str = ""
    source: View = None  # type: ignore[assignment]
    wanted: View | None = None

    @property
    def views(self) -> Sequence[View]:
        """What it reads."""
        return [self.source] if self.wanted is None else [self.source, self.wanted]


@dataclass(eq=False)
class Join(Node):
    """Pieces written side by side, each by a `Write` that points here."""

    pieces: list[Write] = field(default_factory=list)


@dataclass(eq=False)
class Write(Compute):
    """A computation whose result is written into a part of a join."""

    target: View = None  # type: ignore[assignment]


@dataclass
class Lowered:
    """A lowered loop: all nodes in order, the views that are emitted, the next states, and what is added up."""

    nodes: list[Node]
    emitted: list[View]
    next_states: list[View]
    totals: list[View]
    real: torch.dtype


def contiguous(dims: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides."""
    return tuple(prod(dims[i + 1 :]) for i in range(len(dims)))


def replaced(sizes: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    """Sizes, or strides, with another one for one dimension."""
    return (*sizes[:dim], size, *sizes[dim + 1 :])
