"""Plans: how a sequence will be run. Frozen and tensor-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.plan.backward import Backward, derive_backward, partition_backward
from unrolled.plan.fuse import fused
from unrolled.plan.loops import LoopProgram, cut_loop, without_copies
from unrolled.plan.partition import Draws, Loop, Stage, partition, places_of, read_outside
from unrolled.plan.reals import in_parts, inputs_in_parts, over_reals
from unrolled.plan.rows import find_rows, rows_in_front
from unrolled.plan.sums import summable
from unrolled.recording.generators import bound
from unrolled.recording.guards.scratch import record_cell
from unrolled.recording.guards.twin import twin_of
from unrolled.recording.interpret import all_values
from unrolled.recording.program import Value
from unrolled.recording.record import ROWS, Recording, samples_of
from unrolled.trees import Tree, leaves


@dataclass(frozen=True)
class PlannedLoop:
    """A loop and its way back.

    Attributes:
        inference: its program where nothing is kept, and nothing emitted twice.
        shared: for each emitted value which one of `inference` it is.
        loop: its program, which also emits what the backward reads.
        backward: its step backward.
        emits: how many of the emitted values others than the backward read.
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

    @cached_property
    def written(self) -> dict[Any, Any]:
        """What execution has written of the backward's operations; it is kept with the plan."""
        return {}

    @cached_property
    def keeps_emitted(self) -> list[bool]:
        """Which of the emitted values the backward reads."""
        return [v in self.backward.kept for v in self.loop.emitted]

    @cached_property
    def keeps_states(self) -> list[bool]:
        """Of which states the backward reads what the steps received."""
        return [v in self.backward.kept for v in self.loop.states]

    @cached_property
    def unread(self) -> frozenset[int]:
        """The positions of what is emitted whose gradients the backward does not read."""
        return frozenset(range(self.emits)).difference(self.backward.emitted)

    def zeros(self, value: int, rows: int, device: torch.device) -> Tensor:
        """Zeros in the shape of a value for so many rows, without memory for them."""
        known = self.loop.program.values[value]
        return torch.zeros((), dtype=known.dtype, device=device).expand(known.sizes(rows))


@dataclass(frozen=True)
class StepPlan:
    """A recorded and partitioned step.

    Attributes:
        recording: the step as a program, as the cell does it.
        reals: the same over real numbers, which is what runs: the recording itself, if nothing in it is complex.
        stages: the stages in which a segment is run, in order.
        loops: the program of each loop among them.
        planned: each loop with its way back.
        places: for each operation once, before, through or after.
        rows: where the rows of each value are.
        coupled: operations that are not proved to act row by row, and why.
        read: states that are read outside of the loop that passes them on.
        copies: for each output that a loop makes the number of its copy, which is the caller's alone.
        fused: operations that a loop does although it need not.
        requires_grad: inputs and fixed values of the recording whose gradients are wanted.
    """

    recording: Recording
    reals: Recording
    stages: tuple[Stage, ...]
    loops: Mapping[Loop, LoopProgram]
    planned: dict[LoopProgram, PlannedLoop]
    places: tuple[str, ...]
    rows: Mapping[int, int]
    coupled: Mapping[int, str]
    read: frozenset[int]
    copies: Mapping[int, int]
    fused: frozenset[int]
    requires_grad: frozenset[int]

    @cached_property
    def written(self) -> dict[Any, Any]:
        """What execution has written of the step's operations; it is kept with the plan."""
        return {}

    @cached_property
    def ends(self) -> list[Value]:
        """What the caller gets: the values of outputs, then of last states, as the cell has them."""
        values = self.recording.program.values
        return [values[v] for v in (*self.recording.outputs, *self.recording.next_state)]

    @cached_property
    def copied(self) -> list[bool]:
        """Which of the outputs, and which of the last states, a loop makes for the caller alone; in real parts."""
        return [v in self.copies for v in self.reals.outputs] + [True] * len(self.reals.next_state)

    @cached_property
    def draws(self) -> bool:
        """Whether random numbers are drawn in each step."""
        return any(isinstance(stage, Draws) for stage in self.stages)

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
    requires_grad: Sequence[bool],
    *,
    fuse: bool = False,
) -> StepPlan:
    """Record a cell's step and partition it.

    Args:
        cell: the cell.
        inputs: the input of one copy, `[B, ...]`.
        state: the state it receives.
        context: its context, or None.
        batch_size: B.
        requires_grad: for each leaf of inputs and context whether its gradient is wanted.
        fuse: whether loops are compiled, and also do light work that could be done outside of them.

    Raises:
        UnrecordableError: if the step cannot be recorded; the message says why.
    """
    samples = samples_of((inputs, state, context), batch_size)
    recording = record_cell(cell, samples)
    externals = [external.fetch(cell) for external in recording.externals]
    wanted = [*requires_grad, *(tensor.requires_grad for tensor in externals)]
    needed = frozenset(v for v, grad in zip((*recording.inputs, *recording.fixed), wanted, strict=True) if grad)
    tensors = [[*leaves(sample), *externals] for sample in samples]
    reals = over_reals(recording, tensors)
    # A copy's generators, since drawing moves them on.
    program = bound(reals.program, twin_of(cell)) if reals.program.generators else reals.program
    values = [all_values(program, in_parts(x), n) for x, n in zip(tensors, ROWS, strict=True)]
    return _Planner(recording, reals, values, needed, batch_size if fuse else None).plan()


