"""A loop taken step by step by torch operations: what each step is given, and which rows are alive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, cat

from unrolled.execution.protocol import LoopInputs
from unrolled.execution.timed import Timed
from unrolled.plan.loops import LoopProgram
from unrolled.recording.interpret import compiled

Results = Sequence[Tensor]


def stepped(loop: LoopProgram, request: LoopInputs) -> Iterator[tuple[int, Results]]:
    """Every step's number and what it returns, in the order in which they are walked.

    Args:
        loop: the program; its last outputs are the states.
        request: what it is run on.
    """
    step, states = compiled(loop.program), request.states
    first = len(loop.emitted) + len(loop.totals)
    order = range(request.extent.steps)
    given = _given(loop, request)
    for t in reversed(order) if request.reverse else order:
        alive = request.extent.sizes[t]
        results: Results = step(alive, *given(t), *_received(states, request.states, alive))
        yield t, results
        states = results[first:]


def _given(loop: LoopProgram, request: LoopInputs) -> Callable[[int], list[Tensor]]:
    """For step t the entries of all sequences, and what is the same at every step."""
    extent, values = request.extent, loop.program.values
    folds = [values[v].rows if extent.ragged else None for v in (*loop.sequences, *loop.fixed)]
    columns = [Timed(x, extent, rows).each() for x, rows in zip(request.sequences, folds, strict=False)]
    fixed = list(zip(request.fixed, folds[len(columns) :], strict=True))

    def given(t: int) -> list[Tensor]:
        alive = extent.sizes[t]
        same = [x if rows is None else x.narrow(rows, 0, x.shape[rows] // extent.batch * alive) for x, rows in fixed]
        return [*(column[t] for column in columns), *same]

    return given


def _received(states: Sequence[Tensor], first: Sequence[Tensor], alive: int) -> Sequence[Tensor]:
    """The states of so many rows: some may have ended since the step before, others begin."""
    have = states[0].shape[0] if states[0].dim() else alive
    if have == alive:
        return states
    if have > alive:
        return [state[:alive] for state in states]
    return [cat([state, start[have:alive]]) for state, start in zip(states, first, strict=True)]
