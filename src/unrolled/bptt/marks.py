"""By what a state is known again that has not been kept, and outputs that were handed out."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch

from unrolled.trees import Tree, leaves

Mark: TypeAlias = list[list[float]]
"""For each leaf a sum with alternating signs, and the norm."""

_ROUNDING = 1e-3
"""How far the sum of the same state may move, in norms; that of another state moves by about one."""


@torch.no_grad()
def mark_of(tree: Tree) -> Mark:
    """The mark of a state, or of anything else; it takes two passes over it, and 16 bytes for each leaf.

    Example:
        >>> mark_of(torch.tensor([3.0, 4.0]))
        [[-1.0, 5.0]]
    """
    flat = [(torch.view_as_real(leaf) if leaf.is_complex() else leaf).flatten() for leaf in leaves(tree)]
    numbers = [x if x.dtype in (torch.float32, torch.float64) else x.double() for x in flat]
    found = [y for x in numbers for y in (x[::2].sum() - x[1::2].sum(), torch.linalg.vector_norm(x))]
    both = torch.stack([x.double() for x in found]).tolist() if found else []
    return [both[n : n + 2] for n in range(0, len(both), 2)]


def same(mark: Mark, before: Mark) -> bool:
    """Whether two marks are of one state, but for rounding."""
    pairs = [
        pair for now, then in zip(mark, before, strict=True) for pair in zip(now, then, (then[1],) * 2, strict=True)
    ]
    return all(a == b or abs(a - b) <= _ROUNDING * norm or (math.isnan(a) and math.isnan(b)) for a, b, norm in pairs)
