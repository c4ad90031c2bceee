"""The one autograd Function of ours: a loop, with its own step backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled.execution.batched import Batched, Entry
from unrolled.execution.protocol import LoopInputs, LoopResult, LoopRunner
from unrolled.execution.stages import Stages, over_time
from unrolled.execution.stepping import stepped
from unrolled.execution.timed import Timed
from unrolled.internals import has_memory
from unrolled.lengths import Extent
from unrolled.plan.loops import LoopProgram
from unrolled.plan.plan import PlannedLoop


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

    def __call__(self, loop: LoopProgram, request: LoopInputs) -> LoopResult:
        """Run a loop; see `LoopRunner`."""
        given, states = request.tensors, request.states
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)):
            planned = self.planned[loop]
            walk = self.runner(planned.inference, request)
            return LoopResult([walk.emitted[place] for place in planned.shared], walk.last, walk.received)
        call = _Call(self.planned[loop], self.runner, request.extent, request.reverse)
        results = _LoopFunction.apply(call, *given)
        emitted = results[: len(loop.emitted)]
        places = [loop.emitted.index(value) for value in loop.next_states]
        return LoopResult(
            emitted,
            results[len(loop.emitted) :],
            lambda state: request.extent.shifted(states[state], emitted[places[state]], reverse=request.reverse),
        )


@dataclass(frozen=True)
class _Call:
    planned: PlannedLoop
    runner: LoopRunner
    extent: Extent
    reverse: bool

    def forward(self, given: Sequence[Tensor]) -> LoopResult:
        loop = self.planned.loop
        a, b, _ = loop.counts
        return self.runner(loop, LoopInputs(given[:a], given[a : a + b], given[a + b :], self.extent, self.reverse))

    def backward(self, values: dict[int, Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of the loop's inputs, from the values it kept and the gradients of its results."""
        planned, back = self.planned, self.planned.backward
        emitted, last = grads[: planned.emits], grads[planned.emits :]
        batched = Batched(back.program, planned.rows, planned.coupled, self.extent, planned.sums, self.runner.affine)
        a, b, _ = planned.loop.counts
        state_grads = [back.program.outputs[a + b + leaf] for leaf in back.states]
        stages = Stages(
            back.stages,
            back.loops,
            self._state_tangents(),
            state_grads,
            batched,
            self.runner,
            back.read,
            reverse=not self.reverse,
        )
        env: dict[int, Entry] = {v: self._timed(v, values[v]) for v in back.kept}
        env |= {v: values[v] for v in back.fixed}
        device = next(grad.device for grad in grads if grad is not None)
        for v, position in zip(self._emitted_tangents(), back.emitted, strict=True):
            grad = emitted[position]
            env[v] = self._zeros(planned.loop.emitted[position], device) if grad is None else self._timed(v, grad)
        first = stages.run(env, [self._last(last[leaf], leaf, device) for leaf in back.states])
        return self._collected(env, batched, dict(zip(back.states, first, strict=True)))

    def _emitted_tangents(self) -> tuple[int, ...]:
        back = self.planned.backward
        start = len(back.kept) + len(back.fixed)
        return back.program.inputs[start : start + len(back.emitted)]

    def _state_tangents(self) -> tuple[int, ...]:
        back = self.planned.backward
        return back.program.inputs[len(back.kept) + len(back.fixed) + len(back.emitted) :]

    def _timed(self, value: int, tensor: Tensor) -> Timed:
        return Timed(tensor, self.extent, self.planned.rows.get(value) if self.extent.ragged else None)

    def _zeros(self, value: int, device: torch.device) -> Timed:
        """Zeros at every step in the shape of a value, without memory for them."""
        rows = self.planned.loop.program.values[value].rows
        if self.extent.ragged and rows is not None:
            return Timed(self.planned.zeros(value, self.extent.rows, device), self.extent, rows)
        zeros = self.planned.zeros(value, self.extent.batch, device)
        return Timed(zeros.expand(self.extent.steps, *zeros.shape), self.extent)

    def _last(self, grad: Tensor | None, leaf: int, device: torch.device) -> Tensor:
        following = self.planned.loop.next_states[leaf]
        return self.planned.zeros(following, self.extent.batch, device) if grad is None else grad

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
                each = over_time(env[value], self.extent, 0)
                found.append(self.extent.last_of(each, reverse=not self.reverse))
            elif position < a:
                found.append(over_time(env[value], self.extent, self.planned.rows.get(value)))
            else:
                found.append(batched.total(value, env[value]))
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
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(given))
        if torch.is_grad_enabled() or not all(grad is None or has_memory(grad) for grad in grads):
            return (None, *_graph_backward(call, given, grads))
        values = dict(zip((*loop.program.inputs, *loop.emitted), saved, strict=False))
        values |= dict(zip(loop.states, saved[len(saved) - len(loop.states) :], strict=True))
        return (None, *call.backward(values, grads))


def _graph_backward(call: _Call, given: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients by ordinary autograd, for a second derivative, or for many gradients at once: the loop again."""
    loop = call.planned.loop
    a, b, _ = loop.counts
    with torch.enable_grad():
        # Views of the inputs: the graph of the first forward stays as it is, yet the result still leads to the inputs.
        inputs = [tensor.view_as(tensor) for tensor in given]
        request = LoopInputs(inputs[:a], inputs[a : a + b], inputs[a + b :], call.extent, call.reverse)
        outputs = _by_autograd(call, request)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    asked = [i for i, tensor in enumerate(inputs) if tensor.requires_grad]
    found: list[Tensor | None] = [None] * len(inputs)
    if pairs and asked:
        results = torch.autograd.grad(
            [o for o, _ in pairs],
            [inputs[i] for i in asked],
            [g for _, g in pairs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        for i, grad in zip(asked, results, strict=True):
            found[i] = grad
    return found


def _by_autograd(call: _Call, request: LoopInputs) -> list[Tensor]:
    """A loop's results, step by step under ordinary autograd."""
    loop, extent = call.planned.loop, call.extent
    found = dict(stepped(loop, request))
    steps = [found[t] for t in range(extent.steps)]
    values = [loop.program.values[v] for v in loop.emitted[: call.planned.emits]]
    columns = [[results[place] for results in steps] for place in range(len(values))]
    emitted = [_joined(column, extent, value.rows) for column, value in zip(columns, values, strict=True)]
    states = range(len(loop.emitted) + len(loop.totals), len(steps[0]))
    return [*emitted, *(_last([results[n] for results in steps], extent, reverse=call.reverse) for n in states)]


def _last(column: Sequence[Tensor], extent: Extent, *, reverse: bool) -> Tensor:
    """What each row's last step walked handed on, of a state at step 0, 1, 2, ..."""
    if extent.ragged:
        return extent.last_of(_joined(column, extent, 0), reverse=reverse)
    return column[0 if reverse else -1]


def _joined(column: Sequence[Tensor], extent: Extent, rows: int | None) -> Tensor:
    return torch.stack(tuple(column)) if rows is None or not extent.ragged else torch.cat(tuple(column), rows)
