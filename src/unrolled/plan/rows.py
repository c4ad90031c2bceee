"""Rows: which dimension of each value is the batch, proved operation by operation.

An operation acts row by row if row b of its result depends on row b of what it reads, and on nothing else of the batch.
Only through such operations may time be folded into the batch. The rules say where the rows of the result are; an
operation that has no rule, or whose rule does not apply, couples rows until proved otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from unrolled.plan.program import Custom, Op, Program, Ref, Size

__all__ = ["CouplesRowsError", "find_rows", "rows_of_outputs"]

ROW = Size(1, 0)


class CouplesRowsError(Exception):
    """An operation that is not proved to act row by row; the message says why."""


Place = int | None
"""The dimension of the rows; None for a value without rows."""


def find_rows(program: Program, seeds: Mapping[int, int]) -> tuple[dict[int, int], dict[int, str]]:
    """Where the rows of every value are.

    Args:
        program: the operations.
        seeds: values whose rows are known: the leaves of input, state and context.

    Returns:
        The dimension of the rows, for each value that has them; and for each operation (by its number) that is not
        proved to act row by row, why.
    """
    places = dict(seeds)
    reasons: dict[int, str] = {}
    unknown: set[int] = set()
    for number, op in enumerate(program.ops):
        if unknown.intersection(op.inputs):
            reasons[number] = "it reads what couples rows"
            unknown.update(op.outputs)
            continue
        try:
            found = rows_of_outputs(program, op, places)
        except CouplesRowsError as error:
            reasons[number] = str(error)
            unknown.update(op.outputs)
            continue
        places |= {v: place for v, place in zip(op.outputs, found, strict=False) if v >= 0 and place is not None}
    return places, reasons


def rows_of_outputs(program: Program, op: Op, places: Mapping[int, int]) -> list[Place]:
    """Where the rows of an operation's results are.

    Raises:
        CouplesRowsError: if it is not proved to act row by row.
    """
    if isinstance(op.target, Custom):
        return _rows_of_custom(op.target, [places.get(v) for v in op.inputs])
    call = _Call(program, op, places)
    if not any(v in places for v in op.inputs):
        return [call.created(v) for v in op.outputs]
    name = op.target._schema.name.removeprefix("aten::")  # type: ignore[attr-defined]
    if name in _RULES:
        return _RULES[name](call)
    if torch.Tag.pointwise in op.target.tags:  # type: ignore[attr-defined]
        return _pointwise(call)
    raise CouplesRowsError(f"{op.name} is not known to act row by row")


def _rows_of_custom(custom: Custom, given: Sequence[Place]) -> list[Place]:
    forward = custom.forward
    seeds = {v: place for v, place in zip(forward.inputs, given, strict=True) if place is not None}
    places, reasons = find_rows(forward, seeds)
    if reasons:
        raise CouplesRowsError(f"inside {custom.name}: {next(iter(reasons.values()))}")
    return [places.get(v) for v in forward.outputs]


@dataclass(frozen=True)
class _Call:
    """An operation, with what a rule asks about it."""

    program: Program
    op: Op
    places: Mapping[int, int]

    def arg(self, index: int, default: Any = None) -> Any:
        return self.op.args[index] if index < len(self.op.args) else default

    def shape(self, ref: Ref) -> tuple[int | Size, ...]:
        return self.program.values[ref.value].shape

    def place(self, ref: Any) -> Place:
        return self.places.get(ref.value) if isinstance(ref, Ref) else None

    def out(self, index: int = 0) -> tuple[int | Size, ...]:
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
    name = op.name.removeprefix("aten.").split(".")[0]
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


def _refuse(call: _Call, why: str) -> CouplesRowsError:
    return CouplesRowsError(f"{call.op.name} {why}")


def _pointwise(call: _Call) -> list[Place]:
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


def _dims(call: _Call, given: Any, rank: int) -> set[int]:
    """Dimensions as an argument names them; none given means all."""
    if given is None or (isinstance(given, tuple) and not given):
        return set(range(rank))
    return {d % max(rank, 1) for d in (given if isinstance(given, tuple) else (given,))}


def _over(index: int, keepdim: int | None, default: Any = None) -> Callable[[_Call], list[Place]]:
    """A rule for what works along some dimensions, named by an argument: these must not be the rows."""

    def rule(call: _Call) -> list[Place]:
        ref = call.arg(0)
        place, rank = call.place(ref), len(call.shape(ref))
        given = call.arg(index, dict(call.op.kwargs).get("dim", default))
        dims = _dims(call, given, rank)
        if place is None or place in dims:
            raise _refuse(call, "works along the rows")
        kept = keepdim is None or call.arg(keepdim, dict(call.op.kwargs).get("keepdim", False))
        return call.same(place if kept else place - sum(d < place for d in dims))

    return rule


def _mm(call: _Call) -> list[Place]:
    left, right = call.op.args[-2:] if len(call.op.args) == 2 else call.op.args[1:3]
    return call.same(_product(call, call.place(left), call.place(right), 0, 1))


def _addmm(call: _Call) -> list[Place]:
    place = _mm(call)[0]
    bias = call.arg(0)
    if call.place(bias) is not None and call.place(bias) + 2 - len(call.shape(bias)) != place:  # type: ignore[operator]
        raise _refuse(call, "adds rows to other rows")
    return [place]


def _product(call: _Call, left: Place, right: Place, row: int, column: int) -> int:
    if left == row and right is None:
        return row
    if right == column and left is None:
        return column
    raise _refuse(call, "multiplies rows with rows")


def _bmm(call: _Call) -> list[Place]:
    left, right = call.op.args[-2:] if len(call.op.args) == 2 else call.op.args[1:3]
    places = call.place(left), call.place(right)
    if places == (0, 0):
        return [0]
    return [_product(call, *places, 1, 2)]


def _permuted(order: Callable[[_Call, int], Sequence[int]]) -> Callable[[_Call], list[Place]]:
    def rule(call: _Call) -> list[Place]:
        ref = call.arg(0)
        rank = len(call.shape(ref))
        return [list(order(call, rank)).index(call.place(ref))]  # type: ignore[arg-type]

    return rule


def _swapped(rank: int, a: int, b: int) -> list[int]:
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return order


def _view(call: _Call) -> list[Place]:
    ref = call.arg(0)
    place, shape, new = call.place(ref), call.shape(ref), call.out()
    assert place is not None
    before = _count(shape[:place])
    for d, n in enumerate(new):
        if n == ROW and before is not None and _count(new[:d]) == before:
            return [d]
    raise _refuse(call, "merges the rows with another dimension")


def _count(sizes: Iterable[int | Size]) -> int | None:
    numbers = [n for n in sizes if not isinstance(n, Size)]
    return prod(numbers) if len(numbers) == len(list(sizes)) else None


def _expand(call: _Call) -> list[Place]:
    ref = call.arg(0)
    place = call.place(ref)
    assert place is not None
    return [place + len(call.out()) - len(call.shape(ref))]


def _unsqueeze(call: _Call) -> list[Place]:
    place, rank = call.place(call.arg(0)), len(call.out())
    assert place is not None
    return [place + (call.arg(1) % rank <= place)]


def _squeeze(call: _Call) -> list[Place]:
    ref = call.arg(0)
    place, shape = call.place(ref), call.shape(ref)
    if call.arg(1) is None:
        raise _refuse(call, "without a dimension would drop a batch of one")
    dims = _dims(call, call.arg(1), len(shape))
    if place is None or place in dims:
        raise _refuse(call, "of the rows would drop a batch of one")
    return [place - sum(d < place and shape[d] == 1 for d in dims)]


def _select(call: _Call) -> list[Place]:
    ref = call.arg(0)
    place, dim = call.place(ref), call.arg(1) % len(call.shape(ref))
    if place is None or place == dim:
        raise _refuse(call, "takes one row")
    return [place - (dim < place)]


def _cat(call: _Call) -> list[Place]:
    refs, rank = call.arg(0), len(call.out())
    places = {call.place(ref) for ref in refs}
    dim = call.arg(1, dict(call.op.kwargs).get("dim", 0)) % rank
    if len(places) != 1 or dim in places:
        raise _refuse(call, "joins along the rows")
    return [places.pop()]


def _stack(call: _Call) -> list[Place]:
    refs, rank = call.arg(0), len(call.out())
    places = {call.place(ref) for ref in refs}
    if len(places) != 1:
        raise _refuse(call, "stacks rows with other rows")
    place = places.pop()
    return [place + (call.arg(1, 0) % rank <= place)]


def _embedding(call: _Call) -> list[Place]:
    if call.place(call.arg(0)) is not None:
        raise _refuse(call, "looks rows up in rows")
    return [call.place(call.arg(1))]


def _gather(call: _Call) -> list[Place]:
    source, index = call.arg(0), call.arg(2)
    dim = call.arg(1) % len(call.shape(source))
    if call.place(source) != call.place(index) or call.place(source) == dim:
        raise _refuse(call, "gathers across rows")
    return [call.place(index)]


def _index_select(call: _Call) -> list[Place]:
    place = call.place(call.arg(0))
    if place is None or place == call.arg(1) % len(call.shape(call.arg(0))) or call.place(call.arg(2)) is not None:
        raise _refuse(call, "picks rows")
    return [place]


def _layer_norm(call: _Call) -> list[Place]:
    ref = call.arg(0)
    place, rank = call.place(ref), len(call.shape(ref))
    if place is None or place >= rank - len(call.arg(1)):
        raise _refuse(call, "normalises over the rows")
    return call.same(place)


def _layer_norm_backward(call: _Call) -> list[Place]:
    place = call.place(call.arg(1))
    if place is None or any(v >= 0 for v in call.op.outputs[1:]):
        raise _refuse(call, "sums over the rows")
    return [place, None, None]


_same_place = _over(1, None)
_reduced = _over(1, 2)

_RULES: dict[str, Callable[[_Call], list[Place]]] = {
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
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "select": _select,
    "slice": _over(1, None, 0),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "chunk"), _over(2, None, 0)),
    **dict.fromkeys(("slice_backward", "select_backward"), lambda call: _scattered(call)),
    "cat": _cat,
    "stack": _stack,
    "embedding": _embedding,
    "gather": _gather,
    "index_select": _index_select,
    **dict.fromkeys(
        ("sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "logsumexp", "var", "std"), _reduced
    ),
    **dict.fromkeys(("var_mean", "std_mean"), _over(1, 3)),
    "linalg_vector_norm": _over(2, 3),
    **dict.fromkeys(("_softmax", "_log_softmax", "cumsum", "cumprod", "flip"), _same_place),
    **dict.fromkeys(("_softmax_backward_data", "_log_softmax_backward_data"), _over(2, None)),
    "constant_pad_nd": lambda call: _padded(call),
    "native_layer_norm": _layer_norm,
    "native_layer_norm_backward": _layer_norm_backward,
}


def _scattered(call: _Call) -> list[Place]:
    """The backward of a slice or a selection puts a gradient into zeros: rows stay if another dimension was cut."""
    place, dim = call.place(call.arg(0)), call.arg(2) % len(call.out())
    if call.op.name.startswith("aten.select") and place is not None:
        place += dim <= place
    if place is None or place == dim:
        raise _refuse(call, "puts rows among rows")
    return [place]


def _padded(call: _Call) -> list[Place]:
    place, rank = call.place(call.arg(0)), len(call.out())
    if place is None or place >= rank - len(call.arg(1)) // 2:
        raise _refuse(call, "pads the rows")
    return [place]
