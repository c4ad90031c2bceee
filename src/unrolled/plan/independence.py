"""Whether what a cell makes of a row of the batch depends on the other rows: proved on a recording, or tried out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from unrolled.plan.rows import find_rows, rows_in_front
from unrolled.recording.events import UnrecordableError
from unrolled.recording.guards.environment import Environment
from unrolled.recording.guards.fingerprint import fingerprint
from unrolled.recording.guards.scratch import record_cell
from unrolled.recording.guards.twin import watch_step
from unrolled.recording.record import arguments_of, samples_of, why_not_recorded
from unrolled.trees import Tree, TreeSpec, leaves, map_leaves
from unrolled.unseen import OwnDraws, silent, unseen

_proofs: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()


def rows_are_independent(cell: nn.Module, input: Tree, state: Tree, context: Tree = None) -> bool:
    """Whether it is proved, on a recording of the step, that rows may come and go without the others noticing.

    Args:
        cell: the cell.
        input: of one copy, `[B, ...]`.
        state: what it receives, `[B, ...]`.
        context: what is the same at every step, `[B, ...]`, or None.

    Returns:
        False also where nothing can be recorded, hence nothing proved.

    Example:
        >>> import torch, unrolled as ur
        >>> rows_are_independent(ur.GRUCell(3, 4), torch.ones(2, 3), torch.ones(2, 4))
        True
        >>> rows_are_independent(ur.as_cell(lambda x, s: (x, s - s.mean(0))), torch.ones(2, 3), torch.ones(2, 4))
        False
    """
    if why_not_recorded([*leaves((input, state, context)), *cell.parameters(), *cell.buffers()]) is not None:
        return False
    try:
        spec = TreeSpec.of((input, state, context), 1)
        if _proofs.get(cell, (None, False))[0] != (fingerprint(cell), spec):
            proved = _is_proved(cell, input, state, context)
            _proofs[cell] = ((fingerprint(cell), spec), proved)
    except UnrecordableError:
        return False
    return _proofs[cell][1]


def _is_proved(cell: nn.Module, input: Tree, state: Tree, context: Tree) -> bool:
    """Whether all that a step returns has its rows where the input has them, in front, and no operation mixes them."""
    try:
        with unseen():
            watch_step(cell, input, state, context)
        samples = samples_of((input, state, context), len(leaves(input)[0]))
        with unseen(), Environment.of(cell).kept():
            recording = record_cell(cell, samples)
            program = recording.program
            rows, coupled = find_rows(program, rows_in_front(program))
            # Which numbers a row draws depends on how many rows there are; what a step asks may be about all rows.
            alone = not coupled and not recording.asked and not any(op.draws for op in program.ops)
            return alone and all(rows.get(value) == 0 for value in program.outputs)
    except Exception:  # a step that fails with other rows than it was given depends on them
        return False


def couples_rows(
    cell: nn.Module, input: Tree, state: Tree, context: Tree, put_back: Callable[[], object] = lambda: None
) -> bool:
    """Whether a row of a step's results changes when the other rows are changed, or is no row of its own.

    This is tried out, for cells of which nothing can be proved.

    Args:
        cell: the cell; it may be changed by the call.
        input: `[B, ...]`.
        state: `[B, ...]`.
        context: `[B, ...]`, or None.
        put_back: called after each trial, so that the next one finds the same around the cell.
    """

    def results_of(arguments: Tree) -> list[Tensor]:
        # The same random numbers every time, for all rows: a dropout inside of a step couples nothing.
        try:
            with silent(), torch.no_grad(), OwnDraws():
                return [x.detach() for x in leaves(cell(*arguments))]
        finally:
            put_back()

    arguments = arguments_of(input, state, context)
    rows = len(leaves(arguments)[0])
    before = results_of(map_leaves(lambda x: x.detach().clone(), arguments))
    if any(x.dim() == 0 or len(x) != rows for x in before):
        return True
    for row in {0, rows - 1} if rows > 1 else ():
        for change in (_near, _far):
            try:
                after = results_of(map_leaves(lambda x, row=row, to=change: _all_rows_but(row, x, to), arguments))
            except Exception:  # integers that index something, or a check that raises: the change says nothing
                continue
            if any(_differs(a[row], b[row]) for a, b in zip(before, after, strict=True)):
                return True
    return False


def _near(x: Tensor) -> Tensor:
    """Other numbers of about the same size, and the integers of other rows, which are safe where they are indices."""
    return x.nan_to_num() * 1.25 + 0.25 if x.is_floating_point() else x.roll(1, 0)


def _far(x: Tensor) -> Tensor:
    """Larger numbers; other integers."""
    if x.is_floating_point():
        return 3 - x.nan_to_num() * 4
    return ~x if x.dtype == torch.bool else x + 1


def _all_rows_but(row: int, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor in which all rows but one are changed."""
    changed = change(tensor.detach()).clone()
    changed[row] = tensor[row].detach()
    return changed


def _differs(a: Tensor, b: Tensor) -> bool:
    """Whether two results are further apart than rounding explains."""
    if a.shape != b.shape:
        return True
    if not a.is_floating_point():
        return not torch.equal(a, b)
    bound = torch.finfo(a.dtype).eps ** 0.75 * max(float(a.abs().nan_to_num().max()) if a.numel() else 0.0, 1.0)
    return not torch.allclose(a, b, rtol=0.0, atol=bound, equal_nan=True)
