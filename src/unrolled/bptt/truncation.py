"""How far gradients flow back, and how often losses are taken: the two numbers of truncated BPTT."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from unrolled.errors import OptionError


@dataclass(frozen=True)
class LossBlock:
    """Copies whose losses are taken together, counted in the order in which they run.

    Attributes:
        begin: the first of them.
        end: one past the last of them.
        cut: the copy whose received state their gradient stops at; 0 for the initial state, which gets it.
    """

    begin: int
    end: int
    cut: int


@dataclass(frozen=True)
class Truncation:
    """BPTT(k2, k1): at every k1-th step the losses of the last k1 steps flow back through k2 copies.

    Attributes:
        horizon: k2, copies that a gradient flows back through.
        stride: k1, steps whose losses are taken together, at most k2.

    Example:
        >>> Truncation(horizon=3, stride=2).blocks(5)
        [LossBlock(begin=0, end=2, cut=0), LossBlock(begin=2, end=4, cut=1), LossBlock(begin=4, end=5, cut=2)]
    """

    horizon: int
    stride: int

    def block(self, number: int, steps: int) -> LossBlock:
        """Block 0, 1, 2, ... of so many steps.

        The last one may be short. With overlap it, too, goes back through a whole horizon from its own end; without
        overlap it is cut where it begins, as in the loop that everybody writes.
        """
        begin = number * self.stride
        end = min(begin + self.stride, steps)
        return LossBlock(begin, end, begin if self.stride == self.horizon else max(end - self.horizon, 0))

    def blocks(self, steps: int) -> list[LossBlock]:
        """All blocks of a sequence of so many steps."""
        return [self.block(number, steps) for number in range(-(-steps // self.stride))]


def truncation_of(horizon: Any, stride: Any) -> Truncation | None:
    """The options of truncated BPTT, checked; None for a gradient through all copies.

    Args:
        horizon: k2 >= 1, or None.
        stride: k1 from 1 to k2; None for k2.

    Raises:
        OptionError: for a stride alone, or numbers that are out of range or no integers.
    """
    if horizon is None:
        if stride is None:
            return None
        raise OptionError(f"stride needs a horizon of at least as many copies, got stride={stride!r} alone; pass both")
    k2 = _integer("horizon", horizon)
    k1 = k2 if stride is None else _integer("stride", stride)
    if k2 < 1:
        raise OptionError(f"horizon must be at least 1 copy, got {k2}; leave it out to go back through all copies")
    if not 1 <= k1 <= k2:
        raise OptionError(
            f"stride must be from 1 to horizon = {k2}, got {k1}; losses of a block of more steps than the horizon "
            "would be cut off from their own copies"
        )
    return Truncation(k2, k1)


def _integer(name: str, number: Any) -> int:
    try:
        if not isinstance(number, bool):
            return operator.index(number)
    except TypeError:
        pass
    raise OptionError(f"{name} must be an integer, a number of copies, got {number!r} of type {type(number).__name__}")