class _Planner:
    """Makes the plan of a recorded step.

    Args:
        recorded: the step, as the cell does it.
        recording: the same over real numbers.
        values: every value of the latter, on two samples of `ROWS` rows.
        requires_grad: inputs and fixed values of the former whose gradients are wanted.
        batch_size: B, if loops are fused with other work.
    """

    def __init__(
        self,
        recorded: Recording,
        recording: Recording,
        values: Sequence[Mapping[int, Tensor]],
        requires_grad: frozenset[int],
        batch_size: int | None,
    ) -> None:
        program, state = recording.program, recording.state
        self.recorded, self.recording, self.values, self.batch_size = recorded, recording, values, batch_size
        self.requires_grad = requires_grad
        self.fixed = program.made_of(recording.fixed)
        self.rows, self.coupled = find_rows(program, rows_in_front(program))
        self.stages = partition(program, state, recording.next_state, recording.inputs)
        in_loops = self.in_loops()
        if batch_size is not None:
            self.stages = fused(program, self.stages, state, self.coupled, self.fixed, batch_size)
        self.fused = frozenset(self.in_loops() - in_loops)
        self.read = read_outside(program, self.stages, state)
        self.copies = self.copies_of_outputs()
        self.rows |= {copy: self.rows[v] for v, copy in self.copies.items() if v in self.rows}

    def plan(self) -> StepPlan:
        """The plan."""
        program, state, next_state = self.recording.program, self.recording.state, self.recording.next_state
        wanted = {stage: self.wanted_of(stage) for stage in self.stages if isinstance(stage, Loop)}
        loops = {
            stage: cut_loop(program, stage, state, next_state, self.fixed, values, self.copies)
            for stage, values in wanted.items()
        }
        return StepPlan(
            recording=self.recorded,
            reals=self.recording,
            stages=tuple(self.stages),
            loops=loops,
            planned={loop: self.planned(loop, wanted[stage]) for stage, loop in loops.items()},
            places=tuple(places_of(program, self.stages)),
            rows=self.rows,
            coupled=self.coupled,
            read=self.read,
            copies=self.copies,
            fused=self.fused,
            requires_grad=self.requires_grad,
        )

    def in_loops(self) -> set[int]:
        """The operations that run in loops."""
        return {n for stage in self.stages if isinstance(stage, Loop) for n in stage.ops}

    def copies_of_outputs(self) -> dict[int, int]:
        """For each output that a loop makes the number of its copy, which is the caller's alone."""
        program = self.recording.program
        made = {v for n in self.in_loops() for v in program.ops[n].outputs if v >= 0}
        outputs = [v for v in dict.fromkeys(self.recording.outputs) if v in made]
        return {v: len(program.values) + number for number, v in enumerate(outputs)}

    def wanted_of(self, loop: Loop) -> set[int]:
        """What others than a loop read of its values: operations, other states, the caller."""
        recording = self.recording
        leaves = enumerate(zip(recording.state, recording.next_state, strict=True))
        found = {following for leaf, (state, following) in leaves if leaf not in loop.leaves or state in self.read}
        found.update(each.value for each in recording.asked)
        return found | recording.program.read_by_others(set(loop.ops)) | set(self.copies.values())

    def planned(self, loop: LoopProgram, wanted: set[int]) -> PlannedLoop:
        """A loop with its way back."""
        parts = inputs_in_parts(self.recorded, self.recording)
        wanted_of_step = {part for v in self.requires_grad for part in parts[v]}
        requires_grad = self.recording.program.with_gradient({*wanted_of_step, *self.recording.state})
        forward, widened, step = derive_backward(loop, wanted, requires_grad, self.values, ROWS)
        inputs = zip(widened.program.inputs, loop.program.inputs, strict=True)
        forward_rows, _ = find_rows(widened.program, {v: self.rows[known] for v, known in inputs if known in self.rows})
        # A gradient has its rows where what it is the gradient of has them.
        emitted = [widened.emitted[i] for i in step.emitted]
        states = [widened.next_states[i] for i in step.states]
        alike = zip(step.program.inputs, [*step.kept, *step.fixed, *emitted, *states], strict=True)
        rows, coupled = find_rows(step.program, {v: forward_rows[known] for v, known in alike if known in forward_rows})
        a, b, _ = loop.counts
        weight_grads = [v for v in step.program.outputs[a : a + b] if v >= 0]
        sums = summable(step.program, weight_grads, step.program.made_of(step.fixed))
        inference, shared = without_copies(forward)
        return PlannedLoop(
            inference=inference,
            shared=shared,
            loop=widened,
            backward=partition_backward(step, widened, coupled, sums, self.batch_size),
            emits=len(loop.emitted),
            rows=rows,
            coupled=coupled,
            sums=sums,
        )
