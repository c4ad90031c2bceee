"""Keeping: which values of a step its backward finds in memory, and which it makes again.

Memory is what a long horizon costs, and what a step's time goes into once the arithmetic is fast: a value that one
light operation makes of others that are there anyway is not kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from unrolled.operations.operation import Cost, operation_of
from unrolled.recording.program import Op


def made_again(ops: Collection[Op], read: Sequence[int], there: Collection[int]) -> frozenset[Op]:
    """The forward operations that the backward runs again.

    Args:
        ops: the forward operations.
        read: the values that the backward reads.
        there: values that are in memory anyway.

    Returns:
        Light operations whose operands are in memory anyway, or are kept for others.
    """
    maker = {v: op for op in ops for v in op.outputs if v >= 0}
    kept = [v for v in read if v in maker and v not in there]
    found: list[Op] = []
    operands: set[int] = set()
    for value in sorted(kept, reverse=True):
        op = maker[value]
        at_hand = {*there, *(v for v in kept if v != value and maker[v] not in found)}
        if _is_light(op) and value not in operands and at_hand.issuperset(op.inputs):
            found.append(op)
            operands.update(op.inputs)
    return frozenset(found)


def _is_light(op: Op) -> bool:
    return operation_of(op).cost <= Cost.LIGHT and len(op.outputs) == 1
