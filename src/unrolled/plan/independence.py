"""Independent rows: whether what a cell makes of a row depends on which other rows are there."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from unrolled.plan.refusals import why_not_recorded
from unrolled.plan.rows import find_rows, rows_in_front
from unrolled.recording.guards import fingerprint
from unrolled.recording.record import ROWS, Recording, Sample, leaves_and_structure, record_step, sample_rows
from unrolled.recording.tape import UnrecordableError
from unrolled.recording.twin import observe, scratch_of, twin_of
from unrolled.recording.watch import watcher_of
from unrolled.trees import Tree, TreeSpec
from unrolled.unseen import unseen

_known: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()


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
    trees = [leaves_and_structure(tree) for tree in (input, state, context)]
    given = [leaf for leaves, _ in trees for leaf in leaves]
    if why_not_recorded([*given, *cell.parameters(), *cell.buffers()]) is not None:
        return False
    try:
        kinds = tuple([TreeSpec.of(tree, 1) for tree in (input, state, context)])
        if _known.get(cell, (None, False))[0] != (fingerprint(cell), kinds):
            proved = _proved(cell, trees, (input, state, context))
            _known[cell] = ((fingerprint(cell), kinds), proved)
    except UnrecordableError:
        return False
    return _known[cell][1]


def _proved(cell: nn.Module, trees: list[Any], given: tuple[Tree, Tree, Tree]) -> bool:
    try:
        with unseen():
            observe(cell, *given)
        batch_size, twin = len(trees[0][0][0]), twin_of(cell)
        samples = [Sample(*(sample_rows(leaves, batch_size, n) for leaves, _ in trees)) for n in ROWS]
        with unseen(), watcher_of(cell).kept():
            recording = record_step(twin, (samples[0], samples[1]), [structure for _, structure in trees])
            return not scratch_of(cell, twin) and _row_by_row(recording)
    except Exception:  # a step that fails with other rows than it was given depends on them
        return False


def _row_by_row(recording: Recording) -> bool:
    """Whether all that a step gives out and hands on has its rows where those of the input are: in front."""
    program = recording.program
    rows, coupled = find_rows(program, rows_in_front(program))
    return not coupled and all(rows.get(value) == 0 for value in program.outputs)
