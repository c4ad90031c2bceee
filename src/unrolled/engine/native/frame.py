"""Frames: what is known of a run of a loop before it is made, for so many steps and rows; worked out once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from struct import Struct

import torch
from torch import Tensor

from unrolled.engine.native.lower import state_buffers
from unrolled.operations.layout import RowLayout
from unrolled.plan.loops import LoopProgram


def integers(numbers: Sequence[int]) -> bytes:
    """Numbers as C has an array of int64_t, or of pointers."""
    return Struct(f"{len(numbers)}q").pack(*numbers)


class Frame:
    """What is known of a run over so many steps and rows.

    Args:
        loop: the loop's program.
        steps: T.
        batch: B, the rows of the first step.
        rows: those of all steps.
        ragged: whether rows end at different times.

    Attributes:
        by_step: how far apart the steps of an input are, in entries, if it is contiguous.
        by_row: how far apart its rows are.
        buffers: shape and dtype of each buffer; those of states have room for the first one.
        passed_on: for each state the shape of what all its steps pass on.
        start_bytes: for each state how large what the first step receives is; 0 where it has to be spread over rows.
        whole: `by_step` and `by_row` as C has them, where all inputs are contiguous.
    """

    def __init__(self, loop: LoopProgram, steps: int, batch: int, rows: int, ragged: bool) -> None:
        self.batch, self.rows, self.ragged = batch, rows, ragged
        values = loop.program.values
        layouts = [RowLayout.of(values[v]) for v in loop.program.inputs]
        folded = [ragged and layout.place is not None for layout in layouts]
        shapes = [
            values[v].sizes(rows) if one_after_the_other else (steps, *values[v].sizes(batch))
            for v, one_after_the_other in zip(loop.sequences, folded, strict=False)
        ]
        shapes += [values[v].sizes(batch) for v in (*loop.fixed, *loop.states)]
        self._inputs = [
            (torch.Size(shape), values[v].dtype) for shape, v in zip(shapes, loop.program.inputs, strict=True)
        ]
        self.by_row = [0 if layout.place is None else prod(layout.dims) for layout in layouts]
        self.by_step = [0] * len(shapes)
        for i, layout in enumerate(layouts[: len(loop.sequences)]):
            if not folded[i]:
                self.by_step[i] = prod(layout.dims) * (1 if layout.place is None else batch)
        self.whole = integers(self.by_step), integers(self.by_row)
        self._set_buffers(loop, steps)

    def _set_buffers(self, loop: LoopProgram, steps: int) -> None:
        values, of_states = loop.program.values, state_buffers(loop)
        further = [v for v, n in zip(loop.next_states, of_states, strict=True) if n >= len(loop.emitted)]
        kept = [(RowLayout.of(values[v]).dims, values[v].dtype) for v in (*loop.emitted, *further)]
        in_steps: tuple[int, ...] = (self.rows,) if self.ragged else (steps, self.batch)
        leading = [(self.batch + self.rows,) if n in of_states else in_steps for n in range(len(kept))]
        self.buffers = [((*first, *dims), dtype) for first, (dims, dtype) in zip(leading, kept, strict=True)]
        self.passed_on = [(*in_steps, *kept[n][0]) for n in of_states]
        self.start_bytes = [
            self.batch * prod(kept[n][0]) * kept[n][1].itemsize if RowLayout.of(values[v]).first else 0
            for v, n in zip(loop.states, of_states, strict=True)
        ]

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Refuse tensors of another shape, dtype or device."""
        for tensor, (shape, dtype) in zip(tensors, self._inputs, strict=True):
            if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu:
                raise ValueError(
                    f"a loop's input must be {dtype} {list(shape)} on the CPU, "
                    f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                )
