"""Bound loops: what a run needs to know besides pointers, worked out once for inputs that lie in memory in one way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from unrolled.engine.native.emit import Source, position_of
from unrolled.engine.native.frame import CPU, Frame, integers
from unrolled.engine.native.products import PackedMatrix, packed_bytes
from unrolled.engine.native.threads import Threads, team, threads_for
from unrolled.execution.unchanged import made_once, something_unchanged
from unrolled.lengths import Extent


class DeclinedError(Exception):
    """Numbers that an emitted loop has no answer for: an index out of range, a division by zero, ties in a sort."""


class Function:
    """The C function of a loop.

    Args:
        source: what was emitted for it.
        entry: `ur_loop` of the runtime, for the loop's own function.
        fixed: the position of the first fixed value among its inputs.

    Attributes:
        matrices: what it reads packed, and the positions of that among the inputs.
        seconds_per_row: how long a row of a step took in the latest run.
    """

    def __init__(self, source: Source, entry: Callable[..., int], fixed: int) -> None:
        self.source, self.entry = source, entry
        self.matrices = [(PackedMatrix.of(matrix), fixed + position_of(matrix)) for matrix in source.matrices]
        self.seconds_per_row = 1e-9 * max(source.flops, 1)


class Results(NamedTuple):
    """The memory of what a run makes.

    Attributes:
        buffers: what was emitted at every step, and the states.
        totals: sums over all rows and steps, `[owners, ...]`.
        last: for each state what the last step passed on; None where it is not asked for, or lies here and there.
    """

    buffers: list[Tensor]
    totals: list[Tensor]
    last: list[Tensor | None]


class BoundLoop:
    """A loop for so many steps and rows, and inputs that lie in memory in one way.

    Args:
        function: the loop in C.
        frame: what is known of so many steps and rows.
        threads: how threads share a run; where rows end at different times only how many there are.
        tensors: inputs that lie in this way; in each a row's entries lie one after the other.
        strides: how far apart the steps of each are, and how far apart its rows.
        reverse: whether the last step is run first.

    Attributes:
        places: for each state its buffer, and where in it is what the first step receives and what the last one passes
            on, as C has it: in bytes, of no bytes where Python puts it there.
    """

    def __init__(
        self,
        function: Function,
        frame: Frame,
        threads: Threads,
        tensors: Sequence[Tensor],
        strides: tuple[Sequence[int], Sequence[int]],
        *,
        reverse: bool,
    ) -> None:
        self.function, self.frame, self.threads = function, frame, threads
        self.places = frame.places(reverse=reverse)
        self._bounds = integers(threads.bounds)
        counts = (len(tensors), len(frame.buffers), len(frame.totals), len(function.matrices), len(self.places))
        numbers = [*counts, frame.scratch, frame.steps, frame.batch, reverse, threads.queued, threads.count]
        numbers += [*strides[0], *strides[1]]
        numbers += [number for place in self.places for number in place]
        self._layout = integers([*numbers, *self._set_matrices(tensors)])

    def _set_matrices(self, tensors: Sequence[Tensor]) -> list[int]:
        """Find out where C packs the matrices, in bytes of one piece of memory; what it has to know of them.

        Python packs them all if one lies such that C cannot.
        """
        matrices = self.function.matrices
        lying = [matrix.lying(tensors[position]) for matrix, position in matrices]
        sizes = [0] + [
            0 if place is None else packed_bytes(*place[1:3], tensors[position].dtype)
            for place, (_, position) in zip(lying, matrices, strict=True)
        ]
        *self._packed_at, self._packed_bytes = accumulate(sizes)
        self._c_packs = None not in lying
        pairs = zip(matrices, lying, strict=True)
        return [number for (_, position), place in pairs for number in (position, *(place or (0, 0, 0, 0, 0)))]

    def memory(self, *, last: bool = True) -> Results:
        """Memory for a run.

        Args:
            last: whether what the last step passes on is taken from the buffers.
        """
        wanted = [last and bool(size) and not self.frame.ragged for *_, size in self.places]
        made = self.frame.memory(self.threads.owners, wanted)
        return Results(*made)

    def run(self, inputs: Sequence[int], tensors: Sequence[Tensor], results: Results, extent: Extent) -> None:
        """Run all steps, in calls that last a moment each.

        Args:
            inputs: pointers to them.
            tensors: the inputs, of which those are read whose matrices Python packs.
            results: the memory for what is made.
            extent: how far it reaches.

        Raises:
            DeclinedError: if torch has to run them, on these numbers.
        """
        frame, function = self.frame, self.function
        packed, _held, packs = self._pack(tensors)
        scratch = torch.empty(frame.scratch * frame.batch + 64, dtype=torch.uint8, device=CPU)
        pointers = [
            *inputs,
            *[tensor.data_ptr() for tensor in results.buffers],
            *[tensor.data_ptr() for tensor in results.totals],
            *packed,
            *[0 if tensor is None else tensor.data_ptr() for tensor in results.last],
            -(-scratch.data_ptr() // 64) * 64,  # a line of the cache
        ]
        offsets, bounds = None, self._bounds
        if extent.ragged:
            offsets, bounds = (
                integers((*extent.offsets, extent.rows)),
                integers(threads_for(function.source, extent).bounds),
            )
        arguments = self._layout, integers(pointers), offsets, bounds, packs
        done = 0
        while done < frame.steps:
            # A quarter of a second: then Python has its turn again, so that Ctrl-C works.
            many = max(1, int(0.25 / (function.seconds_per_row * frame.batch)))
            until = min(frame.steps, done + many)
            started = time.perf_counter()
            if function.entry(*arguments, done, until, team()):
                raise DeclinedError
            rows = (until - done) * frame.rows / frame.steps
            function.seconds_per_row = max((time.perf_counter() - started) / rows, 1e-10)
            done = until

    def _pack(self, tensors: Sequence[Tensor]) -> tuple[list[int], Sequence[Tensor], bool]:
        """Pointers to packed matrices, their memory, and whether C has to pack them."""
        if not self._c_packs or something_unchanged():
            made = [made_once(pack, tensors[position]) for pack, position in self.function.matrices]
            return [tensor.data_ptr() for tensor in made], made, False
        memory = torch.empty(self._packed_bytes, dtype=torch.uint8, device=CPU)
        begin = memory.data_ptr()
        return [begin + at for at in self._packed_at], [memory], True
