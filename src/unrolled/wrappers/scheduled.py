"""Scheduled sampling: in training a cell now and then reads its own last output instead of the given input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unrolled.errors import InputError, OptionError
from unrolled.sequence import rows_where
from unrolled.trees import Tree, describe, flatten, map_leaves
from unrolled.wrappers.masks import RowDraws
from unrolled.wrappers.seeded import SeededCell, SeededState


class FedState(NamedTuple):
    """The state of a cell, and the input that its last output makes; in a `SeededState`.

    Attributes:
        state: the cell's own.
        fed: `feed(output)` of the copy before, a pytree of `[B, ...]`; zeros, which are not read, before copy 0.

    Example:
        >>> import torch, unrolled as ur
        >>> cell = ur.ScheduledSampling(ur.GRUCell(3, 3), lambda output: output, p=0.1, first=torch.zeros(3))
        >>> cell.initial_state(2).state.fed.shape
        torch.Size([2, 3])
    """

    state: Tree
    fed: Tree


class ScheduledSampling(SeededCell):
    """A cell that in training reads, with probability p, what its last output makes instead of the given input.

    Each row at each step decides for itself; copy 0, which has no output before it, reads what is given. In evaluation
    every copy does (teacher forcing), and `generate` runs the cell without any given inputs. What is read instead is a
    function of the seed in the state, the row and the time: a sequence run in windows with the state carried, in any
    engine, reads the same. Gradients flow back through `feed` unless it detaches or picks integers.

    Args:
        cell: the cell.
        feed: `(output) -> input`, as in `generate`, row by row.
        p: the probability of reading the own output, from 0 to 1. Assign another one to follow a schedule.
        first: what the input of one row is like, without a batch: a tensor (or pytree) such as the start token. Its
            numbers are not read.

    Raises:
        OptionError: for another p (one assigned later: on the call), a `feed` that cannot be called, or a `first` that
            is no pytree of tensors.
        InputError: on the call, if the inputs are not like `first`.

    Source: S. Bengio et al., "Scheduled sampling for sequence prediction with recurrent neural networks", NIPS (2015).

    Example:
        >>> import torch, unrolled as ur
        >>> cell = ur.ScheduledSampling(ur.GRUCell(4, 4), feed=torch.tanh, p=0.25, first=torch.zeros(4))
        >>> outputs, state = ur.unroll(cell)(torch.randn(10, 2, 4))
        >>> torch.allclose(state.state.fed, outputs[-1].tanh())
        True
        >>> cell.p = 0.5
    """

    def __init__(
        self, cell: nn.Module | Callable[..., Any], feed: Callable[[Tree], Tree], p: float, *, first: Tree
    ) -> None:
        super().__init__(cell, 0.0)
        if not callable(feed):
            raise OptionError(f"feed must be a function (output) -> input, got a {type(feed).__name__}")
        self.feed = feed
        try:
            self.first = map_leaves(torch.zeros_like, first)
        except TypeError as error:
            raise OptionError(f"first must be a pytree of tensors: {error}; use torch.as_tensor") from error
        self.p = _probability(p)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SeededState:
        """The cell's own with nothing fed yet, seeds `[B]`, and t = 0."""
        state, seed, t = super().initial_state(batch_size, device=device, dtype=dtype)

        def nothing(like: Tensor) -> Tensor:
            kind = dtype if dtype is not None and like.is_floating_point() else like.dtype
            return torch.zeros((batch_size, *like.shape), dtype=kind, device=seed.device)

        return SeededState(FedState(state, map_leaves(nothing, self.first)), seed, t)

    def forward(self, input: Tree, state: SeededState, *context: Tree) -> tuple[Tree, SeededState]:
        """Run one step: input and output as the cell's own."""
        (received, fed), seed, t = state
        self._check_input(input, fed)
        if self.training:
            reads_own = ~RowDraws.at(seed, t).kept(_probability(self.p), ()) & (t > 0)
            input = rows_where(reads_own, fed, input)
        output, next_state = self.cell(input, received, *context)
        return output, SeededState(FedState(next_state, self.feed(output)), seed, t + 1)

    def _check_input(self, input: Tree, fed: Tree) -> None:
        (tensors, structure), (wanted, other) = flatten(input), flatten(fed)
        alike = [a.shape == b.shape and a.dtype == b.dtype for a, b in zip(tensors, wanted, strict=False)]
        if structure != other or not all(alike):
            raise InputError(
                f"an input must be like first=, which for these rows is {describe(fed)}, got {describe(input)}; give "
                "ScheduledSampling(first=) the input of one row, without a batch"
            )


def _probability(p: Any) -> float:
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise OptionError(f"p must be a number from 0 to 1, got {p!r}; 0 always reads what is given")
    return float(p)
