"""Backward: a loop's step back through time, recorded and partitioned like a step.

The backward of a loop is a loop again: over the gradient of its state, from the last copy to the first. What goes
to *before* leaves it as sequences of gradients, and what contracts gradients of weights runs after it, for all copies
at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unrolled.autograd_graph import differentiable, with_gradients
from unrolled.operations.decomposed import decomposition
from unrolled.operations.operation import Cost, operation_of
from unrolled.plan.fuse import fused
from unrolled.plan.loops import LoopProgram, cut_loop
from unrolled.plan.partition import Loop, Stage, partition, read_outside, sink_light
from unrolled.recording.events import RawProgram
from unrolled.recording.interpret import compiled
from unrolled.recording.merge import merge
from unrolled.recording.program import Op, Program, live_in
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
        """The gradients that it starts from: of what the loop emitted, then of its next states."""
        return self.program.inputs[len(self.kept) + len(self.fixed) :]


@dataclass(frozen=True)
class Backward(StepBackward):
    """A step backward, partitioned.

    Attributes:
        stages: where each operation runs; time goes from the last copy to the first.
        loops: the program of each loop among them.
        read: gradients of states that are read outside of the loop that passes them on.
    """

    stages: tuple[Stage, ...]
    loops: Mapping[Loop, LoopProgram]
    read: frozenset[int]


def derive_backward(
    loop: LoopProgram,
    wanted: Collection[int],
    requires_grad: Collection[int],
    samples: Sequence[Mapping[int, Tensor]],
    rows: tuple[int, int],
) -> tuple[LoopProgram, LoopProgram, StepBackward]:
    """Record a loop's step backward.

    Args:
        loop: the loop.
        wanted: the emitted values that may have a gradient of their own.
        requires_grad: the inputs whose gradients are wanted, besides the states.
        samples: the values of the whole step on two samples of `rows` rows.
        rows: their batch sizes.

    Returns:
        The loop, its operations written as simpler ones; the same loop if it also emits what its backward reads; and
        the backward.
    """
    requires_grad = {*requires_grad, *loop.states}
    (first, with_gradient), (second, _) = [
        _joint(loop, wanted, requires_grad, sample, n) for sample, n in zip(samples, rows, strict=True)
    ]
    return _forward_and_backward(loop, merge(first, second, rows), with_gradient)


def _joint(
    loop: LoopProgram, wanted: Collection[int], requires_grad: Collection[int], sample: Mapping[int, Tensor], rows: int
) -> tuple[RawProgram, list[int]]:
    """Forward and backward of one step on one tape, from inputs and tangents to outputs and gradients.

    Also which of the outputs have a gradient, by their positions.
    """
    tape = Tape(decomposition)
    inputs = [sample[v].detach().clone() for v in loop.program.inputs]
    for v, tensor in zip(loop.program.inputs, inputs, strict=True):
        tensor.requires_grad_(v in requires_grad and differentiable(tensor))
    numbers = [tape.add(tensor) for tensor in inputs]
    with torch.enable_grad(), tape:
        outputs = compiled(loop.program)(rows, *inputs)
    out_numbers = [tape.number(tensor) for tensor in outputs]
    asked_for = [v in wanted for v in loop.emitted] + [True] * len(loop.next_states)
    with_gradient = [i for i, x in enumerate(outputs) if asked_for[i] and x is not None and x.requires_grad]
    tangents = [tangent_like(outputs[i]) for i in with_gradient]
    tape.memory.in_backward = True
    tangent_numbers = [tape.add(tensor) for tensor in tangents]
    by = [i for i, tensor in enumerate(inputs) if tensor.requires_grad]
    grad_numbers = [-1] * len(inputs)
    if with_gradient:
        end = with_gradients([outputs[i] for i in with_gradient], tangents)
        with tape:
            grads = torch.autograd.grad(end, [inputs[i] for i in by], allow_unused=True)
        for i, grad in zip(by, grads, strict=True):
            grad_numbers[i] = -1 if grad is None else tape.number(grad)
    raw = RawProgram(tape.tensors, numbers + tangent_numbers, tape.events, out_numbers + grad_numbers)
    return raw, with_gradient


def _forward_and_backward(
    loop: LoopProgram, joint: Program, with_gradient: Sequence[int]
) -> tuple[LoopProgram, LoopProgram, StepBackward]:
    """The forward, the forward that also emits what the backward reads, and the backward, of a joint recording."""
    count, many = len(loop.program.inputs), len(loop.emitted)
    inputs, tangents = joint.inputs[:count], joint.inputs[count:]
    outputs, grads = joint.outputs[: len(loop.program.outputs)], joint.outputs[len(loop.program.outputs) :]
    emitted, following = outputs[:many], outputs[many:]
    forward = Program(joint.values, inputs, joint.ops, outputs).pruned()
    a, b, _ = loop.counts
    constants = forward.made_of(inputs[a : a + b])
    # What is made of fixed values only is made again, once, rather than kept of every step.
    early = {op for op in forward.ops if not constants.issuperset(op.inputs)}
    both = Program(joint.values, joint.inputs, joint.ops, grads).pruned().ops
    again = _made_again(early, live_in([op for op in both if op not in early], grads), {*inputs, *emitted, *constants})
    late = tuple(op for op in both if op not in early or op in again)
    read = [v for v in live_in(late, grads) if v not in tangents]
    kept = tuple(v for v in read if v not in constants)
    fixed = tuple(v for v in read if v in constants)
    more = tuple(v for v in kept if v not in inputs and v not in emitted)
    widened = Program(joint.values, inputs, forward.ops, (*emitted, *more, *following))
    step = StepBackward(
        program=Program(joint.values, (*kept, *fixed, *tangents), late, grads),
        kept=kept,
        fixed=fixed,
        emitted=tuple(i for i in with_gradient if i < many),
        states=tuple(i - many for i in with_gradient if i >= many),
        again=again,
    )
    return LoopProgram(forward, loop.counts), LoopProgram(widened, loop.counts), step


def _made_again(ops: Collection[Op], read: Sequence[int], there: Collection[int]) -> frozenset[Op]:
    """The forward operations that the backward runs again, rather than keep their results of every step.

    Memory is what a long horizon costs, and what a step's time goes into once the arithmetic is fast.

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
    at_hand = {*there, *kept}
    for value in sorted(kept, reverse=True):
        op = maker[value]
        light = operation_of(op).cost <= Cost.LIGHT and len(op.outputs) == 1
        if light and value not in operands and at_hand.issuperset(op.inputs):
            found.append(op)
            operands.update(op.inputs)
            at_hand.remove(value)
    return frozenset(found)


