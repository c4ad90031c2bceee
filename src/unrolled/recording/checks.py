"""Checks: what a step asks its numbers, and the answer that its recording rests on.

A step that asks (`if torch.isnan(h).any(): raise ...`) is recorded with the answer that the numbers at hand give. What
it asked becomes a further result of its program, and the recording stands for those steps that give the same answer. A
check of all rows (`(x >= 0).all()`) is put on the entries before they are reduced: so rows stay independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unrolled.recording.lines import after
from unrolled.recording.program import Custom, Op, Program, Ref, Value

_ATEN = torch.ops.aten


class Asked(NamedTuple):
    """What a step asked.

    Attributes:
        value: the value whose entries are all true or all false, by its number.
        answer: which of the two.
        line: of the user's code, where it asked.
    """

    value: int
    answer: bool
    line: str

    def __str__(self) -> str:
        return f"{after('what it asks', self.line)} is {self.answer} where it was recorded"


def _same(one: Tensor, other: Tensor) -> Tensor | None:
    return (one == other).all() if one.shape == other.shape else None


def _near(one: Tensor, other: Tensor, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False) -> Tensor:
    off = (one - other).abs()
    near = (one == other) | ((off <= atol + (rtol * other).abs()) & (off != float("inf")))
    return (near | ((one != one) & (other != other)) if equal_nan else near).all()


WRITTEN_OUT: Mapping[Any, Callable[..., Tensor | None]] = {_ATEN.equal.default: _same, _ATEN.allclose.default: _near}
"""Questions that reduce what they ask; None for one that is answered by shapes."""

_ASSERTIONS = frozenset([_ATEN._assert_async.default, _ATEN._assert_async.msg])


def asks(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation tells Python that something is True or False, and no other number."""
    if func is _ATEN._local_scalar_dense.default:
        return bool(args[0].dtype == torch.bool)
    return func in WRITTEN_OUT or func in _ASSERTIONS


def at_outputs(program: Program, asked: Sequence[Asked]) -> tuple[Asked, ...]:
    """What is asked, of the values that are the last outputs of a program."""
    values = program.outputs[len(program.outputs) - len(asked) :]
    return tuple(each._replace(value=value) for each, value in zip(asked, values, strict=True))


def on_entries(program: Program, asked: Sequence[Asked]) -> tuple[Program, tuple[Asked, ...]]:
    """A program that asks of entries what it asked of all of them together.

    Args:
        program: the step; its last outputs are what was asked.
        asked: what was asked, in the order of these outputs.

    Returns:
        The program, whose last outputs are now other ones, and what it asks of them. Whenever all of these answers are
        the recorded ones, so are those to the questions before.
    """
    spreading = _Spreading(program)
    found = dict.fromkeys(
        [Asked(*entry, each.line) for each in asked for entry in spreading.entries(each.value, each.answer)]
    )
    results = program.outputs[: len(program.outputs) - len(asked)]
    outputs = (*results, *(each.value for each in found))
    ops = (*program.ops, *spreading.ops)
    spread = replace(program, values=(*program.values, *spreading.values), ops=ops, outputs=outputs)
    return spread.pruned(), tuple(found)


_AND = frozenset(["logical_and", "bitwise_and", "__and__", "mul"])
_OR = frozenset(["logical_or", "bitwise_or", "__or__", "add"])
_NOT = frozenset(["logical_not", "bitwise_not"])
_SHOWN = frozenset(
    "view _unsafe_view reshape squeeze unsqueeze expand permute transpose t alias detach clone _to_copy".split()
)
"""What shows entries in another way; of bools, which a copy to another dtype keeps as true or false."""

_ALL, _ANY = frozenset(["all", "_is_all_true"]), frozenset(["any", "_is_any_true"])
_OF_ENTRIES = {
    **dict.fromkeys([("ge", True), ("gt", True), ("le", False), ("lt", False)], ("min", "amin")),
    **dict.fromkeys([("le", True), ("lt", True), ("ge", False), ("gt", False)], ("max", "amax")),
}
"""By comparison and answer the extreme for which the same, asked of every entry, is enough."""

_NONE_COUNTED = frozenset([("eq", True), ("ne", False), ("gt", False)])
"""Comparisons of a count with zero, and answers, that say that nothing was counted."""


class _Spreading:
    """Follows what was asked back through reductions.

    Args:
        program: the step.

    Attributes:
        ops: operations that are to be added.
        values: what they make.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        ops = {v: program.ops[n] for v, n in program.producers().items()}
        self.made_by = {v: op for v, op in ops.items() if not isinstance(op.target, Custom)}
        self.ops: list[Op] = []
        self.values: list[Value] = []

    def entries(self, value: int, answer: bool) -> Iterator[tuple[int, bool]]:
        """The values, and for each the answer, that together are enough for the answer to a value."""
        op = self.made_by.get(value)
        sources = () if op is None else op.inputs
        name, logical = "" if op is None else op.base, all(self._is_bool(v) for v in sources)
        if any(self.program.values[v].dtype.is_complex for v in sources):
            yield value, answer
        elif name in (_ALL if answer else _ANY) or (name in _SHOWN and logical):
            yield from self.entries(sources[0], answer)
        elif name in (_AND if answer else _OR) and logical and len(sources) == 2:
            for source in sources:
                yield from self.entries(source, answer)
        elif name in _NOT and logical:
            yield from self.entries(sources[0], not answer)
        else:
            yield from self._compared(op, value, answer)

    def _compared(self, op: Op | None, value: int, answer: bool) -> Iterator[tuple[int, bool]]:
        """A comparison of a reduction with a number, made of what is reduced."""
        if op is None or len(op.inputs) != 1 or len(op.args) != 2:
            yield value, answer
            return
        copies, reduction = self._shown_in(op.inputs[0])
        if reduction is None:
            yield value, answer
        elif reduction.base in _OF_ENTRIES.get((op.base, answer), ()):
            yield self._on([*copies, op], reduction.inputs[0]), answer
        elif (op.base, answer) in _NONE_COUNTED and op.args[1] == 0 and self._counts(reduction):
            yield from self.entries(reduction.inputs[0], False)
        else:
            yield value, answer

    def _shown_in(self, value: int) -> tuple[list[Op], Op | None]:
        """The copies to other kinds of numbers that lead to a value of one entry, and what they are made of."""
        copies: list[Op] = []
        op = self.made_by.get(value)
        while op is not None and (op.base in _SHOWN and not self._is_bool(value)):
            if op.base == "_to_copy":
                copies.insert(0, op)
            (value,) = op.inputs
            op = self.made_by.get(value)
        return copies, op if op is not None and op.outputs[0] == value and len(op.inputs) == 1 else None

    def _on(self, ops: Sequence[Op], source: int) -> int:
        """The same operations, one after the other, on another value."""
        for op in ops:
            dtype = self.program.values[op.outputs[0]].dtype
            self.values.append(Value(self.program.values[source].shape, dtype))
            new = len(self.program.values) + len(self.values) - 1
            self.ops.append(replace(op, args=(Ref(source), *op.args[1:]), outputs=(new,)))
            source = new
        return source

    def _counts(self, op: Op) -> bool:
        return op.base == "count_nonzero" or (op.base == "sum" and self._is_bool(op.inputs[0]))

    def _is_bool(self, value: int) -> bool:
        return self.program.values[value].dtype == torch.bool
