"""The eager engine: loops walked through with torch operations. Any device, any operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
) -> tuple[list[Tensor], list[Tensor]]:
    """Walk through time, one step of the loop's program after another.

    Args:
        loop: the program.
        sequences: `[T, ...]` each.
        fixed: what is the same at every step.
        states: what the first step receives.
        steps: T.
        batch: B.
        reverse: whether to begin with the last step.

    Returns:
        What was emitted, `[T, ...]` each, and the states after the last step walked.
    """
    step = compiled(loop.program)
    many = len(loop.emitted)
    columns = [tensor.unbind(0) for tensor in sequences]
    emitted: list[Tensor] = []
    for t in reversed(range(steps)) if reverse else range(steps):
        results = step(batch, *(column[t] for column in columns), *fixed, *states)
        if not emitted:
            emitted = [torch.empty((steps, *r.shape), dtype=r.dtype, device=r.device) for r in results[:many]]  # type: ignore[union-attr]
        for kept, result in zip(emitted, results, strict=False):
            kept[t].copy_(result)
        states = results[many:]
    return emitted, list(states)
