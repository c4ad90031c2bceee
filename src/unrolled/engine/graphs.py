"""Loops on CUDA: some tens of steps captured as one graph, so that a step costs no launches from Python.

A graph replays what it captured on the memory that it was captured with. So a block of steps has memory of its own for
what it is given and what it makes; a walk copies a block's inputs there, replays, and copies its results out.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from unrolled.errors import warn_caller
from unrolled.execution.protocol import LoopInputs, LoopResult
from unrolled.lengths import Extent
from unrolled.plan.loops import LoopProgram
from unrolled.recording.interpret import compiled

STEPS = 32
"""Steps of a graph: enough that a launch is little of it, few enough that its memory is."""

_MOST_BLOCKS = 16

Capture: TypeAlias = Callable[[Callable[[], None]], Callable[[], None]]
"""Makes a function of another one that does the same each time it is called, on the same memory."""


def capturable(request: LoopInputs) -> bool:
    """Whether a walk is one for graphs: on CUDA, all rows as long as each other, and not inside of another capture."""
    on_cuda = request.states[0].device.type == "cuda"
    long = request.extent.steps >= STEPS and not request.extent.ragged
    return on_cuda and long and not torch.cuda.is_current_stream_capturing()


def captured(body: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of what a function launches.

    Raises:
        RuntimeError: if it does something that cannot be captured.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries allocate and choose their kernels the first few times
        for _ in range(3):
            body()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay


class Block:
    """Steps of a loop on memory of their own.

    Args:
        loop: the program.
        request: a walk that the block is for; its shapes are those of all that it will run.
        capture: how what the steps do is kept.

    Attributes:
        sequences: `[K, ...]` each, to be written before `replay`.
        fixed: what is the same at every step, likewise.
        states: what the first step receives, likewise; after `replay` what the last one handed on.
        emitted: `[K, ...]` each, to be read after it.
        totals: sums over all rows and steps of all replays since they were zeroed.
    """

    def __init__(self, loop: LoopProgram, request: LoopInputs, capture: Capture = captured) -> None:
        self.sequences = [torch.empty_like(x[:STEPS]) for x in request.sequences]
        self.fixed = [torch.empty_like(x) for x in request.fixed]
        self.states = [torch.empty_like(x) for x in request.states]
        self._step, self._batch, self._reverse = compiled(loop.program), request.extent.batch, request.reverse
        self._counts = len(loop.emitted), len(loop.totals)
        self._take(request, 0)
        emitted, totals, _ = self._parts(self._run_step(0, self.states))
        self.emitted = [x.new_empty((STEPS, *x.shape)) for x in emitted]
        self.totals = [torch.zeros_like(x.sum(0)) for x in totals]
        self.replay = capture(self._body)

    def start(self, request: LoopInputs) -> None:
        """Begin a walk."""
        for own, given in zip((*self.fixed, *self.states), (*request.fixed, *request.states), strict=True):
            own.copy_(given)
        for total in self.totals:
            total.zero_()

    def run(self, request: LoopInputs, first: int, kept: Sequence[Tensor]) -> None:
        """Run the steps from `first` on, and write what they emit into its place."""
        self._take(request, first)
        self.replay()
        for place, made in zip(kept, self.emitted, strict=True):
            place[first : first + STEPS].copy_(made)

    def _take(self, request: LoopInputs, first: int) -> None:
        for own, given in zip(self.sequences, request.sequences, strict=True):
            own.copy_(given[first : first + STEPS])

    def _run_step(self, k: int, states: Sequence[Tensor]) -> Sequence[Any]:
        return self._step(self._batch, *(x[k] for x in self.sequences), *self.fixed, *states)

    def _parts(self, results: Sequence[Any]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        many, added = self._counts
        return results[:many], results[many : many + added], results[many + added :]

    def _body(self) -> None:
        states: Sequence[Tensor] = self.states
        for k in reversed(range(STEPS)) if self._reverse else range(STEPS):
            emitted, totals, states = self._parts(self._run_step(k, states))
            for kept, made in zip(self.emitted, emitted, strict=True):
                kept[k].copy_(made)
            for total, more in zip(self.totals, totals, strict=True):
                total.add_(more.sum(0))
        # One state may be handed the memory of another.
        for own, last in zip(self.states, [state.clone() for state in states], strict=True):
            own.copy_(last)


_BLOCKS: OrderedDict[Any, Block | None] = OrderedDict()


def block_for(loop: LoopProgram, request: LoopInputs, capture: Capture = captured) -> Block | None:
    """The block for a walk, captured now if there is none yet; None, said once, where its steps cannot be captured."""
    kinds = tuple((x.shape[i < len(request.sequences) :], x.dtype, x.device) for i, x in enumerate(request.tensors))
    # A block's memory is one walk's at a time: walks on other streams, and of other threads, have blocks of their own.
    stream = torch.cuda.current_stream().cuda_stream if request.states[0].device.type == "cuda" else 0
    key = (loop, kinds, request.reverse, capture, stream, threading.get_ident())
    if key not in _BLOCKS:
        try:
            _BLOCKS[key] = Block(loop, request, capture)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _BLOCKS[key] = None
            _say_once(f"unrolled launches every step's operations on CUDA, since no graph can be captured: {error}")
        while len(_BLOCKS) > _MOST_BLOCKS:
            _BLOCKS.popitem(last=False)
    _BLOCKS.move_to_end(key)
    return _BLOCKS[key]


def run_in_blocks(
    loop: LoopProgram, request: LoopInputs, block: Block, rest: Callable[[LoopProgram, LoopInputs], LoopResult]
) -> LoopResult:
    """Walk through time block by block; steps that are left over come last.

    Args:
        loop: the program.
        request: what it is run on.
        block: the block for it.
        rest: runs what is left over.
    """
    T, B = request.extent.steps, request.extent.batch
    blocks = [range(n * STEPS, (n + 1) * STEPS) for n in range(T // STEPS)]
    over = range(T // STEPS * STEPS, T)
    if request.reverse:
        blocks = [range(T - step.stop, T - step.start) for step in blocks]
        over = range(0, T - over.start)
    kept = [x.new_empty((T, *x.shape[1:])) for x in block.emitted]
    block.start(request)
    for steps in blocks:
        block.run(request, steps.start, kept)
    last, totals = [state.clone() for state in block.states], [total.clone() for total in block.totals]
    if over:
        sequences = [x[over.start : over.stop] for x in request.sequences]
        extent = Extent(len(over), B)
        walk = rest(loop, LoopInputs(sequences, request.fixed, last, extent, request.reverse))
        for place, made in zip(kept, walk.emitted, strict=True):
            place[over.start : over.stop].copy_(made)
        last, totals = list(walk.last), [a + b for a, b in zip(totals, walk.totals, strict=True)]
    following = [kept[loop.emitted.index(value)] for value in loop.next_states]

    return LoopResult(kept, last, lambda state: request.received(state, following[state]), totals)


@cache
def _say_once(message: str) -> None:
    warn_caller(message)
