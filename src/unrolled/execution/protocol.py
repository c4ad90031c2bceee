"""The protocol between the execution of a segment and the engines: what runs a loop, on what, with which result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from unrolled.lengths import Extent
from unrolled.plan.loops import LoopProgram


class LoopInputs(NamedTuple):
    """The tensors that a loop runs on, in the order of its program.

    Attributes:
        sequences: `[T, ...]` each; where rows end at different times, all steps' rows one after the other.
        fixed: what is the same at every step.
        states: what the step of each row that runs first receives.
        extent: how far the segment reaches.
        reverse: whether the last step runs first.
        last_owned: whether the last states have memory of their own; not where nobody reads them.
    """

    sequences: Sequence[Tensor]
    fixed: Sequence[Tensor]
    states: Sequence[Tensor]
    extent: Extent
    reverse: bool
    last_owned: bool = True

    @property
    def tensors(self) -> list[Tensor]:
        """All inputs, in order."""
        return [*self.sequences, *self.fixed, *self.states]

    def received(self, state: int, passed_on: Tensor) -> Tensor:
        """What every step received of a state, from what every step passed on; both laid out as the sequences."""
        return self.extent.shifted(self.states[state], passed_on, reverse=self.reverse)


class LoopResult(NamedTuple):
    """A loop's results.

    Attributes:
        emitted: the emitted values, laid out as the sequences of the inputs.
        last: the states after the step of each row that runs last.
        received: for each state what every step received, laid out likewise; made when it is asked for.
        totals: the sums over all rows and steps.
    """

    emitted: Sequence[Tensor]
    last: Sequence[Tensor]
    received: Callable[[int], Tensor]
    totals: Sequence[Tensor] = ()


class LoopRunner(Protocol):
    """What an engine does: it runs a loop over a segment, and it may compute products of large matrices."""

    def affine(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor | None:
        """`x @ y + bias` for `[M, K]`, `[K, N]`, `[N]`; None for those that are left to torch."""
        ...

    def __call__(self, loop: LoopProgram, inputs: LoopInputs, /) -> LoopResult:
        """Run the loop over all steps of the segment."""
        ...
