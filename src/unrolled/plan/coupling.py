"""Whether a step couples the rows of its batch: tried, where nothing can be proved."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unrolled.trees import Tree, leaves, map_leaves

__all__ = ["couples_rows"]


def couples_rows(cell: nn.Module, input: Tree, state: Tree, context: Tree) -> bool:
    """Whether other rows of a step's results move when its first row, or its last one, is another.

    Args:
        cell: the cell; it may be changed by the call.
        input: `[B, ...]`.
        state: `[B, ...]`.
        context: `[B, ...]`, or None.
    """
    given = (input, state) if context is None else (input, state, context)
    rows = len(leaves(given)[0])
    if rows < 2:
        return False
    before = _results(cell, map_leaves(lambda x: x.detach().clone(), given))
    for row in (0, rows - 1):
        after = _results(cell, map_leaves(lambda x, row=row: _with_another_row(x, row), given))
        if any(_apart(a, b, row) for a, b in zip(before, after, strict=True)):
            return True
    return False


def _results(cell: nn.Module, given: tuple[Tree, ...]) -> list[Tensor]:
    # The same random numbers every time, for all rows: a dropout inside of a step couples nothing.
    with torch.no_grad(), torch.random.fork_rng():
        return leaves(cell(*given))


def _with_another_row(tensor: Tensor, row: int) -> Tensor:
    changed = tensor.detach().clone()
    own, other = changed[row], changed[-1 - row]
    changed[row] = other if torch.equal(own, own) and not torch.equal(own, other) else _moved(own)
    return changed


def _moved(row: Tensor) -> Tensor:
    """Another row of the same kind. An integer may be an index, so that 0 is what is safe."""
    return row.nan_to_num() * 1.25 + 0.25 if row.is_floating_point() else torch.zeros_like(row)


def _apart(a: Tensor, b: Tensor, row: int) -> bool:
    """Whether two results differ in any row but this one."""
    if a.shape != b.shape or a.dim() == 0:
        return True
    a, b = (torch.cat([x[:row], x[row + 1 :]]) for x in (a, b))
    if not a.is_floating_point():
        return not torch.equal(a, b)
    bound = torch.finfo(a.dtype).eps ** 0.75 * float(a.abs().nan_to_num().max())
    return not torch.allclose(a, b, rtol=0.0, atol=bound, equal_nan=True)
