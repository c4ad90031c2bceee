"""Plans: how a sequence will be run. Frozen and tensor-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from unrolled.plan.backward import Backward, colour_backward, derive_backward
from unrolled.plan.fuse import fused
from unrolled.plan.loops import LoopProgram, cut_loop, once_each, sample_values
from unrolled.plan.partition import Loop, Stage, colour, places, read_outside
from unrolled.plan.rows import find_rows, rows_in_front
from unrolled.plan.sums import summable
from unrolled.recording.program import dependents
from unrolled.recording.record import ROWS, Recording, record_step, samples_of
from unrolled.trees import Tree, leaves


@dataclass(frozen=True)
class PlannedLoop:
    """A loop and its way back.

    Attributes:
        inference: its program where nothing is kept, and nothing emitted twice.
        shared: for each emitted value which one of `inference` it is.
        loop: its program, which also emits what the backward reads.
        backward: its step backward.
        emits: how many of the emitted values are asked for by others than the backward.
        rows: where the rows of the backward's values are.
        coupled: the backward's operations that do not act row by row, and why.
        sums: the backward's values that may be added up over the steps early.
    """

    inference: LoopProgram
    shared: tuple[int, ...]
    loop: LoopProgram
    backward: Backward
    emits: int
    rows: Mapping[int, int]
    coupled: Mapping[int, str]
    sums: frozenset[int]

    def zeros(self, value: int, rows: int, device: torch.device) -> Tensor:
        """Zeros in the shape of a value for so many rows, without memory for them."""
        known = self.loop.program.values[value]
        return torch.zeros((), dtype=known.dtype, device=device).expand(known.sizes(rows))


@dataclass(frozen=True)
class StepPlan:
    """A recorded and coloured step.

    Attributes:
        recording: the step as a program.
        stages: the stages in which a segment is run, in order.
        loops: the program of each stage that is a loop.
        planned: each loop with its way back.
        places: for each operation once, before, through or after.
        rows: where the rows of each value are.
        coupled: operations that are not proved to act row by row, and why.
        read: states that are read outside of the loop that hands them on.
        handed: for each output that a loop makes the number of its copy, which is the caller's alone.
        beside: operations that a loop does beside what it must.
        asked: inputs and fixed values whose gradients are asked for.
    """

    recording: Recording
    stages: tuple[Stage, ...]
    loops: tuple[LoopProgram | None, ...]
    planned: dict[LoopProgram, PlannedLoop]
    places: tuple[str, ...]
    rows: Mapping[int, int]
    coupled: Mapping[int, str]
    read: frozenset[int]
    handed: Mapping[int, int]
    beside: frozenset[int]
    asked: frozenset[int]

    @cached_property
    def why_not_ragged(self) -> str | None:
        """Why rows may not end at different times: an operation, forward or backward, that is not proved row-wise."""
        reasons = [*self.coupled.values()]
        for planned in self.planned.values():
            program = planned.backward.program
            for number, reason in planned.coupled.items():
                made = [program.values[v] for v in program.ops[number].outputs if v >= 0]
                if any(value.rows is not None for value in made):
                    reasons.append(f"backward, {reason}")
        return reasons[0] if reasons else None


def plan_step(
    cell: nn.Module,
    inputs: Tree,
    state: Tree,
    context: Tree,
    batch_size: int,
    needing: Sequence[bool],
    *,
    fuse: bool = False,
) -> StepPlan:
    """Record a cell's step and colour it.

    Args:
        cell: the cell.
        inputs: the input of one copy, `[B, ...]`.
        state: the state it receives.
        context: its context, or None.
        batch_size: B.
        needing: for each leaf of inputs and context whether its gradient is asked for.
        fuse: whether loops are compiled, and also do the light work beside them.

    Raises:
        UnrecordableError: if the step cannot be recorded; the message says why.
    """
    samples = samples_of((inputs, state, context), batch_size)
    recording = record_step(cell, samples)
    given = (*recording.inputs, *recording.fixed)
    externals = [external.fetch(cell).requires_grad for external in recording.externals]
    asked = {v for v, needed in zip(given, [*needing, *externals], strict=True) if needed}
    return _coloured(cell, recording, samples, asked, batch_size if fuse else None)


def _coloured(
    cell: nn.Module,
    recording: Recording,
    samples: Sequence[tuple[Tree, Tree, Tree]],
    asked: set[int],
    batch_size: int | None,
) -> StepPlan:
    program = recording.program
    apart = colour(program, recording.state, recording.next_state, recording.inputs)
    changing = dependents(program.ops, {*recording.inputs, *recording.state})
    fixed = {v for v in range(len(program.values)) if v not in changing}
    rows, coupled = find_rows(program, rows_in_front(program))
    stages = tuple(apart if batch_size is None else fused(program, apart, recording.state, coupled, fixed, batch_size))
    needing = dependents(program.ops, {*asked, *recording.state})
    values = [_values(cell, recording, sample, n) for sample, n in zip(samples, ROWS, strict=True)]
    read = read_outside(program, stages, recording.state)
    handed = _handed(recording, stages)
    rows |= {copy: rows[v] for v, copy in handed.items() if v in rows}
    wanted = {stage: _wanted(recording, stage, read, handed) for stage in stages if isinstance(stage, Loop)}
    cut = [
        cut_loop(program, stage, recording.state, recording.next_state, fixed, wanted[stage], handed)
        if isinstance(stage, Loop)
        else None
        for stage in stages
    ]
    planned = {
        loop: _with_backward(loop, wanted[stage], needing, values, rows, batch_size)
        for stage, loop in zip(stages, cut, strict=True)
        if isinstance(stage, Loop) and loop is not None
    }
    found = tuple(places(program, stages))
    beside = frozenset(_loop_ops(stages) - _loop_ops(apart))
    return StepPlan(
        recording, stages, tuple(cut), planned, found, rows, coupled, read, handed, beside, frozenset(asked)
    )


def _loop_ops(stages: Sequence[Stage]) -> set[int]:
    return {n for stage in stages if isinstance(stage, Loop) for n in stage.ops}


def _values(cell: nn.Module, recording: Recording, sample: tuple[Tree, Tree, Tree], rows: int) -> dict[int, Tensor]:
    externals = [external.fetch(cell) for external in recording.externals]
    return sample_values(recording.program, [*leaves(sample), *externals], rows)


def _handed(recording: Recording, stages: Sequence[Stage]) -> dict[int, int]:
    """For each output that a loop makes the number of its copy, which is the caller's alone."""
    ops = [recording.program.ops[n] for stage in stages if isinstance(stage, Loop) for n in stage.ops]
    made = {v for op in ops for v in op.outputs if v >= 0}
    asked = [v for v in dict.fromkeys(recording.outputs) if v in made]
    return {v: len(recording.program.values) + number for number, v in enumerate(asked)}


