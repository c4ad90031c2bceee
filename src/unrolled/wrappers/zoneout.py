"""Zoneout: entries of the state that now and then stay as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.trees import Tree, flatten, leaves, map_leaves, unflatten
from unrolled.wrappers.masks import RowDraws
from unrolled.wrappers.seeded import SeededCell, SeededState


class ZoneoutCell(SeededCell):
    """A cell whose state's entries stay as they were with probability p, at every step anew.

    In evaluation every entry is the expectation, `p * old + (1 - p) * new`. An output that is a leaf of the next
    state itself (an LSTM's h) stays that leaf; so a dropout of outputs goes around this wrapper, not inside of it.
    Leaves that mean something only together (the c, n and m of `SLSTMCell`) are left alone by p = 0.

    The masks are a function of the seed in the state, the row, the time and the entry: a sequence run in windows with
    the state carried, in any engine, has the same ones.

    Args:
        cell: the cell.
        p: the probability of staying, at least 0 and below 1, for all floating leaves of the state; or one for each,
            in order: `p=(0.05, 0.5)` for an LSTM's h and c.

    Raises:
        OptionError: for another p; on the first call if p does not fit the leaves.

    Source: D. Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", ICLR (2017).

    Example:
        >>> import torch, unrolled as ur
        >>> rnn = ur.unroll(ur.ZoneoutCell(ur.LSTMCell(3, 4), p=(0.05, 0.5)))
        >>> outputs, state = rnn(torch.randn(10, 2, 3))
        >>> torch.equal(outputs[-1], state.state[0])
        True
    """

    def __init__(self, cell: nn.Module | Callable[..., Any], p: float | Sequence[float] = 0.1) -> None:
        super().__init__(cell, p)

    def forward(self, input: Tree, state: SeededState, *context: Tree) -> tuple[Tree, SeededState]:
        """Run one step: input and state as the cell's own, the latter in a `SeededState`."""
        output, next_state = self.cell(input, state.state, *context)
        old, (new, structure) = leaves(state.state), flatten(next_state)
        zoned = self._zoned(old, new, state)
        zoned_of = {id(leaf): chosen for leaf, chosen in zip(new, zoned, strict=True)}
        output = map_leaves(lambda leaf: zoned_of.get(id(leaf), leaf), output)
        return output, SeededState(unflatten(structure, zoned), state.seed, state.t + 1)

    def _zoned(self, old: Sequence[Tensor], new: Sequence[Tensor], state: SeededState) -> list[Tensor]:
        """The leaves of the next state, some entries as they were; in evaluation each entry's expectation."""
        probabilities = self.probabilities(old, "state")
        if not self.training:
            return [p * a + (1 - p) * b if p else b for a, b, p in zip(old, new, probabilities, strict=True)]
        masks = RowDraws.at(state.seed, state.t).masks(old, probabilities)
        return [b if mask is None else torch.where(mask, b, a) for a, b, mask in zip(old, new, masks, strict=True)]
