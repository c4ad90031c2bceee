"""The one autograd Function of ours: a loop, with its own step backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled.bptt.batched import Batched, Entry
from unrolled.bptt.segment import Stages, over_time
from unrolled.bptt.timed import Timed
from unrolled.bptt.walk import LoopRunner, Walk, shifted
from unrolled.plan.interpret import compiled
from unrolled.plan.loops import LoopProgram
from unrolled.plan.plan import PlannedLoop

__all__ = ["LoopUnderAutograd"]


@dataclass(frozen=True)
class LoopUnderAutograd:
    """A runner of loops that autograd can go back through.

    Attributes:
        planned: for each loop its widened program and its backward.
        runner: what runs loops, forward and backward.
    """

    planned: dict[LoopProgram, PlannedLoop]
    runner: LoopRunner

    def affine(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor | None:
        """A product, as the runner does it."""
        return self.runner.affine(x, y, bias)

    def __call__(
        self,
        loop: LoopProgram,
        sequences: Sequence[Tensor],
        fixed: Sequence[Tensor],
        states: Sequence[Tensor],
        *,
        steps: int,
        batch: int,
        reverse: bool,
    ) -> Walk:
        """Run a loop; see `LoopRunner`."""
        given = (*sequences, *fixed, *states)
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)):
            planned = self.planned[loop]
            walk = self.runner(planned.inference, sequences, fixed, states, steps=steps, batch=batch, reverse=reverse)
            return Walk([walk.emitted[place] for place in planned.shared], walk.last, walk.received)
        call = _Call(self.planned[loop], self.runner, steps, batch)
        results = _LoopFunction.apply(call, *given)
        emitted = results[: len(loop.emitted)]
        places = [loop.emitted.index(value) for value in loop.next_states]
        return Walk(
            emitted,
            results[len(loop.emitted) :],
            lambda state: shifted(states[state], emitted[places[state]], reverse=False),
        )


@dataclass(frozen=True)
class _Call:
    planned: PlannedLoop
    runner: LoopRunner
    steps: int
    batch: int

    def forward(self, given: Sequence[Tensor]) -> Walk:
        loop = self.planned.loop
        a, b, _ = loop.counts
        return self.runner(
            loop, given[:a], given[a : a + b], given[a + b :], steps=self.steps, batch=self.batch, reverse=False
        )

    def backward(self, values: dict[int, Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of the loop's inputs, from the values it kept and the gradients of its results."""
        planned, back = self.planned, self.planned.backward
        emitted, last = grads[: planned.emits], grads[planned.emits :]
        batched = Batched(
            back.program, planned.rows, planned.coupled, self.steps, self.batch, planned.sums, self.runner.affine
        )
        a, b, _ = planned.loop.counts
        state_grads = [back.program.outputs[a + b + leaf] for leaf in back.states]
        stages = Stages(
            back.stages, back.loops, self._state_tangents(), state_grads, batched, self.runner, back.read, reverse=True
        )
        env: dict[int, Entry] = {v: Timed(values[v], self.steps) for v in back.kept}
        env |= {v: values[v] for v in back.fixed}
        for v, position in zip(self._emitted_tangents(), back.emitted, strict=True):
            env[v] = Timed(self._or_zeros(emitted[position], planned.loop.emitted[position]), self.steps)
        first = stages.run(env, [self._last(last[leaf], leaf) for leaf in back.states])
        return self._collected(env, batched, dict(zip(back.states, first, strict=True)))

    def _emitted_tangents(self) -> tuple[int, ...]:
        back = self.planned.backward
        start = len(back.kept) + len(back.fixed)
        return back.program.inputs[start : start + len(back.emitted)]

    def _state_tangents(self) -> tuple[int, ...]:
        back = self.planned.backward
        return back.program.inputs[len(back.kept) + len(back.fixed) + len(back.emitted) :]

    def _or_zeros(self, grad: Tensor | None, value: int) -> Tensor:
        return self.planned.zeros(value, self.batch, self.steps) if grad is None else grad

    def _last(self, grad: Tensor | None, leaf: int) -> Tensor:
        return self.planned.zeros(self.planned.loop.next_states[leaf], self.batch) if grad is None else grad

    def _collected(self, env: dict[int, Entry], batched: Batched, of_states: dict[int, Tensor]) -> list[Tensor | None]:
        back = self.planned.backward
        a, b, _ = self.planned.loop.counts
        found: list[Tensor | None] = []
        for position, value in enumerate(back.program.outputs):
            if position - a - b in of_states:
                found.append(of_states[position - a - b])
            elif value < 0:
                found.append(None)
            elif position >= a + b:  # no gradient of what replaces it: of this state the first copy's own is all
                found.append(over_time(env[value], self.steps)[0])
            elif position < a:
                found.append(over_time(env[value], self.steps))
            else:
                found.append(batched.total(env[value]))
        return found


class _LoopFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        walk = call.forward(given)
        planned, kept = call.planned, set(call.planned.backward.kept)
        emitted = [tensor if v in kept else None for v, tensor in zip(planned.loop.emitted, walk.emitted, strict=True)]
        received = [walk.received(n) if v in kept else None for n, v in enumerate(planned.loop.states)]
        ctx.save_for_backward(*given, *emitted, *received)
        shown = (*walk.emitted[: planned.emits], *walk.last)
        unread = {*range(planned.emits)}.difference(planned.backward.emitted)
        ctx.mark_non_differentiable(
            *(tensor for n, tensor in enumerate(shown) if n in unread or not tensor.is_floating_point())
        )
        return shown

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        loop = call.planned.loop
        saved = ctx.saved_tensors
        given = saved[: len(loop.program.inputs)]
        if torch.is_grad_enabled():
            return (None, *_differentiable_backward(call, given, grads))
        values = dict(zip((*loop.program.inputs, *loop.emitted), saved, strict=False))
        values |= dict(zip(loop.states, saved[len(saved) - len(loop.states) :], strict=True))
        return (None, *call.backward(values, grads))


def _differentiable_backward(
    call: _Call, given: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients as a graph of their own, for a second derivative: the loop again, by ordinary autograd."""
    loop = call.planned.loop
    a, b, _ = loop.counts
    # Views of the inputs: the graph of the first forward stays as it is, yet the result still leads to the inputs.
    inputs = [tensor.view_as(tensor) for tensor in given]
    step, states = compiled(loop.program), inputs[a + b :]
    columns = [tensor.unbind(0) for tensor in inputs[:a]]
    kept = []
    for t in range(call.steps):
        results = step(call.batch, *(column[t] for column in columns), *inputs[a : a + b], *states)
        kept.append(results[: call.planned.emits])
        states = list(results[len(loop.emitted) :])
    outputs = [*(torch.stack(column) for column in zip(*kept, strict=True)), *states]
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    asked = [i for i, tensor in enumerate(inputs) if tensor.requires_grad]
    found: list[Tensor | None] = [None] * len(inputs)
    if pairs and asked:
        results = torch.autograd.grad(
            [o for o, _ in pairs],
            [inputs[i] for i in asked],
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
        for i, grad in zip(asked, results, strict=True):
            found[i] = grad
    return found
