"""Sums over copies: which gradients may be added up over the steps early, and by which operations.

A weight's gradient is the sum of the copies' shares. A product that contracts the rows of one step contracts, with time
folded into the rows, those of all steps at once; whatever follows it must be linear for that to be the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from unrolled.operations.operation import Linear, operation_of
from unrolled.recording.program import Op, Program, Ref


def contracts_rows(op: Op, rows: Mapping[int, int], program: Program) -> bool:
    """Whether an operation adds up over the rows, so that folded over T it adds up over the steps too."""
    places = tuple(rows.get(v) for v in op.inputs)
    if op.base == "sum":
        rank = len(program.values[op.inputs[0]].shape)
        dims = op.args[1] if len(op.args) > 1 and op.args[1] else range(rank)
        return places[0] in {d % rank for d in dims}
    return places == operation_of(op).contracts


def summable(program: Program, wanted: Sequence[int], same: Collection[int]) -> frozenset[int]:
    """Values that may be added up over the steps early: all that follows is linear, and its sum is what is wanted.

    Args:
        program: a step backward.
        wanted: the outputs of which only the sum over all steps is read.
        same: values that are the same at every step.
    """
    consumers: dict[int, list[Op]] = {}
    for op in program.ops:
        for value in op.inputs:
            consumers.setdefault(value, []).append(op)
    found: set[int] = set()
    others = set(program.outputs) - set(wanted)
    for value in reversed(range(len(program.values))):
        followers = consumers.get(value, [])
        if value in others or not (followers or value in wanted):
            continue
        if all(_linear(op, value, same) and found.issuperset(v for v in op.outputs if v >= 0) for op in followers):
            found.add(value)
    return frozenset(found)


def _linear(op: Op, value: int, same: Collection[int]) -> bool:
    operation = operation_of(op)
    if operation.fill is not None and any(op.args[operation.fill :]):
        return False
    if operation.linear is Linear.EACH:
        return op.inputs.count(value) == 1 and all(v in same for v in op.inputs if v != value)
    if operation.expression:  # a factor, and adding a number at every step, are not worth the proof
        return operation.linear is not None and not op.kwargs and all(isinstance(arg, Ref) for arg in op.args)
    return operation.linear is not None
