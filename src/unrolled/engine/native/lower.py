"""Lowering: a loop's program in terms of what a row of the batch holds.

Every value is looked at through a `View` of some node's memory: an offset and one stride for each dimension that is not
the batch. Slices, splits, selections, permutations and expansions are views and cost nothing. What is left are four
kinds of node: leaves (what is given), element-wise computations, products with a fixed matrix, and reductions along
dimensions of a row; and joins, whose pieces are written side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from unrolled.engine.native.scalars import ELEMENTWISE, Scalar
from unrolled.plan.loops import LoopProgram
from unrolled.plan.program import Op, Ref, Size, Value

__all__ = [
    "Compute",
    "Copy",
    "Join",
    "Leaf",
    "Lowered",
    "Node",
    "Product",
    "Reduce",
    "UnsupportedError",
    "View",
    "lower",
]


class UnsupportedError(Exception):
    """An operation that this engine does not emit; the message names it."""


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
class Leaf(Node):
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


@dataclass(eq=False)
class Compute(Node):
    """An element-wise computation; its arguments are views, broadcast as in torch, and numbers."""

    name: str = ""
    arguments: tuple[View | Scalar, ...] = ()

    @property
    def views(self) -> Sequence[View]:
        """What it reads."""
        return [argument for argument in self.arguments if isinstance(argument, View)]


@dataclass(eq=False)
class Product(Node):
    """A row times a fixed matrix `[K, N]`."""

    row: View = None  # type: ignore[assignment]
    matrix: Leaf = None  # type: ignore[assignment]

    @property
    def views(self) -> Sequence[View]:
        """What it reads."""
        return [self.row]


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
class Join(Node):
    """Pieces written side by side; they are `Copy` nodes that point here."""

    pieces: list[Copy] = field(default_factory=list)


@dataclass(eq=False)
class Copy(Compute):
    """A computation whose result is written into a part of a join."""

    target: View = None  # type: ignore[assignment]


@dataclass
class Lowered:
    """A lowered loop: all nodes in order, the views that are emitted, the views that are the next states."""

    nodes: list[Node]
    emitted: list[View]
    next_states: list[View]
    real: torch.dtype


def contiguous(dims: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides."""
    return tuple(prod(dims[i + 1 :]) for i in range(len(dims)))


def lower(loop: LoopProgram) -> Lowered:
    """Lower a loop.

    Raises:
        UnsupportedError: naming the first operation, dtype or shape that this engine does not emit.
    """
    lowering = _Lowering(loop)
    for op in loop.program.ops:
        lowering.run(op)
    views = lowering.views
    for value in loop.emitted:
        rows, dims = _without_rows(loop.program.values[value])
        if not rows or (views[value].dtype, views[value].dims) != (loop.program.values[value].dtype, dims):
            raise UnsupportedError(f"to keep a {loop.program.values[value]} of every step")
    return Lowered(
        lowering.nodes, [views[v] for v in loop.emitted], [views[v] for v in loop.next_states], lowering.real
    )


