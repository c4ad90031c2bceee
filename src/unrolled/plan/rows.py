"""Rows: which dimension of each value is the batch, proved operation by operation.

An operation acts row by row if row b of its result depends on row b of what it reads, and on nothing else of the batch.
Only through such operations may time be folded into the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unrolled.operations.operation import rows_of_results
from unrolled.operations.row_rules import CouplesRowsError, Place, Rows
from unrolled.recording.lines import after
from unrolled.recording.program import Custom, Program


def rows_in_front(step: Program) -> dict[int, int]:
    """Where the rows of a step's inputs are, as a caller gives them: in front, of those that have any."""
    shapes = {v: step.values[v].shape for v in step.inputs}
    return {v: 0 for v, shape in shapes.items() if shape and not isinstance(shape[0], int)}


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
            if isinstance(op.target, Custom):
                found = _rows_of_custom(op.target, [places.get(v) for v in op.inputs])
            else:
                found = rows_of_results(Rows(program, op, places))
        except CouplesRowsError as error:
            reasons[number] = after(str(error), op.line)
            unknown.update(op.outputs)
            continue
        places |= {v: place for v, place in zip(op.outputs, found, strict=False) if v >= 0 and place is not None}
    return places, reasons


def _rows_of_custom(custom: Custom, inputs: Sequence[Place]) -> list[Place]:
    """Where the rows of a Function's results are, if those of its inputs are there."""
    forward = custom.forward
    seeds = {v: place for v, place in zip(forward.inputs, inputs, strict=True) if place is not None}
    places, reasons = find_rows(forward, seeds)
    if reasons:
        raise CouplesRowsError(f"inside {custom.name}: {next(iter(reasons.values()))}")
    return [places.get(v) for v in forward.outputs]
