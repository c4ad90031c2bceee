"""What a walk through time gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unrolled.plan.loops import LoopProgram

__all__ = ["LoopRunner", "Walk", "shifted"]


@dataclass(frozen=True)
class Walk:
    """A loop's results.

    Attributes:
        emitted: the emitted values, `[T, ...]` each.
        last: the states after the last step walked.
        received: for each state what every step received, `[T, ...]`; made when it is asked for.
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

    def __call__(
        self,
        loop: LoopProgram,
        sequences: Sequence[Tensor],
        fixed: Sequence[Tensor],
        states: Sequence[Tensor],
        *,
        steps: int,
        batch: int,
        reverse: bool,
    ) -> Walk:
        """Walk through time.

        Args:
            loop: the program.
            sequences: `[T, ...]` each.
            fixed: what is the same at every step.
            states: what the first step walked receives.
            steps: T.
            batch: B.
            reverse: whether to begin with the last step.
        """
        ...


def shifted(first: Tensor, entries: Tensor, *, reverse: bool) -> Tensor:
    """What each copy receives if it is what the copy before it (after it, in reverse) made."""
    if reverse:
        return torch.cat([entries[1:], first.unsqueeze(0)])
    return torch.cat([first.unsqueeze(0), entries[:-1]])
