"""Dropout over time: what a cell reads or outputs, masked anew at every step or once for a whole sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from unrolled.errors import OptionError
from unrolled.trees import Tree, flatten, unflatten
from unrolled.wrappers.masks import RowDraws
from unrolled.wrappers.seeded import SeededCell, SeededState


class DropoutCell(SeededCell):
    """A cell whose input, output or received state is dropped entry by entry; what is kept is divided by 1 - p.

    One wrapper drops one thing; wrap again to drop another. In evaluation it is the cell itself. The masks are a
    function of the seed in the state, the row, the time and the entry: a sequence run in windows with the state
    carried, in any engine, has the same ones.

    `of="state"` drops what the step reads of its state, not what is carried on. That is for leaves that are only
    multiplied by weights, such as the h of `RNNCell` and `LSTMCell`: there `per="sequence"` is the recurrent dropout
    of Gal and Ghahramani. A leaf that a gate carries on (an LSTM's c, a GRU's h) would be dropped, and scaled, again
    and again: `ZoneoutCell` is for these.

    Args:
        cell: the cell.
        p: the probability of being dropped, at least 0 and below 1; or one for each floating leaf, in order, as a
            state of several leaves needs: `p=(0.25, 0)` drops an LSTM's h alone.
        of: "input", "output" or "state".
        per: "step" for a new mask at every step, "sequence" for one that all copies share.

    Raises:
        OptionError: for another p, `of` or `per`; on the first call if p does not fit the leaves.

    Source: W. Zaremba et al., "Recurrent neural network regularization", arXiv:1409.2329 (2014), per step;
    Y. Gal and Z. Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", NIPS
    (2016), per sequence.

    Example:
        >>> import torch, unrolled as ur
        >>> cell = ur.DropoutCell(ur.LSTMCell(3, 4), p=0.2)
        >>> cell = ur.DropoutCell(cell, p=(0.25, 0), of="state", per="sequence")
        >>> outputs, state = ur.unroll(cell)(torch.randn(10, 2, 3))
        >>> outputs.shape, state.t
        (torch.Size([10, 2, 4]), tensor([10, 10]))
    """

    def __init__(
        self,
        cell: nn.Module | Callable[..., Any],
        p: float | Sequence[float] = 0.5,
        *,
        of: str = "input",
        per: str = "step",
    ) -> None:
        super().__init__(cell, p)
        if of not in ("input", "output", "state"):
            raise OptionError(f"of must be one of 'input', 'output', 'state', got {of!r}")
        if per not in ("step", "sequence"):
            raise OptionError(f"per must be one of 'step', 'sequence', got {per!r}")
        self.of, self.per = of, per

    def forward(self, input: Tree, state: SeededState, *context: Tree) -> tuple[Tree, SeededState]:
        """Run one step: input and state as the cell's own, the latter in a `SeededState`."""
        received = state.state
        if self.of == "input":
            input = self.dropped(input, state)
        if self.of == "state":
            received = self.dropped(received, state)
        output, next_state = self.cell(input, received, *context)
        if self.of == "output":
            output = self.dropped(output, state)
        return output, SeededState(next_state, state.seed, state.t + 1)

    def dropped(self, tree: Tree, state: SeededState) -> Tree:
        """A tree of `[B, ...]` times its mask; the tree itself in evaluation."""
        leaves, structure = flatten(tree)
        probabilities = self._probabilities(leaves)
        if not self.training:
            return tree
        masks = RowDraws.at(state.seed, state.t if self.per == "step" else None).masks(leaves, probabilities)
        # A product, as in torch: NaN stays NaN where it is dropped.
        dropped = [
            leaf if mask is None else leaf * (mask.to(leaf.dtype) / (1 - p))
            for leaf, mask, p in zip(leaves, masks, probabilities, strict=True)
        ]
        return unflatten(structure, dropped)

    def _probabilities(self, leaves: Sequence[Tensor]) -> list[float]:
        floating = sum(leaf.is_floating_point() for leaf in leaves)
        if self.of == "state" and floating > 1 and not isinstance(self.p, tuple):
            raise OptionError(
                f"of='state' takes one p for each of the {floating} floating leaves of the state, in order, got "
                f"p={self.p}; one for the leaf that is only multiplied by weights, and 0 for what gates carry on"
            )
        return self.probabilities(leaves, self.of)

    def extra_repr(self) -> str:
        """The probability, and what is dropped how often."""
        return f"{super().extra_repr()}, of={self.of!r}, per={self.per!r}"
