"""Rows of a batch that end one by one: the step of those that have not, and what all of them have in common."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from unrolled.cells.contract import CheckedStep, name_of
from unrolled.errors import CellError, InputError, StateError
from unrolled.trees import Tree, TreeSpec, describe, flatten, leaves, map_leaves, paths


class LiveRows(Protocol):
    """A cell's step for those rows of a batch that have not ended."""

    def step(self, t: int, input: Tree, state: Tree) -> tuple[Tree, Tree]:
        """Run copy t on them."""

    def without_ended(self, going: Tensor, input: Tree, state: Tree) -> LiveRows:
        """The same with fewer rows, given what all of them read last and what they hand on."""


class LeavingRows:
    """Rows are independent: those that have ended are gone."""

    def __init__(self, cell: nn.Module, context: Tree) -> None:
        self.cell, self.context = cell, context
        self.step = CheckedStep(cell, context)

    def without_ended(self, going: Tensor, input: Tree, state: Tree) -> LeavingRows:
        """Without those that have ended, and without their context."""
        return LeavingRows(self.cell, taken(self.context, going))


class StayingRows:
    """Rows may see each other: those that have ended stay, held as they were, so that the others see them still."""

    def __init__(self, cell: nn.Module, context: Tree) -> None:
        self.whole = CheckedStep(cell, context)
        self.held: Tree = None
        self.rows: Tensor | None = None

    def step(self, t: int, input: Tree, state: Tree) -> tuple[Tree, Tree]:
        """Run copy t on all rows; return what those give that have not ended."""
        if self.rows is None:
            return self.whole(t, input, state)
        output, state = self.whole(t, *written(self.held, self.rows, (input, state)))
        return taken(output, self.rows), taken(state, self.rows)

    def without_ended(self, going: Tensor, input: Tree, state: Tree) -> StayingRows:
        """The same, with those that have ended held on what they read last and what they handed on."""
        if self.rows is None:
            self.held, self.rows = (input, state), going
        else:
            self.held, self.rows = written(self.held, self.rows, (input, state)), self.rows[going]
        return self


def taken(tree: Tree, rows: Tensor) -> Tree:
    """Some rows of a tree of `[B, ...]`."""
    return map_leaves(lambda leaf: leaf.index_select(0, rows), tree)


def written(tree: Tree, rows: Tensor, some: Tree) -> Tree:
    """A tree of `[B, ...]` with some of its rows, which may be all of them, written anew."""
    if tree is None or len(rows) == len(leaves(tree)[0]):
        return some
    return map_leaves(lambda leaf, new: leaf.index_copy(0, rows, new), tree, some)


def check_rows(cell: nn.Module, state: Tree, B: int) -> None:
    """Refuse a state that is not made of B rows, of which each can be kept as it was at its end.

    Raises:
        StateError: naming the leaf.
    """
    tensors, structure = flatten(state)
    for path, leaf in zip(paths(structure), tensors, strict=True):
        if leaf.dim() == 0 or len(leaf) != B:
            raise StateError(
                f"with until= every row has a state of its own, but state{path} of {name_of(cell)} is {describe(leaf)} "
                f"for B = {B}; keep it as [B, ...], or generate with max_steps= alone"
            )


def kind_of_outputs(output: Tree, rows: int) -> Kind:
    """What all outputs must be like, given the first.

    Raises:
        CellError: if it is not made of B rows.
    """
    tensors = leaves(output)
    if not tensors or any(leaf.dim() == 0 or len(leaf) != rows for leaf in tensors):
        raise CellError(
            f"a cell that is generated from must give out a pytree of [B, ...] with B = {rows}, as its input is, but "
            f"copy 0 returned {describe(output)}; give every output the rows of the batch"
        )
    return Kind(output)


class Kind:
    """What all inputs, or all outputs, of a generation have in common: structure, dtypes, devices, shapes of a row."""

    def __init__(self, tree: Tree) -> None:
        self.like, self.spec = tree, TreeSpec.of(tree, 1)

    def fits(self, tree: Tree, rows: int) -> bool:
        """Whether a tree of so many rows is of this kind."""
        try:
            return TreeSpec.of(tree, 1) == self.spec and all(leaf.shape[:1] == (rows,) for leaf in leaves(tree))
        except TypeError:
            return False

    def check_output(self, t: int, output: Tree, rows: int) -> None:
        """Refuse another output than the first was.

        Raises:
            CellError: naming the copy.
        """
        if not self.fits(output, rows):
            raise CellError(
                f"a cell's output must keep its structure, shape and dtype: copy 0 returned {describe(self.like)}, "
                f"copy {t}, on {rows} rows, {describe(output)}; return the same kind of output at every step"
            )

    def check_input(self, t: int, input: Tree, rows: int, *, fed: bool) -> None:
        """Refuse another input than the first was, made of output t.

        Raises:
            InputError: saying what was made of it, and by whom.
        """
        if not self.fits(input, rows):
            made = "feed made" if fed else "without feed= the next one is the output"
            raise InputError(
                f"every input must be like the first, {describe(self.like)} (of {rows} rows after step {t}), but "
                f"{made} {_described(input)}; pass feed=(output) -> input that makes one, or another first"
            )


def _described(tree: Tree) -> str:
    try:
        return describe(tree)
    except TypeError as error:
        return f"no pytree of tensors ({error})"