def _wanted(recording: Recording, loop: Loop, read: frozenset[int], handed: Mapping[int, int]) -> set[int]:
    """What others than the loop read of its values: operations, other states, the caller."""
    inside = set(loop.ops)
    found = {v for n, op in enumerate(recording.program.ops) if n not in inside for v in op.inputs}
    leaves = enumerate(zip(recording.state, recording.next_state, strict=True))
    found |= {following for leaf, (state, following) in leaves if leaf not in loop.leaves or state in read}
    return found | set(handed.values())


def _with_backward(
    loop: LoopProgram,
    wanted: set[int],
    needing: set[int],
    values: Sequence[Mapping[int, Tensor]],
    rows: Mapping[int, int],
    batch_size: int | None,
) -> PlannedLoop:
    forward, widened, step = derive_backward(loop, wanted, needing, values, ROWS)
    by_position = dict(zip(widened.program.inputs, loop.program.inputs, strict=True))
    seeds = {v: rows[by_position[v]] for v in widened.program.inputs if by_position[v] in rows}
    forward_rows, _ = find_rows(widened.program, seeds)
    emitted = [widened.emitted[i] for i in step.emitted]
    states = [widened.next_states[i] for i in step.states]
    tangents = dict(zip(step.tangents, emitted + states, strict=True))
    known = {v: forward_rows[v] for v in (*step.kept, *step.fixed) if v in forward_rows}
    known |= {v: forward_rows[source] for v, source in tangents.items() if source in forward_rows}
    back_rows, coupled = find_rows(step.program, known)
    a, b, _ = loop.counts
    changing = dependents(step.program.ops, {*step.kept, *step.tangents})
    same = {v for v in range(len(step.program.values)) if v not in changing}
    sums = summable(step.program, [v for v in step.program.outputs[a : a + b] if v >= 0], same)
    inference, shared = once_each(forward)
    backward = colour_backward(step, widened, coupled, sums, batch_size)
    return PlannedLoop(inference, shared, widened, backward, len(loop.emitted), back_rows, coupled, sums)
