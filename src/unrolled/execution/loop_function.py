"""A loop under autograd, with a step backward of its own that runs as a loop too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unrolled.autograd_graph import vjp
from unrolled.execution.batched import BatchedOps
from unrolled.execution.protocol import LoopInputs, LoopResult, LoopRunner
from unrolled.execution.series import Entry, TimeSeries
from unrolled.execution.stages import SegmentStages
from unrolled.execution.stepping import iterate_loop
from unrolled.internals import has_memory
from unrolled.lengths import Extent
from unrolled.plan.loops import LoopProgram
from unrolled.plan.plan import PlannedLoop


class LoopUnderAutograd(NamedTuple):
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

    def __call__(self, loop: LoopProgram, inputs: LoopInputs) -> LoopResult:
        """Run a loop; see `LoopRunner`."""
        planned = self.planned[loop]
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs.tensors)):
            result = self.runner(planned.inference, inputs)
            return LoopResult([result.emitted[place] for place in planned.shared], result.last, result.received)
        call = _LoopCall(planned, self.runner, inputs.extent, inputs.reverse)
        results = _LoopFunction.apply(call, *inputs.tensors)
        emitted, last = results[: len(loop.emitted)], results[len(loop.emitted) :]
        passed_on = [emitted[loop.emitted.index(value)] for value in loop.next_states]
        return LoopResult(emitted, last, lambda state: inputs.received(state, passed_on[state]))


class _LoopCall(NamedTuple):
    """A call of a loop, but for its tensors."""

    planned: PlannedLoop
    runner: LoopRunner
    extent: Extent
    reverse: bool

    def inputs(self, tensors: Sequence[Tensor]) -> LoopInputs:
        """The loop's inputs, from their tensors in order."""
        a, b, _ = self.planned.loop.counts
        return LoopInputs(tensors[:a], tensors[a : a + b], tensors[a + b :], self.extent, self.reverse)

    def backward(
        self, values: dict[int, Tensor], grads: Sequence[Tensor | None], *, of_states: bool
    ) -> list[Tensor | None]:
        """The gradients of the loop's inputs, from the values it kept and the gradients of its results.

        Args:
            values: the values it kept.
            grads: the gradients of what it emitted for others, and of its last states; None for none.
            of_states: whether those of its first states are read.
        """
        planned, back, extent = self.planned, self.planned.backward, self.extent
        batched = BatchedOps(
            back.program, planned.rows, planned.coupled, extent, planned.written, planned.sums, self.runner.affine
        )
        a, b, _ = planned.loop.counts
        start = len(back.kept) + len(back.fixed)
        stages = SegmentStages(
            stages=back.stages,
            loops=back.loops,
            state=back.program.inputs[start + len(back.emitted) :],
            next_state=[back.program.outputs[a + b + leaf] for leaf in back.states],
            batched=batched,
            runner=self.runner,
            read=back.read,
            reverse=not self.reverse,
            last_owned=of_states,
        )
        env: dict[int, Entry] = {v: batched.series(v, values[v]) for v in back.kept}
        env |= {v: values[v] for v in back.fixed}
        device = next(grad.device for grad in grads if grad is not None)
        for v, position in zip(back.program.inputs[start:], back.emitted, strict=False):
            grad = grads[position]
            env[v] = self._zeros(planned.loop.emitted[position], device) if grad is None else batched.series(v, grad)
        last: list[Tensor] = []
        for leaf in back.states:
            grad = grads[planned.emits + leaf]
            following = planned.loop.next_states[leaf]
            last.append(planned.zeros(following, extent.batch, device) if grad is None else grad)
        first = stages.run(env, last)
        return self._collected(env, batched, dict(zip(back.states, first, strict=True)))

    def _zeros(self, value: int, device: torch.device) -> TimeSeries:
        """Zeros at every step in the shape of a value, without memory for them."""
        rows = self.planned.loop.program.values[value].rows
        if self.extent.ragged and rows is not None:
            return TimeSeries(self.planned.zeros(value, self.extent.rows, device), self.extent, rows)
        return TimeSeries.constant(self.planned.zeros(value, self.extent.batch, device), self.extent, None)

    def _collected(
        self, env: dict[int, Entry], batched: BatchedOps, of_states: dict[int, Tensor]
    ) -> list[Tensor | None]:
        """The gradients of the loop's inputs, in order, from the values of its step backward."""
        a, b, _ = self.planned.loop.counts
        found: list[Tensor | None] = []
        for position, value in enumerate(self.planned.backward.program.outputs):
            if position - a - b in of_states:
                found.append(of_states[position - a - b])
            elif value < 0:
                found.append(None)
            elif position >= a + b:  # no gradient of what replaces it: of this state the first copy's own is all
                found.append(self.extent.last_of(batched.over_time(env[value], 0), reverse=not self.reverse))
            elif position < a:
                found.append(batched.over_time(env[value], batched.rows.get(value)))
            else:
                found.append(batched.total(value, env[value]))
        return found

    def backward_by_autograd(self, tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The same by ordinary autograd, for second derivatives or many gradients at once: the loop runs again."""
        with torch.enable_grad():
            # Views of the inputs: the graph of the first forward stays as it is, yet the result still leads to them.
            inputs = [tensor.view_as(tensor) for tensor in tensors]
            outputs = self._by_autograd(self.inputs(inputs))
        return vjp(outputs, grads, inputs, create_graph=torch.is_grad_enabled())

    def _by_autograd(self, inputs: LoopInputs) -> list[Tensor]:
        """A loop's results, step by step under ordinary autograd."""
        loop, extent = self.planned.loop, self.extent
        found = dict(iterate_loop(loop, inputs))
        columns = list(zip(*(found[t] for t in range(extent.steps)), strict=True))
        values = [loop.program.values[v] for v in loop.emitted[: self.planned.emits]]
        emitted = [TimeSeries.joined(column, extent, x.rows).tensor for column, x in zip(columns, values, strict=False)]
        states = columns[len(loop.emitted) + len(loop.totals) :]
        if extent.ragged:
            every = [TimeSeries.joined(column, extent, 0).tensor for column in states]
            return [*emitted, *(extent.last_of(entries, reverse=self.reverse) for entries in every)]
        return [*emitted, *(column[0 if self.reverse else -1] for column in states)]


class _LoopFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _LoopCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        planned, loop = call.planned, call.planned.loop
        result = call.runner(loop, call.inputs(tensors))
        emitted = [x if keep else None for keep, x in zip(planned.keeps_emitted, result.emitted, strict=True)]
        received = [result.received(n) if keep else None for n, keep in enumerate(planned.keeps_states)]
        ctx.save_for_backward(*tensors, *emitted, *received)
        shown = (*result.emitted[: planned.emits], *result.last)
        ctx.mark_non_differentiable(
            *[x for n, x in enumerate(shown) if n in planned.unread or not x.is_floating_point()]
        )
        return shown

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _LoopCall = ctx.call
        loop = call.planned.loop
        saved = ctx.saved_tensors
        tensors = saved[: len(loop.program.inputs)]
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(tensors))
        if torch.is_grad_enabled() or not all(grad is None or has_memory(grad) for grad in grads):
            return (None, *call.backward_by_autograd(tensors, grads))
        values = dict(zip((*loop.program.inputs, *loop.emitted), saved, strict=False))
        values |= dict(zip(loop.states, saved[len(saved) - len(loop.states) :], strict=True))
        of_states = any(ctx.needs_input_grad[len(tensors) + 1 - len(loop.states) :])
        return (None, *call.backward(values, grads, of_states=of_states))
