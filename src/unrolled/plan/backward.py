"""Backward: a loop's step back through time, recorded and coloured like a step.

The backward of a loop is a loop again: over the gradient of its state, from the last copy to the first. What it hands
to *before* leaves it as sequences of gradients, and what contracts gradients of weights runs after it, for all copies
at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unrolled.operations.decomposed import decomposition
from unrolled.plan.fuse import fused
from unrolled.plan.keep import made_again
from unrolled.plan.loops import LoopProgram, cut_loop
from unrolled.plan.partition import Loop, Stage, colour, read_outside, sunk
from unrolled.recording.functions import RawProgram
from unrolled.recording.interpret import compiled
from unrolled.recording.merge import merge
from unrolled.recording.program import Op, Program
from unrolled.recording.tape import Tape, tangent_like


@dataclass(frozen=True)
class StepBackward:
    """A loop's step backward as it was recorded.

    Attributes:
        program: inputs are the values of the forward that it reads (sequences, then fixed ones), the gradients of
            what the loop emitted, and those of its next states; outputs are the gradients of the loop's own inputs:
            sequences, fixed values, states.
        kept: the sequences it reads: values of the forward's program.
        fixed: the fixed values it reads.
        emitted: which of the loop's emitted values have a gradient, by their position.
        states: which of its states have one.
        again: its operations that are the forward's.
    """

    program: Program
    kept: tuple[int, ...]
    fixed: tuple[int, ...]
    emitted: tuple[int, ...]
    states: tuple[int, ...]
    again: frozenset[Op]

    @property
    def tangents(self) -> tuple[int, ...]:
        """The gradients that are given: of what the loop emitted, then of its next states."""
        return self.program.inputs[len(self.kept) + len(self.fixed) :]


@dataclass(frozen=True)
class Backward(StepBackward):
    """A step backward, coloured.

    Attributes:
        stages: where each operation runs; time goes from the last copy to the first.
        loops: for each `Loop` of the stages its program.
        read: gradients of states that are read outside of the loop that hands them on.
    """

    stages: tuple[Stage, ...]
    loops: tuple[LoopProgram | None, ...]
    read: frozenset[int]


def derive_backward(
    loop: LoopProgram,
    wanted: Collection[int],
    needing: Collection[int],
    samples: Sequence[Mapping[int, Tensor]],
    rows: tuple[int, int],
) -> tuple[LoopProgram, LoopProgram, StepBackward]:
    """Record a loop's step backward.

    Args:
        loop: the loop.
        wanted: the emitted values that may have a gradient of their own.
        needing: the inputs whose gradients are asked for, beside the states.
        samples: the values of the whole step on two samples of `rows` rows.
        rows: their batch sizes.

    Returns:
        The loop, its operations written as simpler ones; the same loop if it also emits what its backward reads; and
        the backward.
    """
    needing = {*needing, *loop.states}
    raw, marks = zip(
        *(_joint(loop, wanted, needing, sample, n) for sample, n in zip(samples, rows, strict=True)), strict=True
    )
    joint = merge(raw[0], raw[1], rows)
    return _split(loop, joint, marks[0])


@dataclass(frozen=True)
class _Marks:
    """What the inputs and outputs of a joint recording are."""

    emitted: tuple[int, ...]
    states: tuple[int, ...]


def _joint(
    loop: LoopProgram, wanted: Collection[int], needing: Collection[int], sample: Mapping[int, Tensor], rows: int
) -> tuple[RawProgram, _Marks]:
    """Forward and backward of one step on one tape: inputs and tangents to outputs and gradients."""
    tape = Tape(decomposition)
    given = [_leaf(sample[v], v in needing) for v in loop.program.inputs]
    numbers = [tape.add(tensor) for tensor in given]
    with torch.enable_grad(), tape:
        outputs = compiled(loop.program)(rows, *given)
    out_numbers = [tape.number(tensor) for tensor in outputs]
    asked_for = [v in wanted for v in loop.emitted] + [True] * len(loop.next_states)
    reached = [i for i, tensor in enumerate(outputs) if asked_for[i] and tensor is not None and tensor.requires_grad]
    tangents = [tangent_like(outputs[i]) for i in reached]
    tape.in_backward = True
    tangent_numbers = [tape.add(tensor) for tensor in tangents]
    asked = [i for i, tensor in enumerate(given) if tensor.requires_grad]
    found: list[int] = [-1] * len(given)
    if reached:
        with tape:
            grads = torch.autograd.grad(
                [outputs[i] for i in reached],
                [given[i] for i in asked],
                tangents,
                allow_unused=True,
            )
        for i, grad in zip(asked, grads, strict=True):
            found[i] = -1 if grad is None else tape.number(grad)
    many = len(loop.emitted)
    marks = _Marks(tuple(i for i in reached if i < many), tuple(i - many for i in reached if i >= many))
    return RawProgram(tape.tensors, numbers + tangent_numbers, tape.events, out_numbers + found), marks


def _leaf(tensor: Tensor, needed: bool) -> Tensor:
    return tensor.detach().clone().requires_grad_(needed and tensor.is_floating_point())


def _split(loop: LoopProgram, joint: Program, marks: _Marks) -> tuple[LoopProgram, LoopProgram, StepBackward]:
    count = len(loop.program.inputs)
    inputs, tangents = joint.inputs[:count], joint.inputs[count:]
    outputs, grads = joint.outputs[: len(loop.program.outputs)], joint.outputs[len(loop.program.outputs) :]
    forward = Program(joint.values, inputs, joint.ops, outputs).pruned()
    a, b, _ = loop.counts
    constants = _constants(forward, set(inputs[a : a + b]))
    emitted = outputs[: len(loop.emitted)]
    # What is made of fixed values only is made again, once, rather than kept of every step.
    early = {op for op in forward.ops if not constants.issuperset(op.inputs)}
    both = Program(joint.values, joint.inputs, joint.ops, grads).pruned().ops
    again = made_again(early, _read_by([op for op in both if op not in early], grads), {*inputs, *emitted, *constants})
    late = tuple(op for op in both if op not in early or op in again)
    read = [v for v in _read_by(late, grads) if v not in tangents]
    kept = tuple(v for v in read if v not in constants)
    fixed = tuple(v for v in read if v in constants)
    more = tuple(v for v in kept if v not in inputs and v not in emitted)
    following = outputs[len(loop.emitted) :]
    widened = LoopProgram(Program(joint.values, inputs, forward.ops, (*emitted, *more, *following)), loop.counts)
    program = Program(joint.values, (*kept, *fixed, *tangents), late, grads)
    backward = StepBackward(program, kept, fixed, marks.emitted, marks.states, frozenset(again))
    return LoopProgram(forward, loop.counts), widened, backward


def _read_by(ops: Sequence[Op], outputs: Sequence[int]) -> list[int]:
    """What operations and outputs read and no operation makes, each once."""
    made = {v for op in ops for v in op.outputs}
    read = dict.fromkeys([*(v for op in ops for v in op.inputs), *outputs])
    return [v for v in read if v >= 0 and v not in made]


def _constants(forward: Program, fixed: set[int]) -> set[int]:
    """Values of the forward that are made of fixed ones only."""
    found = set(fixed)
    for op in forward.ops:
        if found.issuperset(op.inputs):
            found.update(op.outputs)
    return found


def colour_backward(
    step: StepBackward,
    loop: LoopProgram,
    coupled: Collection[int],
    sums: Collection[int],
    batch_size: int | None,
) -> Backward:
    """Colour a step backward.

    Args:
        step: what was recorded.
        loop: the loop that it belongs to.
        coupled: its operations that do not act row by row.
        sums: its values of which only the sum over all steps is asked for.
        batch_size: B, if its loops are to be fused with the work beside them.
    """
    program = step.program
    a, b, _ = loop.counts
    of_states = step.tangents[len(step.emitted) :]
    state_grads = [program.outputs[a + b + position] for position in step.states]
    changing = (*step.kept, *step.tangents[: len(step.emitted)])
    light = {n for n, op in enumerate(program.ops) if op in step.again}
    stages = sunk(program, colour(program, of_states, state_grads, changing), light)
    same = _constants(program, set(step.fixed))
    if batch_size is not None:
        stages = fused(program, stages, of_states, coupled, same, batch_size, sums)
    asked = {v for v in program.outputs if v >= 0}
    loops = tuple(
        cut_loop(program, stage, of_states, state_grads, same, _read_elsewhere(program, stage) | asked)
        if isinstance(stage, Loop)
        else None
        for stage in stages
    )
    read = read_outside(program, stages, of_states)
    recorded = (program, step.kept, step.fixed, step.emitted, step.states, step.again)
    return Backward(*recorded, tuple(stages), loops, read)


def _read_elsewhere(program: Program, loop: Loop) -> set[int]:
    inside = {*loop.ops, *loop.totals}
    return {v for n, op in enumerate(program.ops) if n not in inside for v in op.inputs}