def partition_backward(
    step: StepBackward,
    loop: LoopProgram,
    coupled: Collection[int],
    sums: Collection[int],
    batch_size: int | None,
) -> Backward:
    """Partition a step backward.

    Args:
        step: what was recorded.
        loop: the loop that it belongs to.
        coupled: its operations that do not act row by row.
        sums: its values of which only the sum over all steps is used.
        batch_size: B, if its loops are to be fused with other work.
    """
    program = step.program
    a, b, _ = loop.counts
    of_states = step.tangents[len(step.emitted) :]
    state_grads = [program.outputs[a + b + position] for position in step.states]
    changing = (*step.kept, *step.tangents[: len(step.emitted)])
    light = {n for n, op in enumerate(program.ops) if op in step.again}
    stages = sink_light(program, partition(program, of_states, state_grads, changing), light)
    fixed = program.made_of(step.fixed)
    if batch_size is not None:
        stages = fused(program, stages, of_states, coupled, fixed, batch_size, sums)
    returned = {v for v in program.outputs if v >= 0}
    loops = {}
    for stage in stages:
        if isinstance(stage, Loop):
            wanted = returned | program.read_by_others({*stage.ops, *stage.totals})
            loops[stage] = cut_loop(program, stage, of_states, state_grads, fixed, wanted)
    read = read_outside(program, stages, of_states)
    return Backward(**vars(step), stages=tuple(stages), loops=loops, read=read)
