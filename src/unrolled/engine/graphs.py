"""Loops on CUDA: some tens of steps captured as one graph, so that a step costs no launches from Python.

A graph replays what it captured on the memory that it was captured with. So a block of steps has memory of its own for
its inputs and what it makes; a run copies a block's inputs there, replays, and copies its results out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from unrolled.errors import warn_caller_once
from unrolled.execution.protocol import LoopInputs, LoopResult
from unrolled.lengths import Extent
from unrolled.lru import LRUCache
from unrolled.plan.loops import LoopProgram
from unrolled.recording.interpret import compiled

STEPS = 32
"""Steps of a graph: enough that a launch is little of it, few enough that its memory is."""

Capture: TypeAlias = Callable[[Callable[[], None]], Callable[[], None]]
"""Makes a function of another one that does the same each time it is called, on the same memory."""


def capturable(inputs: LoopInputs) -> bool:
    """Whether a run is one for graphs: on CUDA, all rows as long as each other, and not inside of another capture."""
    on_cuda = inputs.states[0].device.type == "cuda"
    long = inputs.extent.steps >= STEPS and not inputs.extent.ragged
    return on_cuda and long and not torch.cuda.is_current_stream_capturing()


def captured(body: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of what a function launches.

    Raises:
        RuntimeError: if it does something that cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate and choose their kernels the first few times
        for _ in range(3):
            body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay


class StepBlock:
    """Steps of a loop on memory of their own.

    Args:
        loop: the program.
        inputs: of a run that the block is for; their shapes are those of all that it will run.
        capture: makes a replay of what the steps do.

    Attributes:
        sequences: `[K, ...]` each, to be written before `replay`.
        fixed: what is the same at every step, likewise.
        states: what the first step receives, likewise; after `replay` what the last one passed on.
        emitted: `[K, ...]` each, to be read after it.
        totals: sums over all rows and steps of all replays since they were zeroed.
    """

    def __init__(self, loop: LoopProgram, inputs: LoopInputs, capture: Capture = captured) -> None:
        self.loop = loop
        self.sequences = [torch.empty_like(x[:STEPS]) for x in inputs.sequences]
        self.fixed = [torch.empty_like(x) for x in inputs.fixed]
        self.states = [torch.empty_like(x) for x in inputs.states]
        self._step, self._batch, self._reverse = compiled(loop.program), inputs.extent.batch, inputs.reverse
        self._take(inputs, 0)
        emitted, totals, _ = self._run_step(0, self.states)
        self.emitted = [x.new_empty((STEPS, *x.shape)) for x in emitted]
        self.totals = [torch.zeros_like(x.sum(0)) for x in totals]
        self.replay = capture(self._body)

    def start(self, inputs: LoopInputs) -> None:
        """Begin a run."""
        for own, x in zip((*self.fixed, *self.states), (*inputs.fixed, *inputs.states), strict=True):
            own.copy_(x)
        for total in self.totals:
            total.zero_()

    def run(self, inputs: LoopInputs, first: int, emitted: Sequence[Tensor]) -> None:
        """Run the steps from `first` on, and write what they emit into its place."""
        self._take(inputs, first)
        self.replay()
        for place, made in zip(emitted, self.emitted, strict=True):
            place[first : first + STEPS].copy_(made)

    def _take(self, inputs: LoopInputs, first: int) -> None:
        for own, x in zip(self.sequences, inputs.sequences, strict=True):
            own.copy_(x[first : first + STEPS])

    def _run_step(self, k: int, states: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
        results: Sequence[Any] = self._step(self._batch, *(x[k] for x in self.sequences), *self.fixed, *states)
        return self.loop.split(results)

    def _body(self) -> None:
        states: Sequence[Tensor] = self.states
        for k in reversed(range(STEPS)) if self._reverse else range(STEPS):
            emitted, totals, states = self._run_step(k, states)
            for place, made in zip(self.emitted, emitted, strict=True):
                place[k].copy_(made)
            for total, more in zip(self.totals, totals, strict=True):
                total.add_(more.sum(0))
        # One state may become the next of another: all are read before any is written.
        for own, last in zip(self.states, [state.clone() for state in states], strict=True):
            own.copy_(last)


_BLOCKS = LRUCache[StepBlock | None](16)


def block_for(loop: LoopProgram, inputs: LoopInputs, capture: Capture = captured) -> StepBlock | None:
    """The block for a run, captured now if there is none yet; None, with a warning, where it cannot be captured."""
    kinds = [(x.shape[1:], x.dtype, x.device) for x in inputs.sequences]
    kinds += [(x.shape, x.dtype, x.device) for x in (*inputs.fixed, *inputs.states)]
    # A block's memory is one run's at a time: runs on other streams, and of other threads, have blocks of their own.
    stream = torch.cuda.current_stream().cuda_stream if inputs.states[0].device.type == "cuda" else 0
    key = (loop, tuple(kinds), inputs.reverse, capture, stream, threading.get_ident())

    def capture_now() -> StepBlock | None:
        try:
            return StepBlock(loop, inputs, capture)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warn_caller_once(
                f"unrolled launches every step's operations on CUDA, since no graph can be captured: {error}"
            )
            return None

    return _BLOCKS.get(lambda: key, capture_now)


def run_in_blocks(
    loop: LoopProgram, inputs: LoopInputs, block: StepBlock, rest: Callable[[LoopProgram, LoopInputs], LoopResult]
) -> LoopResult:
    """Run a loop block by block; steps that are left over come last.

    Args:
        loop: the program.
        inputs: what it is run on.
        block: the block for it.
        rest: runs what is left over.
    """
    T, B = inputs.extent.steps, inputs.extent.batch
    blocks = [range(n * STEPS, (n + 1) * STEPS) for n in range(T // STEPS)]
    over = range(T // STEPS * STEPS, T)
    if inputs.reverse:
        blocks = [range(T - steps.stop, T - steps.start) for steps in blocks]
        over = range(0, T - over.start)
    emitted = [x.new_empty((T, *x.shape[1:])) for x in block.emitted]
    block.start(inputs)
    for steps in blocks:
        block.run(inputs, steps.start, emitted)
    last, totals = [state.clone() for state in block.states], [total.clone() for total in block.totals]
    if over:
        sequences = [x[over.start : over.stop] for x in inputs.sequences]
        result = rest(loop, LoopInputs(sequences, inputs.fixed, last, Extent(len(over), B), inputs.reverse))
        for place, made in zip(emitted, result.emitted, strict=True):
            place[over.start : over.stop].copy_(made)
        last, totals = list(result.last), [a + b for a, b in zip(totals, result.totals, strict=True)]
    passed_on = loop.passed_on(emitted)
    return LoopResult(emitted, last, lambda state: inputs.received(state, passed_on[state]), totals)
