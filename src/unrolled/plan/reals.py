"""A recording over real numbers: a step that computes with complex ones, recorded again with a pair for each.

The program is run on real and imaginary parts, operation by operation by their formulas, while a tape looks on. What
comes after this pass, engines included, sees real numbers only. Where a caller's leaves go in and come out,
`execution.run` takes them apart and joins them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unrolled.autograd_graph import new_leaf
from unrolled.operations.pairs import Pair, formula_of
from unrolled.recording.checks import at_outputs
from unrolled.recording.events import RawProgram, UnrecordableError
from unrolled.recording.interpret import run_op
from unrolled.recording.merge import merge
from unrolled.recording.program import Custom, Op, Program, Ref, resolved
from unrolled.recording.record import ROWS, Recording
from unrolled.recording.tape import Tape


def in_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Some tensors, for each complex one its real and its imaginary part.

    Example:
        >>> in_parts([torch.tensor([1 + 2j]), torch.tensor([3.0])])
        [tensor([1.]), tensor([2.]), tensor([3.])]
    """
    return [part for x in tensors for part in ((x.real, x.imag.resolve_neg()) if x.is_complex() else (x,))]


def over_reals(recording: Recording, samples: Sequence[Sequence[Tensor]]) -> Recording:
    """The recording itself if nothing in it is complex, else one of the same step on pairs.

    Args:
        recording: the step as the cell does it.
        samples: what the program is run on, with each of `ROWS` rows.

    Raises:
        UnrecordableError: for an operation on complex numbers that has no formula.
    """
    program = recording.program
    if not any(value.dtype.is_complex for value in program.values):
        return recording
    if program.generators:
        raise UnrecordableError("it computes with complex numbers, and draws from a generator that it was given")
    first, second = (_OnPairs(program, rows).record(sample) for sample, rows in zip(samples, ROWS, strict=True))
    sizes = [1 + program.values[v].dtype.is_complex for v in program.inputs]
    a, b, c = recording.counts
    counts = (sum(sizes[:a]), sum(sizes[a : a + b]), sum(sizes[a + b : a + b + c]))
    found = zip(recording.externals, sizes[a + b + c :], strict=True)
    externals = tuple(part for external, size in found for part in (external.parts if size > 1 else [external]))
    program = merge(first, second, ROWS)
    asked = at_outputs(program, recording.asked)
    return replace(recording, program=program, externals=externals, counts=counts, asked=asked)


def inputs_in_parts(recording: Recording, reals: Recording) -> dict[int, list[int]]:
    """For each input of a recording which ones of the same over real numbers are its parts."""
    ahead, values = iter(reals.program.inputs), recording.program.values
    return {v: [next(ahead) for _ in range(1 + values[v].dtype.is_complex)] for v in recording.program.inputs}


class _OnPairs:
    """Runs a program with a pair for every complex value, for so many rows."""

    def __init__(self, program: Program, rows: int) -> None:
        self.program, self.rows = program, rows
        self.values: dict[int, Tensor | Pair] = {}
        self.stacked: dict[int, Sequence[Tensor]] = {}  # what lies along the last dimension of a value

    def record(self, inputs: Sequence[Tensor]) -> RawProgram:
        """What it does, on a tape."""
        tape, numbers = Tape(), list[int]()
        for value, tensor in zip(self.program.inputs, inputs, strict=True):
            leaves = [new_leaf(part) for part in in_parts([tensor])]
            numbers += [tape.add(leaf) for leaf in leaves]
            self.values[value] = Pair(*leaves) if len(leaves) > 1 else leaves[0]
        with torch.enable_grad():
            for op in self.program.ops:
                self.run(op, tape)
        found = [self.values[v] for v in self.program.outputs]
        outputs = [tape.number(part) for x in found for part in (x.parts if isinstance(x, Pair) else [x])]
        return RawProgram(tape.tensors, numbers, tape.events, outputs)

    def run(self, op: Op, tape: Tape) -> None:
        """Run an operation."""
        if isinstance(op.target, Custom) and not self.is_complex(op):
            found: Sequence[Any] = self.as_it_is(op, tape)
        else:
            with tape:
                found = self.on_parts(op)
        made = {v: result for v, result in zip(op.outputs, found, strict=False) if v >= 0}
        for value, result in made.items():
            self.check(op, value, result)
        self.values |= made
        if op.base in ("stack", "view_as_real"):
            self.remember(op)

    def as_it_is(self, op: Op, tape: Tape) -> Sequence[Any]:
        """The results of a Function of real numbers: it is an operation already, with a backward of its own."""
        results = [new_leaf(result) for result in run_op(op, self.values, self.rows)]
        given = tuple(Ref(tape.number(tensor)) for tensor in resolved(op.args, self.values, self.rows))
        made = tape.note(op.target, given, tuple(results))
        for result, number in zip(results, made, strict=True):
            tape.memory.put(result, number, own=True)
        return results

    def on_parts(self, op: Op) -> Sequence[Any]:
        """The results of any other operation."""
        if self.is_selection(op):
            return [self.stacked[op.inputs[0]][op.args[2]]]
        return self.by_formula(op) if self.is_complex(op) else run_op(op, self.values, self.rows)

    def by_formula(self, op: Op) -> Sequence[Any]:
        """The results of an operation on complex numbers."""
        formula = None if isinstance(op.target, Custom) else formula_of(op)
        if formula is None:
            raise UnrecordableError(f"{op.name} of complex numbers has no formula in real ones")
        args = resolved(op.args, self.values, self.rows)
        result = formula(*args, **{name: resolved(arg, self.values, self.rows) for name, arg in op.kwargs})
        return [result] if isinstance(result, Tensor | Pair) else result

    def check(self, op: Op, value: int, result: Tensor | Pair) -> None:
        """Refuse a result that is not of the kind that the operation makes."""
        known = self.program.values[value]
        kind = result.real.dtype.to_complex() if isinstance(result, Pair) else result.dtype
        shapes = {tuple(part.shape) for part in (result.parts if isinstance(result, Pair) else [result])}
        if kind != known.dtype or shapes != {known.sizes(self.rows)}:
            raise UnrecordableError(f"{op.name} of complex numbers of these kinds has no formula in real ones")

    def remember(self, op: Op) -> None:
        """Keep what a stack is made of: whoever selects from it takes that."""
        (value,), last = op.outputs, len(self.program.values[op.outputs[0]].shape) - 1
        if op.base == "view_as_real":
            self.stacked[value] = self.values[op.inputs[0]].parts
        elif len(op.args) > 1 and op.args[1] in (-1, last):
            self.stacked[value] = [self.values[v] for v in op.inputs]

    def is_complex(self, op: Op) -> bool:
        """Whether an operation reads or makes complex numbers, or is one that only their parts have."""
        values = [self.program.values[v] for v in (*op.inputs, *op.outputs) if v >= 0]
        return op.base == "_neg_view" or any(value.dtype.is_complex for value in values)

    def is_selection(self, op: Op) -> bool:
        """Whether an operation takes one of those that a stack is made of."""
        if op.base != "select" or op.inputs[0] not in self.stacked:
            return False
        return op.args[1] in (-1, len(self.program.values[op.inputs[0]].shape) - 1)
