"""The eager engine: loops run with torch operations. Any device, any operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unrolled.engine.graphs import block_for, capturable, run_in_blocks
from unrolled.execution.protocol import LoopInputs, LoopResult
from unrolled.execution.stepping import iterate_loop
from unrolled.plan.loops import LoopProgram


def run_loop(loop: LoopProgram, inputs: LoopInputs) -> LoopResult:
    """Run all steps; see `execution.protocol.LoopRunner`. On CUDA long runs are replays of captured graphs."""
    if capturable(inputs):
        with torch.no_grad():
            block = block_for(loop, inputs)
            if block is not None:
                return run_in_blocks(loop, inputs, block, _run_steps)
    return _run_steps(loop, inputs)


def _run_steps(loop: LoopProgram, inputs: LoopInputs) -> LoopResult:
    """One step of the loop's program after another."""
    emitted = _Emitted(loop, inputs)
    totals: list[Tensor] = []
    last: Sequence[Tensor] = ()
    for t, results in iterate_loop(loop, inputs):
        made, summed, last = loop.split(results)
        emitted.write(t, made)
        more = [rows.sum(0) for rows in summed]
        totals = [total + new for total, new in zip(totals, more, strict=True)] if totals else more
    passed_on = loop.passed_on(emitted.tensors)
    if inputs.extent.ragged:
        last = [inputs.extent.last_of(x, reverse=inputs.reverse) for x in passed_on]
    return LoopResult(emitted.tensors, last, lambda state: inputs.received(state, passed_on[state]), totals)


class _Emitted:
    """Memory for what every step emits, made when the first step has."""

    def __init__(self, loop: LoopProgram, inputs: LoopInputs) -> None:
        self.extent = inputs.extent
        self.rows = [loop.program.values[v].rows if self.extent.ragged else None for v in loop.emitted]
        self.tensors: list[Tensor] = []

    def write(self, t: int, results: Sequence[Tensor]) -> None:
        if not self.tensors:
            shapes = [self._shape(t, result, rows) for result, rows in zip(results, self.rows, strict=True)]
            self.tensors = [r.new_empty(shape) for r, shape in zip(results, shapes, strict=True)]
        for tensor, result, rows in zip(self.tensors, results, self.rows, strict=True):
            if rows is None:
                tensor[t].copy_(result)
            else:
                many = result.shape[rows]
                start = self.extent.offsets[t] * (many // self.extent.sizes[t])
                tensor.narrow(rows, start, many).copy_(result)

    def _shape(self, t: int, result: Tensor, rows: int | None) -> list[int]:
        if rows is None:
            return [self.extent.steps, *result.shape]
        shape = list(result.shape)
        shape[rows] = shape[rows] // self.extent.sizes[t] * self.extent.rows
        return shape
