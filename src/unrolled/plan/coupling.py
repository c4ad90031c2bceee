"""Whether a step couples the rows of its batch: tried, where nothing can be proved."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unrolled.trees import Tree, leaves, map_leaves

__all__ = ["couples_rows"]


def couples_rows(cell: nn.Module, input: Tree, state: Tree, context: Tree) -> bool:
    """Whether the first rows of a step's results move when its last row is another.

    Args:
        cell: the cell; it may be changed by the call.
        input: `[B, ...]`.
        state: `[B, ...]`.
        context: `[B, ...]`, or None.
    """
    given = (input, state) if context is None else (input, state, context)
    if len(leaves(given)[0]) < 2:
        return False
    # The same random numbers both times, for all rows: a dropout inside of a step couples nothing.
    with torch.no_grad():
        results = []
        for other in (False, True):
            with torch.random.fork_rng():
                tried = map_leaves(
                    lambda x, other=other: _with_another_last_row(x) if other else x.detach().clone(), given
                )
                results.append(leaves(cell(*tried)))
    return any(_apart(a, b) for a, b in zip(*results, strict=True))


def _with_another_last_row(tensor: Tensor) -> Tensor:
    changed = tensor.detach().clone()
    row = changed[-1]
    changed[-1] = changed[0] if torch.equal(row, row) and not torch.equal(row, changed[0]) else _moved(row)
    return changed


def _moved(row: Tensor) -> Tensor:
    """Another row of the same kind. An integer may be an index, so that 0 is what is safe."""
    return row.nan_to_num() * 1.25 + 0.25 if row.is_floating_point() else torch.zeros_like(row)


def _apart(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dim() == 0:
        return True
    a, b = a[:-1], b[:-1]
    if not a.is_floating_point():
        return not torch.equal(a, b)
    bound = torch.finfo(a.dtype).eps ** 0.75 * float(a.abs().nan_to_num().max())
    return not torch.allclose(a, b, rtol=0.0, atol=bound, equal_nan=True)
