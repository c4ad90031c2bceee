"""What a walk through time is asked for, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from unrolled.lengths import Extent
from unrolled.plan.loops import LoopProgram


@dataclass(frozen=True)
class LoopInputs:
    """What an engine gets for a walk: values for a loop's inputs, in the order of its program.

    Attributes:
        sequences: `[T, ...]` each; where rows end at different times, all steps' rows one after the other.
        fixed: what is the same at every step.
        states: what each row's first step walked receives.
        extent: how far the segment reaches.
        reverse: whether to begin with the last step.
    """

    sequences: Sequence[Tensor]
    fixed: Sequence[Tensor]
    states: Sequence[Tensor]
    extent: Extent
    reverse: bool

    @property
    def tensors(self) -> list[Tensor]:
        """All inputs, in order."""
        return [*self.sequences, *self.fixed, *self.states]


@dataclass(frozen=True)
class LoopResult:
    """A loop's results.

    Attributes:
        emitted: the emitted values, laid out as a request's sequences.
        last: the states after each row's last step walked.
        received: for each state what every step received, laid out likewise; made when it is asked for.
        totals: the sums over all rows and steps.
    """

    emitted: Sequence[Tensor]
    last: Sequence[Tensor]
    received: Callable[[int], Tensor]
    totals: Sequence[Tensor] = ()


class LoopRunner(Protocol):
    """What an engine is asked for: to run one loop over a segment, and, if it can, products of large matrices."""

    def affine(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor | None:
        """`x @ y + bias` for `[M, K]`, `[K, N]`, `[N]`; None for those that are left to torch."""
        ...

    def __call__(self, loop: LoopProgram, inputs: LoopInputs, /) -> LoopResult:
        """Run the loop over all steps of the segment."""
        ...
