"""What wrappers that draw masks share: the probabilities, and a state that knows the seed and the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unrolled.cells.contract import name_of
from unrolled.errors import OptionError
from unrolled.trees import Tree, leaves
from unrolled.wrappers.base import CellWrapper
from unrolled.wrappers.masks import draw_seeds


class SeededState(NamedTuple):
    """The state of a wrapper that draws masks.

    Attributes:
        state: the wrapped cell's own.
        seed: one integer for each row, `[B]`; every copy passes it on.
        t: the number of the copy, `[B]`; every copy adds one.

    Example:
        >>> import unrolled as ur
        >>> ur.ZoneoutCell(ur.GRUCell(3, 4), p=0.1).initial_state(2).t
        tensor([0, 0])
    """

    state: Tree
    seed: Tensor
    t: Tensor


class SeededCell(CellWrapper):
    """A cell around a cell, with masks that are a function of the seed, the row, the time and the entry.

    Args:
        cell: a cell, or anything `as_cell` makes one of without further arguments.
        p: a probability, at least 0 and below 1, or one for each floating leaf, in order.

    Raises:
        OptionError: for a p that is no such thing.
    """

    def __init__(self, cell: nn.Module | Callable[..., Any], p: float | Sequence[float]) -> None:
        super().__init__(cell)
        self.p = tuple(map(_checked_probability, p)) if isinstance(p, tuple | list) else _checked_probability(p)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SeededState:
        """The cell's own, seeds `[B]`, and t = 0.

        In training the seeds are drawn from torch's default generator; in evaluation nothing is drawn, and the seeds
        are the numbers of the rows.
        """
        state = super().initial_state(batch_size, device=device, dtype=dtype)
        seed = draw_seeds(batch_size) if self.training else torch.arange(batch_size, device="cpu")
        seed = seed.to(device=next((leaf.device for leaf in leaves(state)), device))
        return SeededState(state, seed, torch.zeros_like(seed))

    def probabilities(self, tensors: Sequence[Tensor], what: str) -> list[float]:
        """One probability for each leaf, 0 for those that do not hold floating numbers.

        Raises:
            OptionError: if there is not one p for each floating leaf.
        """
        floating = [tensor.is_floating_point() for tensor in tensors]
        probabilities = list(self.p) if isinstance(self.p, tuple) else [self.p] * sum(floating)
        if len(probabilities) != sum(floating):
            raise OptionError(
                f"p must be one number, or one for each floating leaf of the {what}: that of {name_of(self.cell)} has "
                f"{sum(floating)}, got p={self.p}"
            )
        if self.p and not probabilities:
            raise OptionError(
                f"the {what} of {name_of(self.cell)} holds no floating numbers that p={self.p} could be for; wrap "
                "what computes with floats: a cell with its embedding outside, or another part of the step"
            )
        by_leaf = iter(probabilities)
        return [next(by_leaf) if floats else 0.0 for floats in floating]

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self.p}"


def _checked_probability(p: Any) -> float:
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
        raise OptionError(f"p must be a number from 0 up to, but not including, 1, got {p!r}; 0 drops nothing")
    return float(p)
