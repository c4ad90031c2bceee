"""Row by row: for each kind of operation where the rows of its result are.

An operation that has no rule, or whose rule does not apply, couples rows until proved otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from unrolled.recording.program import Op, Program, Ref, Size

ROW = Size(1, 0)


class CouplesRowsError(Exception):
    """An operation that is not proved to act row by row; the message says why."""


Place = int | None
"""The dimension of the rows; None for a value without rows."""


@dataclass(frozen=True)
class Call:
    """An operation, with what a rule asks about it."""

    program: Program
    op: Op
    places: Mapping[int, int]

    def arg(self, index: int, default: Any = None) -> Any:
        """An argument by its position."""
        return self.op.args[index] if index < len(self.op.args) else default

    def shape(self, ref: Ref) -> tuple[int | Size, ...]:
        """The shape of a value that it reads."""
        return self.program.values[ref.value].shape

    def place(self, ref: Any) -> Place:
        """Where the rows of an argument are."""
        return self.places.get(ref.value) if isinstance(ref, Ref) else None

    def out(self, index: int = 0) -> tuple[int | Size, ...]:
        """The shape of a result."""
        return self.program.values[self.op.outputs[index]].shape

    def created(self, value: int) -> Place:
        """Rows of what was made of nothing that has rows: the dimension as long as the batch, if there is one."""
        if value < 0:
            return None
        shape = self.program.values[value].shape
        sized = [d for d, n in enumerate(shape) if isinstance(n, Size)]
        if not sized:
            return None
        if len(sized) > 1 or shape[sized[0]] != ROW or not _same_for_every_row(self.op):
            raise CouplesRowsError(f"{self.op.name} makes a tensor whose shape depends on the batch size")
        return sized[0]

    def same(self, place: Place) -> list[Place]:
        """The same place for all results."""
        return [place if value >= 0 else None for value in self.op.outputs]


def _same_for_every_row(op: Op) -> bool:
    name = op.base
    return name in {
        "zeros",
        "ones",
        "full",
        "new_zeros",
        "new_ones",
        "new_full",
        "expand",
        "empty",
        "new_empty",
        "scalar_tensor",
    }


def _refuse(call: Call, why: str) -> CouplesRowsError:
    return CouplesRowsError(f"{call.op.name} {why}")


def pointwise(call: Call) -> list[Place]:
    """What is done entry by entry: all that is read must have its rows in the same place."""
    rank = len(call.out())
    found = set()
    for value in call.op.inputs:
        if value in call.places:
            found.add(call.places[value] + rank - len(call.program.values[value].shape))
    if len(found) != 1:
        raise _refuse(call, "combines rows with other rows")
    place = found.pop()
    if call.out()[place] != ROW:
        raise _refuse(call, "combines rows with another dimension")
    return call.same(place)


def _dims(call: Call, given: Any, rank: int) -> set[int]:
    """Dimensions as an argument names them; none given means all."""
    if given is None or (isinstance(given, tuple) and not given):
        return set(range(rank))
    return {d % max(rank, 1) for d in (given if isinstance(given, tuple) else (given,))}


def _over(index: int, keepdim: int | None, default: Any = None) -> Callable[[Call], list[Place]]:
    """A rule for what works along some dimensions, named by an argument: these must not be the rows."""

    def rule(call: Call) -> list[Place]:
        ref = call.arg(0)
        place, rank = call.place(ref), len(call.shape(ref))
        given = call.arg(index, dict(call.op.kwargs).get("dim", default))
        dims = _dims(call, given, rank)
        if place is None or place in dims:
            raise _refuse(call, "works along the rows")
        kept = keepdim is None or call.arg(keepdim, dict(call.op.kwargs).get("keepdim", False))
        return call.same(place if kept else place - sum(d < place for d in dims))

    return rule


def _mm(call: Call) -> list[Place]:
    left, right = call.op.args[-2:] if len(call.op.args) == 2 else call.op.args[1:3]
    return call.same(_product(call, call.place(left), call.place(right), 0, 1))


def _addmm(call: Call) -> list[Place]:
    place = _mm(call)[0]
    bias = call.arg(0)
    if call.place(bias) is not None and call.place(bias) + 2 - len(call.shape(bias)) != place:  # type: ignore[operator]
        raise _refuse(call, "adds rows to other rows")
    return [place]


def _product(call: Call, left: Place, right: Place, row: int, column: int) -> int:
    if left == row and right is None:
        return row
    if right == column and left is None:
        return column
    raise _refuse(call, "multiplies rows with rows")


def _bmm(call: Call) -> list[Place]:
    left, right = call.op.args[-2:] if len(call.op.args) == 2 else call.op.args[1:3]
    places = call.place(left), call.place(right)
    if places == (0, 0):
        return [0]
    return [_product(call, *places, 1, 2)]


def _permuted(order: Callable[[Call, int], Sequence[int]]) -> Callable[[Call], list[Place]]:
    def rule(call: Call) -> list[Place]:
        ref = call.arg(0)
        rank = len(call.shape(ref))
        return [list(order(call, rank)).index(call.place(ref))]  # type: ignore[arg-type]

    return rule


def _swapped(rank: int, a: int, b: int) -> list[int]:
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return order


def _view(call: Call) -> list[Place]:
    ref = call.arg(0)
    place, shape, new = call.place(ref), call.shape(ref), call.out()
    assert place is not None
    before = _count(shape[:place])
    for d, n in enumerate(new):
        # What a row has may become so many rows of a dimension: they lie one after the other.
        whole = isinstance(n, Size) and n.constant == 0
        if whole and before is not None and _count(new[:d]) == before:
            return [d]
    raise _refuse(call, "merges the rows with another dimension")


def _count(sizes: Iterable[int | Size]) -> int | None:
    numbers = [n for n in sizes if not isinstance(n, Size)]
    return prod(numbers) if len(numbers) == len(list(sizes)) else None


def _expand(call: Call) -> list[Place]:
    ref = call.arg(0)
    place = call.place(ref)
    assert place is not None
    return [place + len(call.out()) - len(call.shape(ref))]


def _repeat(call: Call) -> list[Place]:
    place = _expand(call)[0]
    if call.arg(1)[place] != 1:
        raise _refuse(call, "puts rows behind rows")
    return [place]


def _diagonal(call: Call) -> list[Place]:
    ref = call.arg(0)
    place, dims = call.place(ref), {call.arg(i, i - 2) % len(call.shape(ref)) for i in (2, 3)}
    if place is None or place in dims:
        raise _refuse(call, "goes along the rows")
    return [place - sum(d < place for d in dims)]


def _triangle(call: Call) -> list[Place]:
    place = call.place(call.arg(0))
    if place is None or place >= len(call.out()) - 2:
        raise _refuse(call, "goes along the rows")
    return [place]


def _unsqueeze(call: Call) -> list[Place]:
    place, rank = call.place(call.arg(0)), len(call.out())
    assert place is not None
    return [place + (call.arg(1) % rank <= place)]


def _squeeze(call: Call) -> list[Place]:
    ref = call.arg(0)
    place, shape = call.place(ref), call.shape(ref)
    if call.arg(1) is None:
        raise _refuse(call, "without a dimension would drop a batch of one")
    dims = _dims(call, call.arg(1), len(shape))
    if place is None or place in dims:
        raise _refuse(call, "of the rows would drop a batch of one")
    return [place - sum(d < place and shape[d] == 1 for d in dims)]


def _select(call: Call) -> list[Place]:
    ref = call.arg(0)
    place, dim = call.place(ref), call.arg(1, 0) % len(call.shape(ref))
    if place is None or place == dim:
        raise _refuse(call, "takes one row")
    return call.same(place - (dim < place))


def _cat(call: Call) -> list[Place]:
    refs, rank = call.arg(0), len(call.out())
    places = {call.place(ref) for ref in refs}
    dim = call.arg(1, dict(call.op.kwargs).get("dim", 0)) % rank
    if len(places) != 1 or dim in places:
        raise _refuse(call, "joins along the rows")
    return [places.pop()]


def _stack(call: Call) -> list[Place]:
    refs, rank = call.arg(0), len(call.out())
    places = {call.place(ref) for ref in refs}
    if len(places) != 1:
        raise _refuse(call, "stacks rows with other rows")
    place = places.pop()
    return [place + (call.arg(1, 0) % rank <= place)]


def _embedding(call: Call) -> list[Place]:
    if call.place(call.arg(0)) is not None:
        raise _refuse(call, "looks rows up in rows")
    return [call.place(call.arg(1))]


def _gather(call: Call) -> list[Place]:
    source, index = call.arg(0), call.arg(2)
    dim = call.arg(1) % len(call.shape(source))
    if call.place(source) != call.place(index) or call.place(source) == dim:
        raise _refuse(call, "gathers across rows")
    return [call.place(index)]


def _index_select(call: Call) -> list[Place]:
    place = call.place(call.arg(0))
    if place is None or place == call.arg(1) % len(call.shape(call.arg(0))) or call.place(call.arg(2)) is not None:
        raise _refuse(call, "picks rows")
    return [place]


def _layer_norm(call: Call) -> list[Place]:
    ref = call.arg(0)
    place, rank = call.place(ref), len(call.shape(ref))
    if place is None or place >= rank - len(call.arg(1)):
        raise _refuse(call, "normalises over the rows")
    return call.same(place)


def _group_norm(call: Call) -> list[Place]:
    if call.place(call.arg(0)) != 0:
        raise _refuse(call, "normalises over the rows")
    return call.same(0)


def _layer_norm_backward(call: Call) -> list[Place]:
    place = call.place(call.arg(1))
    if place is None or any(v >= 0 for v in call.op.outputs[1:]):
        raise _refuse(call, "sums over the rows")
    return [place, None, None]


_reduced = _over(1, 2)

RULES: dict[str, Callable[[Call], list[Place]]] = {
    **dict.fromkeys(
        (
            "_to_copy",
            "to",
            "clone",
            "detach",
            "alias",
            "zeros_like",
            "ones_like",
            "full_like",
            "empty_like",
            "fill",
            "copy",
        ),
        lambda call: call.same(call.place(call.arg(0))),
    ),
    "mm": _mm,
    "addmm": _addmm,
    "bmm": _bmm,
    "baddbmm": _bmm,
    "t": _permuted(lambda call, rank: range(rank)[::-1]),
    "transpose": _permuted(lambda call, rank: _swapped(rank, call.arg(1), call.arg(2))),
    "permute": _permuted(lambda call, rank: [d % rank for d in call.arg(1)]),
    **dict.fromkeys(("view", "_unsafe_view", "reshape"), _view),
    "expand": _expand,
    "repeat": _repeat,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    **dict.fromkeys(("select", "unbind"), _select),
    "slice": _over(1, None, 0),
    **dict.fromkeys(("unfold", "narrow"), _over(1, None)),
    "roll": _over(2, None),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "chunk"), _over(2, None, 0)),
    **dict.fromkeys(("slice_backward", "select_backward"), lambda call: _scattered(call)),
    "cat": _cat,
    "stack": _stack,
    "embedding": _embedding,
    "gather": _gather,
    "index_select": _index_select,
    **dict.fromkeys(
        """
        sum mean amax amin max min argmax argmin logsumexp var std prod any all median nansum count_nonzero
        """.split(),
        _reduced,
    ),
    **dict.fromkeys(("var_mean", "std_mean"), _over(1, 3)),
    "linalg_vector_norm": _over(2, 3),
    **dict.fromkeys(
        ("_softmax", "_log_softmax", "cumsum", "cumprod", "cummax", "logcumsumexp", "flip", "sort", "glu"),
        _over(1, None, -1),
    ),
    "topk": _over(2, None, -1),
    # Torch forgets to tag these.
    **dict.fromkeys(
        """
        hardswish log_sigmoid_forward complex real floor_divide where _prelu_kernel __or__ __and__ __xor__
        softshrink_backward hardshrink_backward hardsigmoid_backward
        """.split(),
        pointwise,
    ),
    "diagonal": _diagonal,
    **dict.fromkeys(("tril", "triu"), _triangle),
    **dict.fromkeys(("_softmax_backward_data", "_log_softmax_backward_data"), _over(2, None)),
    "constant_pad_nd": lambda call: _padded(call),
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "native_layer_norm_backward": _layer_norm_backward,
}


def _scattered(call: Call) -> list[Place]:
    """The backward of a slice or a selection puts a gradient into zeros: rows stay if another dimension was cut."""
    place, dim = call.place(call.arg(0)), call.arg(2) % len(call.out())
    if call.op.name.startswith("aten.select") and place is not None:
        place += dim <= place
    if place is None or place == dim:
        raise _refuse(call, "puts rows among rows")
    return [place]


def _padded(call: Call) -> list[Place]:
    place, rank = call.place(call.arg(0)), len(call.out())
    if place is None or place >= rank - len(call.arg(1)) // 2:
        raise _refuse(call, "pads the rows")
    return [place]
