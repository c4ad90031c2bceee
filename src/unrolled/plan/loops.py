"""Loops: the through part of a step cut out as a program of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch

from unrolled.plan.partition import Loop
from unrolled.recording.program import Op, Program, Ref, live_in


@dataclass(frozen=True)
class LoopProgram:
    """One step of a loop.

    The program's inputs are sequences (one entry a step), fixed values and states, in this order; its outputs are
    what it emits at every step, and the next states.

    Attributes:
        program: the step.
        counts: how many sequences, fixed values and states.
        totals: sums over all rows and steps, of which it keeps a running total: what is summed, and the sum.
    """

    program: Program
    counts: tuple[int, int, int]
    totals: tuple[tuple[int, int], ...] = ()

    @property
    def sequences(self) -> tuple[int, ...]:
        """Values that are others at every step."""
        return self.program.inputs[: self.counts[0]]

    @property
    def fixed(self) -> tuple[int, ...]:
        """Values that are the same at every step."""
        return self.program.inputs[self.counts[0] : self.counts[0] + self.counts[1]]

    @property
    def states(self) -> tuple[int, ...]:
        """Values that are passed on from step to step."""
        return self.program.inputs[self.counts[0] + self.counts[1] :]

    @cached_property
    def emitted(self) -> tuple[int, ...]:
        """Values that are kept of every step."""
        return self.program.outputs[: len(self.program.outputs) - self.counts[2] - len(self.totals)]

    @property
    def next_states(self) -> tuple[int, ...]:
        """Values that replace the states."""
        return self.program.outputs[len(self.program.outputs) - self.counts[2] :]

    def split(self, outputs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """The program's outputs as what is emitted, what is added up, and the next states."""
        emitted, states = len(self.emitted), len(outputs) - self.counts[2]
        return outputs[:emitted], outputs[emitted:states], outputs[states:]

    def passed_on(self, emitted: Sequence[Any]) -> list[Any]:
        """For each state what every step passed on, which is among what it emitted."""
        return [emitted[self.emitted.index(value)] for value in self.next_states]


def cut_loop(
    program: Program,
    loop: Loop,
    state: Sequence[int],
    next_state: Sequence[int],
    fixed: set[int],
    wanted: set[int],
    copies: Mapping[int, int] = MappingProxyType({}),
) -> LoopProgram:
    """Cut a loop out of a step.

    Args:
        program: the step.
        loop: which operations and which leaves of the state.
        state: the values of all leaves.
        next_state: the values that replace them.
        fixed: values that are the same at every step.
        wanted: values that are read outside of the loop's own recurrence.
        copies: values that are emitted a second time, for the caller to write into; the numbers of the copies.
    """
    ops = tuple(program.ops[n] for n in loop.ops)
    totals = tuple((program.ops[n].inputs[0], program.ops[n].outputs[0]) for n in loop.totals)
    own = tuple(state[leaf] for leaf in loop.leaves)
    following = tuple(next_state[leaf] for leaf in loop.leaves)
    read = [v for v in live_in(ops, following) if v not in own]
    sequences = tuple(v for v in read if v not in fixed)
    constants = tuple(v for v in read if v in fixed)
    made = {v for op in ops for v in op.outputs if v >= 0}
    emitted = tuple(v for v in dict.fromkeys((*following, *sorted(made))) if v in wanted or v in following)
    again = {v: copy for v, copy in copies.items() if v in made}
    ops += tuple(Op(torch.ops.aten.clone.default, (Ref(v),), (), (copy,)) for v, copy in again.items())
    values = (*program.values, *(program.values[v] for v in copies))
    outputs = (*emitted, *again.values(), *(v for v, _ in totals), *following)
    step = Program(values, (*sequences, *constants, *own), ops, outputs)
    return LoopProgram(step, (len(sequences), len(constants), len(own)), totals)


def without_copies(loop: LoopProgram) -> tuple[LoopProgram, tuple[int, ...]]:
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
