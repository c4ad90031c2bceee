"""Loops: the through part of a step cut out as a program of its own, and its step backward.

The backward of a loop is a loop again: over the gradient of its state, from the last copy to the first. It is
recorded like a cell, and coloured like one: what it hands to *before* leaves it as sequences of gradients, and what
contracts gradients of weights runs after it, for all copies at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from unrolled.plan.colour import Loop, Stage, colour, read_outside, sunk
from unrolled.plan.functions import RawProgram
from unrolled.plan.interpret import compiled, run_op
from unrolled.plan.keep import made_again
from unrolled.plan.merge import merge
from unrolled.plan.program import Op, Program, Ref
from unrolled.plan.tape import Tape, tangent_like

__all__ = ["Backward", "LoopProgram", "cut_loop", "derive_backward", "once_each"]


@dataclass(frozen=True)
class LoopProgram:
    """One step of a loop.

    The program's inputs are sequences (one entry a step), fixed values and states, in this order; its outputs are
    what it emits at every step, and the next states.

    Attributes:
        program: the step.
        counts: how many sequences, fixed values and states.
    """

    program: Program
    counts: tuple[int, int, int]

    @property
    def sequences(self) -> tuple[int, ...]:
        """Values that are given anew at every step."""
        return self.program.inputs[: self.counts[0]]

    @property
    def fixed(self) -> tuple[int, ...]:
        """Values that are the same at every step."""
        return self.program.inputs[self.counts[0] : self.counts[0] + self.counts[1]]

    @property
    def states(self) -> tuple[int, ...]:
        """Values that are handed on."""
        return self.program.inputs[self.counts[0] + self.counts[1] :]

    @property
    def emitted(self) -> tuple[int, ...]:
        """Values that are kept of every step."""
        return self.program.outputs[: len(self.program.outputs) - self.counts[2]]

    @property
    def next_states(self) -> tuple[int, ...]:
        """Values that replace the states."""
        return self.program.outputs[len(self.program.outputs) - self.counts[2] :]


@dataclass(frozen=True)
class Backward:
    """A loop's step backward, coloured.

    Attributes:
        program: inputs are the values of the forward that it reads (sequences, then fixed ones), the gradients of
            what the loop emitted, and those of its next states; outputs are the gradients of the loop's own inputs:
            sequences, fixed values, states.
        kept: the sequences it reads: values of the forward's program.
        fixed: the fixed values it reads.
        emitted: which of the loop's emitted values have a gradient, by their position.
        states: which of its states have one.
        stages: where each operation runs; time goes from the last copy to the first.
        loops: for each `Loop` of the stages its program.
        read: gradients of states that are read outside of the loop that hands them on.
    """

    program: Program
    kept: tuple[int, ...]
    fixed: tuple[int, ...]
    emitted: tuple[int, ...]
    states: tuple[int, ...]
    stages: tuple[Stage, ...]
    loops: tuple[LoopProgram | None, ...]
    read: frozenset[int]


def cut_loop(
    program: Program,
    loop: Loop,
    state: Sequence[int],
    next_state: Sequence[int],
    fixed: set[int],
    wanted: set[int],
    handed: Mapping[int, int] = MappingProxyType({}),
) -> LoopProgram:
    """Cut a loop out of a step.

    Args:
        program: the step.
        loop: which operations and which leaves of the state.
        state: the values of all leaves.
        next_state: the values that replace them.
        fixed: values that are the same at every step.
        wanted: values that are asked for outside of the loop's own recurrence.
        handed: values that are emitted a second time, for the caller to write into; the numbers of the copies.
    """
    ops = tuple(program.ops[n] for n in loop.ops)
    made = {v for op in ops for v in op.outputs if v >= 0}
    own = tuple(state[leaf] for leaf in loop.leaves)
    following = tuple(next_state[leaf] for leaf in loop.leaves)
    read = dict.fromkeys([v for op in ops for v in op.inputs] + list(following))
    given = [v for v in read if v not in made and v not in own]
    sequences = tuple(v for v in given if v not in fixed)
    constants = tuple(v for v in given if v in fixed)
    emitted = tuple(v for v in dict.fromkeys((*following, *sorted(made))) if v in wanted or v in following)
    again = [(v, copy) for v, copy in handed.items() if v in made]
    ops += tuple(Op(torch.ops.aten.clone.default, (Ref(v),), (), (copy,)) for v, copy in again)
    values = (*program.values, *(program.values[v] for v in handed))
    copies = tuple(copy for _, copy in again)
    step = Program(values, (*sequences, *constants, *own), ops, (*emitted, *copies, *following))
    return LoopProgram(step, (len(sequences), len(constants), len(own)))


def once_each(loop: LoopProgram) -> tuple[LoopProgram, tuple[int, ...]]:
    """The loop without the copies for the caller; for each emitted value which one it is now."""
    original: dict[int, int] = {}
    for op in loop.program.ops:
        if op.name == "aten.clone":
            original[op.outputs[0]] = original.get(op.inputs[0], op.inputs[0])
    values = [original.get(v, v) for v in loop.emitted]
    emitted = tuple(dict.fromkeys(values))
    following = [original.get(v, v) for v in loop.next_states]
    step = Program(loop.program.values, loop.program.inputs, loop.program.ops, (*emitted, *following)).pruned()
    return LoopProgram(step, loop.counts), tuple(emitted.index(v) for v in values)


def derive_backward(
    loop: LoopProgram, wanted: Collection[int], samples: Sequence[Mapping[int, Tensor]], rows: tuple[int, int]
) -> tuple[LoopProgram, LoopProgram, Backward]:
    """Record a loop's step backward.

    Args:
        loop: the loop.
        wanted: the emitted values that may have a gradient of their own.
        samples: the values of the whole step on two samples of `rows` rows.
        rows: their batch sizes.

    Returns:
        The loop, its operations written as simpler ones; the same loop if it also emits what its backward reads; and
        the backward.
    """
    raw, marks = zip(*(_joint(loop, wanted, sample, n) for sample, n in zip(samples, rows, strict=True)), strict=True)
    joint = merge(raw[0], raw[1], rows)
    return _split(loop, joint, marks[0])


@dataclass(frozen=True)
class _Marks:
    """What the inputs and outputs of a joint recording are."""

    emitted: tuple[int, ...]
    states: tuple[int, ...]


def _joint(
    loop: LoopProgram, wanted: Collection[int], sample: Mapping[int, Tensor], rows: int
) -> tuple[RawProgram, _Marks]:
    """Forward and backward of one step on one tape: inputs and tangents to outputs and gradients."""
    tape = Tape(decompose=True)
    given = [_leaf(sample[v]) for v in loop.program.inputs]
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


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


def _split(loop: LoopProgram, joint: Program, marks: _Marks) -> tuple[LoopProgram, LoopProgram, Backward]:
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
    split = len(marks.emitted)
    return (
        LoopProgram(forward, loop.counts),
        widened,
        _coloured(program, kept, fixed, tangents[:split], tangents[split:], loop, marks, again),
    )


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


def _coloured(
    program: Program,
    kept: tuple[int, ...],
    fixed: tuple[int, ...],
    of_emitted: tuple[int, ...],
    of_states: tuple[int, ...],
    loop: LoopProgram,
    marks: _Marks,
    again: Collection[Op],
) -> Backward:
    a, b, _ = loop.counts
    state_grads = [program.outputs[a + b + position] for position in marks.states]
    light = {n for n, op in enumerate(program.ops) if op in again}
    stages = tuple(sunk(program, colour(program, of_states, state_grads, (*kept, *of_emitted)), light))
    asked = {v for v in program.outputs if v >= 0}
    same = _constants(program, set(fixed))
    loops = tuple(
        cut_loop(program, stage, of_states, state_grads, same, _read_elsewhere(program, stage, of_states) | asked)
        if isinstance(stage, Loop)
        else None
        for stage in stages
    )
    read = read_outside(program, stages, of_states)
    return Backward(program, kept, fixed, marks.emitted, marks.states, stages, loops, read)


def _read_elsewhere(program: Program, loop: Loop, states: Sequence[int]) -> set[int]:
    inside = set(loop.ops)
    return {v for n, op in enumerate(program.ops) if n not in inside for v in op.inputs}


def sample_values(program: Program, given: Sequence[Tensor], rows: int) -> dict[int, Tensor]:
    """Every value of a step on one sample."""
    values = dict(zip(program.inputs, given, strict=True))
    with torch.no_grad():
        for op in program.ops:
            results = run_op(op, values, rows)
            values |= {v: r for v, r in zip(op.outputs, results, strict=False) if v >= 0 and r is not None}
    return values
