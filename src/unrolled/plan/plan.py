"""Plans: how a sequence will be run. Frozen and tensor-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.plan.colour import Loop, Stage, colour, places, read_outside
from unrolled.plan.loops import Backward, LoopProgram, cut_loop, derive_backward, sample_values
from unrolled.plan.program import dependents
from unrolled.plan.record import ROWS, Recording, Sample, leaves_and_structure, record_step, sample_rows
from unrolled.plan.rows import find_rows
from unrolled.plan.sums import summable
from unrolled.trees import Tree

__all__ = ["PlannedLoop", "StepPlan", "plan_step"]


@dataclass(frozen=True)
class PlannedLoop:
    """A loop and its way back.

    Attributes:
        inference: its program where nothing is kept.
        loop: its program, which also emits what the backward reads.
        backward: its step backward.
        emits: how many of the emitted values are asked for by others than the backward.
        rows: where the rows of the backward's values are.
        coupled: the backward's operations that do not act row by row, and why.
        sums: the backward's values that may be added up over the steps early.
    """

    inference: LoopProgram
    loop: LoopProgram
    backward: Backward
    emits: int
    rows: Mapping[int, int]
    coupled: Mapping[int, str]
    sums: frozenset[int]

    def zeros(self, value: int, batch: int, steps: int | None = None) -> Tensor:
        """Zeros in the shape of a value (at every step), without memory for them."""
        known = self.loop.program.values[value]
        shape = known.sizes(batch)
        return torch.zeros((), dtype=known.dtype).expand(shape if steps is None else (steps, *shape))


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
    """

    recording: Recording
    stages: tuple[Stage, ...]
    loops: tuple[LoopProgram | None, ...]
    planned: dict[LoopProgram, PlannedLoop]
    places: tuple[str, ...]
    rows: Mapping[int, int]
    coupled: Mapping[int, str]
    read: frozenset[int]


def plan_step(cell: nn.Module, inputs: Tree, state: Tree, context: Tree, batch_size: int) -> StepPlan:
    """Record a cell's step and colour it.

    Args:
        cell: the cell.
        inputs: the input of one copy, `[B, ...]`.
        state: the state it receives.
        context: its context, or None.
        batch_size: B.

    Raises:
        UnrecordableError: if the step cannot be recorded; the message says why.
    """
    trees = [leaves_and_structure(tree) for tree in (inputs, state, context)]
    structures = [structure for _, structure in trees]
    samples = [Sample(*(sample_rows(leaves, batch_size, n) for leaves, _ in trees)) for n in ROWS]
    recording = record_step(cell, (samples[0], samples[1]), structures)
    return _coloured(cell, recording, samples)


def _coloured(cell: nn.Module, recording: Recording, samples: Sequence[Sample]) -> StepPlan:
    program = recording.program
    stages = tuple(colour(program, recording.state, recording.next_state, recording.inputs))
    changing = dependents(program.ops, {*recording.inputs, *recording.state})
    fixed = {v for v in range(len(program.values)) if v not in changing}
    seeds = {v: 0 for v in (*recording.inputs, *recording.state, *recording.fixed) if _has_rows(program.values[v])}
    rows, coupled = find_rows(program, seeds)
    values = [_values(cell, recording, sample, n) for sample, n in zip(samples, ROWS, strict=True)]
    cut = [
        cut_loop(program, stage, recording.state, recording.next_state, fixed, _wanted(recording, stage))
        if isinstance(stage, Loop)
        else None
        for stage in stages
    ]
    planned = {loop: _with_backward(loop, values, rows) for loop in cut if loop is not None}
    read = read_outside(program, stages, recording.state)
    return StepPlan(recording, stages, tuple(cut), planned, tuple(places(program, stages)), rows, coupled, read)


def _has_rows(value: Any) -> bool:
    return bool(value.shape) and not isinstance(value.shape[0], int)


def _values(cell: nn.Module, recording: Recording, sample: Sample, rows: int) -> dict[int, Tensor]:
    externals = [external.fetch(cell) for external in recording.externals]
    return sample_values(recording.program, [*sample.inputs, *sample.state, *sample.context, *externals], rows)


def _wanted(recording: Recording, loop: Loop) -> set[int]:
    """What others than the loop read of its values."""
    inside = set(loop.ops)
    read = {v for n, op in enumerate(recording.program.ops) if n not in inside for v in op.inputs}
    return read | set(recording.program.outputs)


def _with_backward(loop: LoopProgram, values: Sequence[Mapping[int, Tensor]], rows: Mapping[int, int]) -> PlannedLoop:
    inference, widened, backward = derive_backward(loop, values, ROWS)
    program = backward.program
    by_position = dict(zip(widened.program.inputs, loop.program.inputs, strict=True))
    seeds = {v: rows[by_position[v]] for v in widened.program.inputs if by_position[v] in rows}
    forward_rows, _ = find_rows(widened.program, seeds)
    start = len(backward.kept) + len(backward.fixed)
    emitted = [widened.emitted[i] for i in backward.emitted]
    states = [widened.next_states[i] for i in backward.states]
    tangents = dict(zip(program.inputs[start:], emitted + states, strict=True))
    known = {v: forward_rows[v] for v in (*backward.kept, *backward.fixed) if v in forward_rows}
    known |= {v: forward_rows[source] for v, source in tangents.items() if source in forward_rows}
    back_rows, coupled = find_rows(program, known)
    a, b, _ = loop.counts
    sums = summable(program, [v for v in program.outputs[a : a + b] if v >= 0])
    return PlannedLoop(inference, widened, backward, len(loop.emitted), back_rows, coupled, sums)
