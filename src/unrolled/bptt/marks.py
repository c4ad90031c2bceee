"""By what a state is known again that has not been kept."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from unrolled.trees import Tree, leaves

__all__ = ["Mark", "Marker", "same"]

Mark: TypeAlias = list[list[float]]
"""For each leaf a sum with alternating signs, and the norm."""

_ROUNDING = 1e-3
"""How far the sum of the same state may move, in norms; that of another state moves by about one."""


class Marker:
    """Makes marks of states of one kind; a mark takes two passes over a state, and 16 bytes for each leaf."""

    def __init__(self) -> None:
        self._signs: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    @torch.no_grad()
    def __call__(self, state: Tree) -> Mark:
        """The mark of a state.

        Example:
            >>> mark = Marker()
            >>> mark(torch.tensor([3.0, 4.0]))
            [[-1.0, 5.0]]
        """
        flat = [(torch.view_as_real(leaf) if leaf.is_complex() else leaf).flatten() for leaf in leaves(state)]
        numbers = [x if x.dtype in (torch.float32, torch.float64) else x.double() for x in flat]
        found = [y for x in numbers for y in (torch.dot(x, self._alternating(x)), torch.linalg.vector_norm(x))]
        both = torch.stack([x.double() for x in found]).tolist() if found else []
        return [both[n : n + 2] for n in range(0, len(both), 2)]

    def _alternating(self, like: Tensor) -> Tensor:
        key = like.numel(), like.dtype, like.device
        if key not in self._signs:
            signs = torch.ones_like(like)
            signs[1::2] = -1
            self._signs[key] = signs
        return self._signs[key]


def same(mark: Mark, before: Mark) -> bool:
    """Whether two marks are of one state, but for rounding."""
    pairs = [
        pair for now, then in zip(mark, before, strict=True) for pair in zip(now, then, (then[1],) * 2, strict=True)
    ]
    return all(a == b or abs(a - b) <= _ROUNDING * norm or (math.isnan(a) and math.isnan(b)) for a, b, norm in pairs)
