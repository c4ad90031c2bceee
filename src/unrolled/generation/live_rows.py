"""Rows of a batch that end one by one: the step of those that have not, and what all of them have in common."""

from __future__ import annotations

from torch import Tensor, nn

from unrolled.cells.contract import CheckedStep, name_of
from unrolled.errors import CellError, InputError, StateError
from unrolled.trees import Tree, TreeSpec, describe, leaves, map_leaves, named_leaves


class LeavingRows:
    """A cell's step for those rows of a batch that have not ended; these are independent: the others are gone."""

    def __init__(self, cell: nn.Module, context: Tree) -> None:
        self.cell, self.context = cell, context
        self.step = CheckedStep(cell, context)

    def without_ended(self, going: Tensor, input: Tree, state: Tree) -> LeavingRows:
        """Without those that have ended, and without their context."""
        return LeavingRows(self.cell, select_rows(self.context, going))


class StayingRows:
    """A cell's step for rows that may see each other: those that have ended stay as they were, seen by the others."""

    def __init__(self, cell: nn.Module, context: Tree) -> None:
        self.whole = CheckedStep(cell, context)
        self.held: Tree = None
        self.rows: Tensor | None = None

    def step(self, t: int, input: Tree, state: Tree) -> tuple[Tree, Tree]:
        """Run copy t on all rows; return what those give that have not ended."""
        if self.rows is None:
            return self.whole(t, input, state)
        output, state = self.whole(t, *with_rows(self.held, self.rows, (input, state)))
        return select_rows(output, self.rows), select_rows(state, self.rows)

    def without_ended(self, going: Tensor, input: Tree, state: Tree) -> StayingRows:
        """The same, with those that have ended kept on what they read last and what they passed on."""
        if self.rows is None:
            self.held, self.rows = (input, state), going
        else:
            self.held, self.rows = with_rows(self.held, self.rows, (input, state)), self.rows[going]
        return self


def select_rows(tree: Tree, rows: Tensor) -> Tree:
    """Some rows of a tree of `[B, ...]`."""
    return map_leaves(lambda leaf: leaf.index_select(0, rows), tree)


def with_rows(tree: Tree, rows: Tensor, some: Tree) -> Tree:
    """A tree of `[B, ...]` with some of its rows, which may be all of them, replaced."""
    if tree is None or len(rows) == len(leaves(tree)[0]):
        return some
    return map_leaves(lambda leaf, new: leaf.index_copy(0, rows, new), tree, some)


def check_rows(cell: nn.Module, state: Tree, B: int) -> None:
    """Refuse a state that is not made of B rows, of which each can be kept as it was at its end.

    Raises:
        StateError: naming the leaf.
    """
    for name, leaf in named_leaves(state, "state"):
        if leaf.dim() == 0 or len(leaf) != B:
            raise StateError(
                f"with until= every row has a state of its own, but {name} of {name_of(cell)} is {describe(leaf)} "
                f"for B = {B}; keep it as [B, ...], or generate with max_steps= alone"
            )


class RowSpec:
    """What all inputs, or all outputs, of a generation must be: like the first, with a row for each that goes on."""

    def __init__(self, first: Tree) -> None:
        self._first, self._spec = first, TreeSpec.of(first, 1)

    @classmethod
    def of_outputs(cls, output: Tree, rows: int) -> RowSpec:
        """That of the first output.

        Raises:
            CellError: if it is not made of so many rows.
        """
        tensors = leaves(output)
        if not tensors or any(leaf.dim() == 0 or len(leaf) != rows for leaf in tensors):
            raise CellError(
                f"a cell that is generated from must give out a pytree of [B, ...] with B = {rows}, as its input is, "
                f"but copy 0 returned {describe(output)}; give every output the rows of the batch"
            )
        return cls(output)

    def _fits(self, tree: Tree, rows: int) -> bool:
        try:
            return TreeSpec.of(tree, 1) == self._spec and all(leaf.shape[:1] == (rows,) for leaf in leaves(tree))
        except TypeError:
            return False

    def check_output(self, t: int, output: Tree, rows: int) -> None:
        """Refuse another output than the first was.

        Raises:
            CellError: naming the copy.
        """
        if not self._fits(output, rows):
            raise CellError(
                f"a cell's output must keep its structure, shape and dtype: copy 0 returned {describe(self._first)}, "
                f"copy {t}, on {rows} rows, {describe(output)}; return the same kind of output at every step"
            )

    def check_input(self, t: int, input: Tree, rows: int, *, fed: bool) -> None:
        """Refuse another input than the first was, made of output t.

        Raises:
            InputError: saying what was made of it, and by whom.
        """
        if self._fits(input, rows):
            return
        made = "feed made" if fed else "without feed= the next one is the output"
        try:
            found = describe(input)
        except TypeError as error:
            found = f"no pytree of tensors ({error})"
        raise InputError(
            f"every input must be like the first, {describe(self._first)} (of {rows} rows after step {t}), but "
            f"{made} {found}; pass feed=(output) -> input that makes one, or another first"
        )
