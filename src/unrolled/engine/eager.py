"""The eager engine: loops walked through with torch operations. Any device, any operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unrolled.engine.graphs import block_for, capturable, run_in_blocks
from unrolled.execution.protocol import LoopInputs, LoopResult
from unrolled.execution.stepping import iterate_loop
from unrolled.plan.loops import LoopProgram


def run_loop(loop: LoopProgram, request: LoopInputs) -> LoopResult:
    """Walk through time; see `execution.protocol.LoopRunner`. On CUDA long walks are replays of captured graphs."""
    if capturable(request):
        with torch.no_grad():
            block = block_for(loop, request)
            if block is not None:
                return run_in_blocks(loop, request, block, _run_steps)
    return _run_steps(loop, request)


def _run_steps(loop: LoopProgram, request: LoopInputs) -> LoopResult:
    """One step of the loop's program after another."""
    extent, reverse = request.extent, request.reverse
    many, added = len(loop.emitted), len(loop.totals)
    kept = _Kept(loop, request)
    totals: list[Tensor] = []
    for t, results in iterate_loop(loop, request):
        kept.write(t, results[:many])
        more = [result.sum(0) for result in results[many : many + added]]
        totals = [total + new for total, new in zip(totals, more, strict=True)] if totals else more
    following = [kept.tensors[loop.emitted.index(value)] for value in loop.next_states]
    last = (
        [extent.last_of(entries, reverse=reverse) for entries in following]
        if extent.ragged
        else results[many + added :]
    )

    return LoopResult(kept.tensors, last, lambda state: request.received(state, following[state]), totals)


class _Kept:
    """Memory for what every step emits, made when the first step has."""

    def __init__(self, loop: LoopProgram, request: LoopInputs) -> None:
        self.extent = request.extent
        self.rows = [loop.program.values[v].rows if self.extent.ragged else None for v in loop.emitted]
        self.tensors: list[Tensor] = []

    def write(self, t: int, results: Sequence[Tensor]) -> None:
        if not self.tensors:
            shapes = [self._shape(t, result, rows) for result, rows in zip(results, self.rows, strict=True)]
            self.tensors = [r.new_empty(shape) for r, shape in zip(results, shapes, strict=True)]
        for kept, result, rows in zip(self.tensors, results, self.rows, strict=True):
            if rows is None:
                kept[t].copy_(result)
            else:
                many = result.shape[rows]
                start = self.extent.offsets[t] * (many // self.extent.sizes[t])
                kept.narrow(rows, start, many).copy_(result)

    def _shape(self, t: int, result: Tensor, rows: int | None) -> list[int]:
        if rows is None:
            return [self.extent.steps, *result.shape]
        shape = list(result.shape)
        shape[rows] = shape[rows] // self.extent.sizes[t] * self.extent.rows
        return shape
