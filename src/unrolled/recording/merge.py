"""Two recordings at two batch sizes become one program: what differs between them is affine in the batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from unrolled.recording.events import Event, RawCustom, RawProgram, UnrecordableError
from unrolled.recording.program import Custom, Op, Program, Ref, Size, Value


def merge(first: RawProgram, second: RawProgram, rows: tuple[int, int]) -> Program:
    """One program that serves every batch size.

    Args:
        first: a recording with `rows[0]` rows.
        second: the same step with `rows[1]` rows.
        rows: the two batch sizes.

    Raises:
        UnrecordableError: if the two differ in more than integers affine in the batch size.
    """
    return _Merger(first, second, rows).program(first, second)


def _pairs(first: Sequence[Any], second: Sequence[Any]) -> list[tuple[Any, Any]]:
    if len(first) != len(second):
        raise UnrecordableError("it runs other operations at another batch size")
    return list(zip(first, second, strict=True))


class _Merger:
    def __init__(self, first: RawProgram, second: RawProgram, rows: tuple[int, int]) -> None:
        self.tensors: tuple[Sequence[Tensor], Sequence[Tensor]] = (first.tensors, second.tensors)
        self.rows = rows
        self.values: list[Value] = []
        self.numbers: dict[tuple[int, int], int] = {}

    def program(self, first: RawProgram, second: RawProgram) -> Program:
        """The whole program, without what no output needs."""
        inputs = tuple(self.value(pair) for pair in _pairs(first.inputs, second.inputs))
        ops = tuple(self.op(a, b) for a, b in _pairs(first.events, second.events))
        outputs = tuple(self.value(pair) for pair in _pairs(first.outputs, second.outputs))
        return Program(tuple(self.values), inputs, ops, outputs).pruned()

    def value(self, pair: tuple[int, int]) -> int:
        """The merged number of a pair of values."""
        if pair[0] < 0 or pair[1] < 0:
            if pair[0] != pair[1]:
                raise UnrecordableError("it returns other values at another batch size")
            return -1
        if pair not in self.numbers:
            a, b = (tensors[number] for tensors, number in zip(self.tensors, pair, strict=True))
            if a.dtype != b.dtype or a.dim() != b.dim():
                raise UnrecordableError("a value's dtype or number of dimensions depends on the batch size")
            shape = tuple(self.integer(m, n) for m, n in zip(a.shape, b.shape, strict=True))
            self.numbers[pair] = len(self.values)
            self.values.append(Value(shape, a.dtype))
        return self.numbers[pair]

    def integer(self, first: int, second: int) -> int | Size:
        """One integer for both batch sizes."""
        if first == second:
            return first
        per_row, rest = divmod(second - first, self.rows[1] - self.rows[0])
        if rest:
            raise UnrecordableError(
                f"an integer that is {first} for {self.rows[0]} rows is {second} for {self.rows[1]}"
            )
        return Size(per_row, first - per_row * self.rows[0])

    def argument(self, first: Any, second: Any) -> Any:
        """One argument for both batch sizes."""
        if isinstance(first, Ref) and isinstance(second, Ref):
            return Ref(self.value((first.value, second.value)))
        if isinstance(first, list | tuple) and isinstance(second, list | tuple):
            return tuple(self.argument(a, b) for a, b in _pairs(first, second))
        if type(first) is int and type(second) is int:
            return self.integer(first, second)
        if type(first) is type(second) and (first == second or (first != first and second != second)):
            return first
        raise UnrecordableError(f"an argument is {first!r} at one batch size and {second!r} at another")

    def custom(self, first: RawCustom, second: RawCustom) -> Custom:
        """A Function as one operation for both batch sizes."""
        forward = _Merger(first.forward, second.forward, self.rows)
        backward = _Merger(first.backward, second.backward, self.rows)
        program = forward.program(first.forward, second.forward)
        saved = tuple(forward.value(pair) for pair in _pairs(first.saved, second.saved))
        return Custom(first.name, program, backward.program(first.backward, second.backward), saved)

    def op(self, first: Event, second: Event) -> Op:
        """One operation for both batch sizes."""
        target, named, other = first.target, dict(first.kwargs), dict(second.kwargs)
        if isinstance(target, RawCustom) and isinstance(second.target, RawCustom):
            target = self.custom(target, second.target)
        elif target != second.target or named.keys() != other.keys():
            raise UnrecordableError(f"it runs {first.target} at one batch size and {second.target} at another")
        args = self.argument(first.args, second.args)
        kwargs = tuple((name, self.argument(arg, other[name])) for name, arg in named.items())
        outputs = tuple(self.value(pair) for pair in _pairs(first.outputs, second.outputs))
        return Op(target, args, kwargs, outputs, line=first.line)
