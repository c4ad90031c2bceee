"""Whether a step couples the rows of its batch: tried, where nothing can be proved."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from unrolled.trees import Tree, leaves, map_leaves
from unrolled.unseen import OwnDraws, silent


def couples_rows(
    cell: nn.Module, input: Tree, state: Tree, context: Tree, put_back: Callable[[], object] = lambda: None
) -> bool:
    """Whether a row of a step's results moves when the others are changed, or is no row of its own.

    Args:
        cell: the cell; it may be changed by the call.
        input: `[B, ...]`.
        state: `[B, ...]`.
        context: `[B, ...]`, or None.
        put_back: called after each trial, so that the next one finds the same around the cell.
    """
    given = (input, state) if context is None else (input, state, context)
    rows = len(leaves(given)[0])
    before = _results(cell, map_leaves(lambda x: x.detach().clone(), given), put_back)
    if any(x.dim() == 0 or len(x) != rows for x in before):
        return True
    for row in {0, rows - 1} if rows > 1 else ():
        for change in _CHANGES:
            try:
                changed = map_leaves(lambda x, row=row, change=change: _changed(x, row, change), given)
                after = _results(cell, changed, put_back)
            except (IndexError, RuntimeError):  # integers that index something: the change says nothing
                continue
            if any(_apart(a[row], b[row]) for a, b in zip(before, after, strict=True)):
                return True
    return False


def _results(cell: nn.Module, given: tuple[Tree, ...], put_back: Callable[[], object]) -> list[Tensor]:
    # The same random numbers every time, for all rows: a dropout inside of a step couples nothing.
    try:
        with silent(), torch.no_grad(), OwnDraws():
            return [x.detach() for x in leaves(cell(*given))]
    finally:
        put_back()


def _near(x: Tensor) -> Tensor:
    """Other numbers of about the same size, and the integers of other rows, which are safe where they are indices."""
    return x.nan_to_num() * 1.25 + 0.25 if x.is_floating_point() else x.roll(1, 0)


def _far(x: Tensor) -> Tensor:
    """Larger numbers; other integers."""
    if x.is_floating_point():
        return 3 - x.nan_to_num() * 4
    return ~x if x.dtype == torch.bool else x + 1


_CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (_near, _far)


def _changed(tensor: Tensor, row: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor in which all rows but one are others."""
    changed = change(tensor.detach()).clone()
    changed[row] = tensor[row].detach()
    return changed


def _apart(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return True
    if not a.is_floating_point():
        return not torch.equal(a, b)
    bound = torch.finfo(a.dtype).eps ** 0.75 * max(float(a.abs().nan_to_num().max()) if a.numel() else 0.0, 1.0)
    return not torch.allclose(a, b, rtol=0.0, atol=bound, equal_nan=True)
