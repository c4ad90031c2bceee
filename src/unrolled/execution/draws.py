"""Random numbers, drawn copy by copy: each draw uses up what the draws before it have left."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from unrolled.execution.batched import BatchedOps
from unrolled.execution.series import Entry, TimeSeries
from unrolled.recording.interpret import run_op
from unrolled.recording.program import live_in


def draw(batched: BatchedOps, ops: Sequence[int], env: MutableMapping[int, Entry], *, reverse: bool) -> None:
    """Run operations that draw, in the order of the loop; their results are added to `env`.

    Args:
        batched: the step, and how far the segment reaches.
        ops: the operations.
        env: the values of what they read.
        reverse: whether the last copy draws first.
    """
    extent, operations = batched.extent, [batched.program.ops[n] for n in ops]
    read = {v: batched.each(v, env[v]) for v in live_in(operations)}
    made: dict[int, list[Any]] = {v: [None] * extent.steps for op in operations for v in op.outputs if v >= 0}
    for t in reversed(range(extent.steps)) if reverse else range(extent.steps):
        values = {v: column[t] for v, column in read.items()}
        for op in operations:
            values |= zip(op.outputs, run_op(op, values, extent.sizes[t]), strict=False)
        for v, column in made.items():
            column[t] = values[v]
    env.update({v: TimeSeries.joined(column, extent, batched.rows.get(v)) for v, column in made.items()})
