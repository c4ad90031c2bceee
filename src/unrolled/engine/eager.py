"""The eager engine: loops walked through with torch operations. Any device, any operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unrolled.bptt.walk import Walk, shifted
from unrolled.plan.interpret import compiled
from unrolled.plan.loops import LoopProgram

__all__ = ["run_loop"]


def run_loop(
    loop: LoopProgram,
    sequences: Sequence[Tensor],
    fixed: Sequence[Tensor],
    states: Sequence[Tensor],
    *,
    steps: int,
    batch: int,
    reverse: bool,
) -> Walk:
    """Walk through time, one step of the loop's program after another; see `bptt.walk.LoopRunner`."""
    step, first = compiled(loop.program), states
    many = len(loop.emitted)
    columns = [tensor.unbind(0) for tensor in sequences]
    emitted: list[Tensor] = []
    totals: list[Tensor] = []
    for t in reversed(range(steps)) if reverse else range(steps):
        results = step(batch, *(column[t] for column in columns), *fixed, *states)
        if not emitted:
            emitted = [torch.empty((steps, *r.shape), dtype=r.dtype, device=r.device) for r in results[:many]]  # type: ignore[union-attr]
        for kept, result in zip(emitted, results, strict=False):
            kept[t].copy_(result)
        added = [result.sum(0) for result in results[many : many + len(loop.totals)]]  # type: ignore[union-attr]
        totals = [total + more for total, more in zip(totals, added, strict=True)] if totals else added
        states = results[many + len(loop.totals) :]
    places = [loop.emitted.index(value) for value in loop.next_states]
    return Walk(emitted, states, lambda state: shifted(first[state], emitted[places[state]], reverse=reverse), totals)
