"""Binding: torch's tensors to an emitted loop. Sizes are checked here, before a pointer leaves Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from ctypes import c_void_p, cast
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unrolled.engine.native.bound import BoundLoop, Function, Results
from unrolled.engine.native.build import library
from unrolled.engine.native.emit import Source, one_file
from unrolled.engine.native.frame import Frame
from unrolled.engine.native.lower import state_buffers
from unrolled.engine.native.runtime import runtime
from unrolled.engine.native.state_buffer import StateBuffer
from unrolled.engine.native.threads import threads_for
from unrolled.execution.memory import materialized
from unrolled.execution.protocol import LoopInputs, LoopResult
from unrolled.lengths import Extent
from unrolled.operations.layout import RowLayout
from unrolled.plan.loops import LoopProgram

_MOST_BOUND = 64  # ways in which inputs lie, of one loop


def built(sources: Mapping[LoopProgram, Source]) -> dict[LoopProgram, NativeLoop]:
    """Build loops over numbers of one dtype, all in one run of the compiler.

    Raises:
        BuildError: if there is no compiler, or it fails.
    """
    (real,) = {source.real for source in sources.values()}
    loaded, entry = library(one_file(list(sources.values()))), runtime(real).ur_loop
    functions = [cast(loaded[f"loop_{number}"], c_void_p) for number in range(len(sources))]
    return {
        loop: NativeLoop(loop, source, partial(entry, function))
        for (loop, source), function in zip(sources.items(), functions, strict=True)
    }


class NativeLoop:
    """A loop that is compiled, ready to be run.

    Args:
        loop: its program.
        source: what was emitted for it.
        entry: its entry in a library.
    """

    def __init__(self, loop: LoopProgram, source: Source, entry: Callable[..., int]) -> None:
        self.loop, self.source = loop, source
        values = loop.program.values
        self._function = Function(source, entry, loop.counts[0])
        self._input_layouts = [RowLayout.of(values[v]) for v in loop.program.inputs]
        self._emitted_layouts = [RowLayout.of(values[v]) for v in loop.emitted]
        self._as_they_are = all(layout.first for layout in self._emitted_layouts)
        self._state_buffers = state_buffers(loop)
        self._bound: dict[Any, tuple[BoundLoop, list[int]]] = {}

    def __call__(self, inputs: LoopInputs) -> LoopResult:
        """Run all steps; see `execution.protocol.LoopRunner`.

        Raises:
            DeclinedError: if torch has to run them, on these numbers.
        """
        extent, tensors = inputs.extent, inputs.tensors
        bound, tensors = self.bound(tensors, extent, reverse=inputs.reverse)
        results = bound.memory(last=inputs.last_owned)
        states = self._begun(bound, tensors, results, extent, reverse=inputs.reverse)
        bound.run([tensor.data_ptr() for tensor in tensors], tensors, results, extent)
        last = [
            made if made is not None else self._of_state(n, buffer.last(owned=inputs.last_owned), 0)
            for n, (made, buffer) in enumerate(zip(results.last, states, strict=True))
        ]
        totals = [total.sum(0) if len(total) > 1 else total[0] for total in results.totals]
        emitted = self._emitted(results.buffers, states, extent)

        def received(state: int) -> Tensor:
            return self._of_state(state, states[state].received(), 1)

        return LoopResult(emitted, last, received, totals)

    def bound(self, tensors: Sequence[Tensor], extent: Extent, *, reverse: bool) -> tuple[BoundLoop, list[Tensor]]:
        """The loop for inputs that lie as these, and the inputs, some of them copied so that they lie as C reads them.

        Raises:
            ValueError: for inputs of another shape, dtype or device.
        """
        tensors = [materialized(tensor) for tensor in tensors]
        lie = tuple([(tensor.shape, tensor.stride(), tensor.dtype, tensor.is_cpu) for tensor in tensors])
        key = extent.steps, extent.batch, extent.rows, extent.ragged, reverse, torch.get_num_threads(), lie
        known = self._bound.get(key)
        if known is None:
            if len(self._bound) >= _MOST_BOUND:
                self._bound.clear()
            known = self._bound[key] = self._bind(tensors, extent, reverse=reverse)
        bound, copied = known
        for i in copied:
            tensors[i] = self._adjacent(i, tensors[i], extent)
        return bound, tensors

    # -- before a run

    def _bind(self, tensors: Sequence[Tensor], extent: Extent, *, reverse: bool) -> tuple[BoundLoop, list[int]]:
        """The loop for inputs that lie as these, and which of them are copied first."""
        frame = Frame(self.loop, self.source, extent)
        frame.check(tensors)
        adjacent = [self._adjacent(i, tensor, extent) for i, tensor in enumerate(tensors)]
        by_step, by_row = list(frame.by_step), list(frame.by_row)
        for i, layout in enumerate(self._input_layouts[: self.loop.counts[0]]):
            if not (layout.plain and tensors[i].is_contiguous()) and layout.place is not None:
                timed = not extent.ragged
                by_step[i] = adjacent[i].stride(0) if timed else 0
                by_row[i] = adjacent[i].stride(1 if timed else 0)
        threads = threads_for(self.source, extent)
        bound = BoundLoop(self._function, frame, threads, adjacent, (by_step, by_row), reverse=reverse)
        return bound, [i for i, tensor in enumerate(tensors) if adjacent[i] is not tensor]

    def _adjacent(self, i: int, tensor: Tensor, extent: Extent) -> Tensor:
        """An input, copied if a row's entries do not lie one after the other in it."""
        a, b, _ = self.loop.counts
        layout = self._input_layouts[i]
        if layout.plain and tensor.is_contiguous():
            return tensor
        if i >= a + b or (i < a and layout.place is None):  # states; an entry a step for all rows
            return tensor.contiguous()
        timed = i < a and not extent.ragged
        rows = extent.rows if i < a and extent.ragged else extent.batch
        viewed = layout.rows_first(tensor, 1 if timed else 0, rows)
        if viewed.is_contiguous():
            return viewed
        if i >= a:
            return viewed if i - a in self.source.only_packed else viewed.contiguous()
        return _adjacent(viewed, 2 if timed else 1)

    def _begun(
        self, bound: BoundLoop, tensors: Sequence[Tensor], results: Results, extent: Extent, *, reverse: bool
    ) -> list[StateBuffer]:
        """The memory of the states, in which what the first step receives is put where C does not do that."""
        states = []
        given = tensors[len(tensors) - len(bound.places) :]
        for state, shape, (number, *_, size) in zip(given, bound.frame.passed_on, bound.places, strict=True):
            buffer = StateBuffer(results.buffers[number], extent, reverse, shape)
            if not size:
                buffer.begin(state)
            states.append(buffer)
        return states

    # -- after it

    def _emitted(self, buffers: Sequence[Tensor], states: Sequence[StateBuffer], extent: Extent) -> list[Tensor]:
        """What every step emitted, in torch's shapes."""
        made = list(buffers[: len(self.loop.emitted)])
        for number, state in zip(self._state_buffers, states, strict=True):
            if number < len(made):
                made[number] = state.passed_on()
        leading = 0 if extent.ragged else 1
        layouts = self._emitted_layouts
        if self._as_they_are:
            return made
        first_rows = torch.tensor(extent.offsets[: extent.steps]) if extent.ragged else None
        return [_as_torch_has_it(layout, x, leading, first_rows) for layout, x in zip(layouts, made, strict=True)]

    def _of_state(self, state: int, tensor: Tensor, leading: int) -> Tensor:
        return _as_torch_has_it(self._input_layouts[state - len(self._state_buffers)], tensor, leading)


def _as_torch_has_it(layout: RowLayout, tensor: Tensor, leading: int, first_rows: Tensor | None = None) -> Tensor:
    """A tensor `[..., B, *dims]` in torch's shape; of what has no batch all rows of a step are alike."""
    if layout.place is not None:
        return layout.as_torch_has_it(tensor, leading)
    return tensor.select(leading, 0) if first_rows is None else tensor.index_select(0, first_rows)


def _adjacent(tensor: Tensor, leading: int) -> Tensor:
    """The tensor, copied if a row's entries do not lie one after the other; what is the same at every step, once.

    Args:
        tensor: `[T, B, ...]` or `[B, ...]`.
        leading: how many dimensions come before a row's entries.
    """
    if leading == 2 and tensor.stride(0) == 0 and tensor.shape[0] > 1:
        return _adjacent(tensor[0], 1).expand(tensor.shape)
    expected = 1
    for size, stride in zip(reversed(tensor.shape[leading:]), reversed(tensor.stride()[leading:]), strict=True):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor
