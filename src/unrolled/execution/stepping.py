"""A loop run step by step by torch operations: what each step reads, and which rows it has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, cat

from unrolled.execution.protocol import LoopInputs
from unrolled.execution.series import TimeSeries
from unrolled.plan.loops import LoopProgram
from unrolled.recording.interpret import compiled


def iterate_loop(loop: LoopProgram, inputs: LoopInputs) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Run a loop; yield the number of each step and what it returns, in the order in which they run.

    Args:
        loop: the program; its last outputs are the states.
        inputs: what it is run on.
    """
    extent, values, states = inputs.extent, loop.program.values, inputs.states
    step, first = compiled(loop.program), len(loop.emitted) + len(loop.totals)
    rows = [values[v].rows if extent.ragged else None for v in (*loop.sequences, *loop.fixed)]
    columns = [TimeSeries(x, extent, dim).each() for x, dim in zip(inputs.sequences, rows, strict=False)]
    fixed = list(zip(inputs.fixed, rows[len(columns) :], strict=True))
    for t in reversed(range(extent.steps)) if inputs.reverse else range(extent.steps):
        alive = extent.sizes[t]
        same = [x if dim is None else x.narrow(dim, 0, x.shape[dim] // extent.batch * alive) for x, dim in fixed]
        received = _states_of(alive, states, inputs.states)
        results: Sequence[Tensor] = step(alive, *(column[t] for column in columns), *same, *received)
        yield t, results
        states = results[first:]


def _states_of(alive: int, states: Sequence[Tensor], first: Sequence[Tensor]) -> Sequence[Tensor]:
    """The states of so many rows: some may have ended since the step before, others begin."""
    have = states[0].shape[0] if states[0].dim() else alive
    if have == alive:
        return states
    if have > alive:
        return [state[:alive] for state in states]
    return [cat([state, start[have:alive]]) for state, start in zip(states, first, strict=True)]