class _Lowering:
    def __init__(self, loop: LoopProgram) -> None:
        self.values = loop.program.values
        self.nodes: list[Node] = []
        self.views: dict[int, View] = {}
        floats = {self.values[v].dtype for v in loop.program.inputs if self.values[v].dtype.is_floating_point}
        if len(floats) != 1 or not floats <= {torch.float32, torch.float64}:
            raise UnsupportedError(f"values of {', '.join(sorted(map(str, floats))) or 'no floating dtype'}")
        (self.real,) = floats
        for kind, group in (("sequence", loop.sequences), ("fixed", loop.fixed), ("state", loop.states)):
            for position, value in enumerate(group):
                self.leaf(kind, position, value)

    def leaf(self, kind: str, position: int, value: int) -> None:
        known = self.values[value]
        rows, dims = _without_rows(known)
        if not rows and kind != "fixed":
            raise UnsupportedError(f"a {kind} without a batch, {known}")
        self.views[value] = self.add(Leaf(dims, self.checked(known.dtype), kind, position, rows))

    def checked(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in (self.real, torch.bool):
            raise UnsupportedError(f"values of {dtype} beside {self.real}")
        return dtype

    def add(self, node: Node) -> View:
        self.nodes.append(node)
        return View(node, node.dims, contiguous(node.dims))

    def run(self, op: Op) -> None:
        name = op.name.removeprefix("aten.")
        base, _, overload = name.partition(".")
        rule = getattr(self, f"do_{base.strip('_')}", None)
        if rule is not None:
            results = rule(op)
        elif base in ELEMENTWISE:
            results = [self.elementwise(op, base)]
        else:
            raise UnsupportedError(name)
        del overload
        for value, view in zip(op.outputs, results, strict=False):
            if value >= 0:
                self.views[value] = view

    # -- what operations are made of

    def given(self, op: Op, index: int, default: Any = None) -> Any:
        arg = op.args[index] if index < len(op.args) else default
        return self.views[arg.value] if isinstance(arg, Ref) else arg

    def rowless(self, view: View) -> bool:
        return isinstance(view.node, Leaf) and not view.node.rows

    def compute(
        self, name: str, *arguments: View | Scalar, dims: Sequence[int] | None = None, dtype: Any = None
    ) -> View:
        shapes = [view.dims for view in arguments if isinstance(view, View)]
        found = tuple(dims) if dims is not None else tuple(torch.broadcast_shapes(*shapes))
        return self.add(Compute(found, dtype or self.real, name, tuple(arguments)))

    def elementwise(self, op: Op, name: str) -> View:
        out = self.values[op.outputs[0]]
        rows, dims = _without_rows(out)
        if not rows:
            raise UnsupportedError(f"{name} of values without a batch inside of a loop")
        arguments = [self.given(op, i) for i in range(len(op.args))]
        keywords = dict(op.kwargs)
        alpha = keywords.pop("alpha", 1)
        if alpha != 1:
            arguments[1] = self.compute("mul", arguments[1], alpha)
        arguments += ELEMENTWISE[name].keywords(keywords)
        return self.compute(name, *arguments, dims=dims, dtype=self.checked(out.dtype))

    def shape_of(self, op: Op, output: int = 0) -> tuple[int, ...]:
        return _without_rows(self.values[op.outputs[output]])[1]

    def rank(self, op: Op, view: View) -> int:
        return len(view.dims) + (not self.rowless(view))

    def dim(self, op: Op, view: View, dim: int) -> int:
        """A dimension as torch counts it, as the view does: the batch is not counted."""
        rank = self.rank(op, view)
        return dim % rank - (rank - len(view.dims))

    # -- views

    def do_alias(self, op: Op) -> list[View]:
        return [self.given(op, 0)]

    do_detach = do_clone = do_lift_fresh = do_alias

    def do_to_copy(self, op: Op) -> list[View]:
        view, dtype = self.given(op, 0), dict(op.kwargs).get("dtype")
        if dtype in (None, view.dtype):
            return [view]
        return [self.compute("cast", view, dtype=self.checked(dtype))]

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
        return [self._ordered(view, order)]

    def do_transpose(self, op: Op) -> list[View]:
        view = self.given(op, 0)
        a, b = (self.dim(op, view, op.args[i]) for i in (1, 2))
        if min(a, b) < 0:
            raise UnsupportedError("a transposition that moves the batch")
        order = list(range(len(view.dims)))
        order[a], order[b] = order[b], order[a]
        return [self._ordered(view, order)]

    def do_t(self, op: Op) -> list[View]:
        raise UnsupportedError("a transposition that moves the batch")

    def _ordered(self, view: View, order: Sequence[int]) -> View:
        dims, strides = tuple(view.dims[d] for d in order), tuple(view.strides[d] for d in order)
        return View(view.node, dims, strides, view.offset)

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
        return [self._ordered(part, drop)]

    def do_split(self, op: Op) -> list[View]:
        view = self.given(op, 0)
        dim = self.dim(op, view, self.given(op, 2, 0))
        if dim < 0:
            raise UnsupportedError("a split of the batch")
        lengths = [_without_rows(self.values[v])[1][dim] if v >= 0 else None for v in op.outputs]
        step = op.args[1]
        starts = (
            [sum(step[:i]) for i in range(len(step))] if isinstance(step, tuple) else range(0, view.dims[dim], step)
        )
        return [
            self.cut(view, dim, start, length) if length is not None else view
            for start, length in zip(starts, lengths, strict=False)
        ]

    do_split_with_sizes = do_unsafe_split = do_split

    # -- joins

    def do_cat(self, op: Op) -> list[View]:
        pieces = [self.views[ref.value] for ref in op.args[0]]
        dims = self.shape_of(op)
        dim = self.given(op, 1, dict(op.kwargs).get("dim", 0)) % (len(dims) + 1) - 1
        if dim < 0:
            raise UnsupportedError("a join along the batch")
        return [self._joined(dims, dim, pieces, pieces[0].dtype)]

    def do_stack(self, op: Op) -> list[View]:
        pieces = [self.views[ref.value] for ref in op.args[0]]
        dims = self.shape_of(op)
        dim = self.given(op, 1, 0) % (len(dims) + 1) - 1
        if dim < 0:
            raise UnsupportedError("a stack along the batch")
        thick = [
            View(p.node, (*p.dims[:dim], 1, *p.dims[dim:]), (*p.strides[:dim], 0, *p.strides[dim:]), p.offset)
            for p in pieces
        ]
        return [self._joined(dims, dim, thick, pieces[0].dtype)]

    def _joined(self, dims: tuple[int, ...], dim: int, pieces: Sequence[View], dtype: torch.dtype) -> View:
        join = Join(dims, dtype)
        place = View(join, dims, contiguous(dims))
        start = 0
        for piece in pieces:
            length = piece.dims[dim]
            part = (*dims[:dim], length, *dims[dim + 1 :])
            target = View(join, part, place.strides, start * place.strides[dim])
            copy = Copy(part, dtype, "copy", (piece,), target)
            self.nodes.append(copy)
            join.pieces.append(copy)
            start += length
        self.nodes.append(join)
        return place

    def do_slice_backward(self, op: Op) -> list[View]:
        view, dims = self.given(op, 0), self.shape_of(op)
        dim = op.args[2] % (len(dims) + 1) - 1
        start, stop, step = op.args[3], op.args[4], op.args[5]
        if dim < 0 or step != 1:
            raise UnsupportedError("the backward of a slice with a step")
        begin, end, _ = slice(start, stop).indices(dims[dim])
        return [self._padded(view, dims, dim, begin, dims[dim] - end)]

    def do_select_backward(self, op: Op) -> list[View]:
        view, dims = self.given(op, 0), self.shape_of(op)
        dim = op.args[2] % (len(dims) + 1) - 1
        if dim < 0:
            raise UnsupportedError("the backward of a selection of one row")
        index = op.args[3] % dims[dim]
        thick = View(
            view.node,
            (*view.dims[:dim], 1, *view.dims[dim:]),
            (*view.strides[:dim], 0, *view.strides[dim:]),
            view.offset,
        )
        return [self._padded(thick, dims, dim, index, dims[dim] - index - 1)]

    def _padded(self, view: View, dims: tuple[int, ...], dim: int, before: int, after: int) -> View:
        pieces = []
        for length in (before, None, after):
            if length is None:
                pieces.append(view)
            elif length:
                part = (*dims[:dim], length, *dims[dim + 1 :])
                pieces.append(self.compute("literal", 0.0, dims=part, dtype=view.dtype))
        return self._joined(dims, dim, pieces, view.dtype)

    # -- products

    def do_mm(self, op: Op) -> list[View]:
        return [self._product(self.given(op, 0), self.given(op, 1))]

    def do_addmm(self, op: Op) -> list[View]:
        if op.kwargs:
            raise UnsupportedError("addmm with factors")
        return [self.compute("add", self._product(self.given(op, 1), self.given(op, 2)), self.given(op, 0))]

    def _product(self, row: View, matrix: View) -> View:
        leaf = matrix.node
        if self.rowless(row) or not self.rowless(matrix) or len(row.dims) != 1 or not isinstance(leaf, Leaf):
            raise UnsupportedError("a product that is not of rows with a fixed matrix")
        if row.strides != (1,) or (isinstance(row.node, Compute) and not row.whole):
            row = self.compute("copy", row, dtype=row.dtype)
        return self.add(Product((leaf.dims[1],), self.real, row, leaf))

    # -- reductions

    def reduced(self, name: str, view: View, dims: Sequence[int]) -> View:
        """A reduction that keeps its dimensions, with length 1."""
        kept = [d for d in range(len(view.dims)) if d not in dims]
        ordered = self._ordered(view, [*kept, *dims])
        node = Reduce(tuple(view.dims[d] for d in kept), self.real, name, ordered, prod(view.dims[d] for d in dims))
        result = self.add(node)
        shape = tuple(1 if d in dims else n for d, n in enumerate(view.dims))
        return View(result.node, shape, contiguous(shape))

    def _dims(self, op: Op, view: View, given: Any) -> list[int]:
        if given is None or given == ():
            raise UnsupportedError("a reduction over the batch")
        dims = sorted(self.dim(op, view, d) for d in (given if isinstance(given, tuple) else (given,)))
        if dims[0] < 0 or self.rowless(view):
            raise UnsupportedError("a reduction over the batch")
        return dims

    def _reduction(self, name: str) -> Callable[[Op], list[View]]:
        def rule(op: Op) -> list[View]:
            view = self.given(op, 0)
            keywords = dict(op.kwargs)
            dims = self._dims(op, view, self.given(op, 1, keywords.get("dim")))
            if view.dtype == torch.bool:
                view = self.compute("cast", view)
            result = self.reduced("sum" if name == "mean" else name, view, dims)
            if name == "mean":
                result = self.compute("mul", result, 1.0 / prod(view.dims[d] for d in dims))
            return [self._shaped(op, 0, result)]

        return rule

    @property
    def do_sum(self) -> Callable[[Op], list[View]]:
        return self._reduction("sum")

    @property
    def do_mean(self) -> Callable[[Op], list[View]]:
        return self._reduction("mean")

    @property
    def do_amax(self) -> Callable[[Op], list[View]]:
        return self._reduction("amax")

    @property
    def do_amin(self) -> Callable[[Op], list[View]]:
        return self._reduction("amin")

    def do_max(self, op: Op) -> list[View]:
        if len(op.outputs) != 2 or op.outputs[1] >= 0:
            raise UnsupportedError("the place of a maximum")
        view = self.given(op, 0)
        return [self._shaped(op, 0, self.reduced("amax", view, self._dims(op, view, op.args[1])))]

    def do_var(self, op: Op) -> list[View]:
        return [self._shaped(op, 0, self._moments(op)[0])]

    def do_std(self, op: Op) -> list[View]:
        return [self._shaped(op, 0, self.compute("sqrt", self._moments(op)[0]))]

    def do_var_mean(self, op: Op) -> list[View]:
        return [self._shaped(op, output, moment) for output, moment in enumerate(self._moments(op))]

    def _shaped(self, op: Op, output: int, view: View) -> View:
        """A whole node in the shape that the operation gives it."""
        dims = self.shape_of(op, output)
        return View(view.node, dims, contiguous(dims))

    def _moments(self, op: Op) -> tuple[View, View]:
        """Variance and mean, with the dimensions kept."""
        view, keywords = self.given(op, 0), dict(op.kwargs)
        dims = self._dims(op, view, self.given(op, 1, keywords.get("dim")))
        count = prod(view.dims[d] for d in dims)
        correction = keywords.get("correction", 1)
        mean = self.compute("mul", self.reduced("sum", view, dims), 1.0 / count)
        apart = self.compute("sub", view, mean)
        total = self.reduced("sum", self.compute("mul", apart, apart), dims)
        scale = 1.0 / (count - correction) if count > correction else float("nan")
        return self.compute("mul", total, scale), mean

    def do_softmax(self, op: Op) -> list[View]:
        view = self.given(op, 0)
        dims = self._dims(op, view, op.args[1])
        powers = self.compute("exp", self.compute("sub", view, self.reduced("amax", view, dims)))
        return [self.compute("div", powers, self.reduced("sum", powers, dims))]

    def do_softmax_backward_data(self, op: Op) -> list[View]:
        grad, output = self.given(op, 0), self.given(op, 1)
        dims = self._dims(op, output, op.args[2])
        total = self.reduced("sum", self.compute("mul", grad, output), dims)
        return [self.compute("mul", output, self.compute("sub", grad, total))]

    # -- constants

    def do_zeros_like(self, op: Op) -> list[View]:
        return [self._literal(op, 0.0)]

    do_zeros = do_new_zeros = do_zeros_like

    def do_ones_like(self, op: Op) -> list[View]:
        return [self._literal(op, 1.0)]

    do_ones = do_new_ones = do_ones_like

    def do_full(self, op: Op) -> list[View]:
        return [self._literal(op, op.args[-1])]

    do_full_like = do_new_full = do_full

    def do_scalar_tensor(self, op: Op) -> list[View]:
        return [self._literal(op, op.args[0])]

    def _literal(self, op: Op, number: Scalar) -> View:
        value = self.values[op.outputs[0]]
        return self.compute("literal", number, dims=_without_rows(value)[1], dtype=self.checked(value.dtype))


def _without_rows(value: Value) -> tuple[bool, tuple[int, ...]]:
    """Whether a value has rows, and its shape without them."""
    rows = bool(value.shape) and value.shape[0] == Size(1, 0)
    dims = value.shape[1:] if rows else value.shape
    if any(isinstance(n, Size) for n in dims):
        raise UnsupportedError(f"a value of shape {value}, whose batch is not its first dimension")
    return rows, dims  # type: ignore[return-value]


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
