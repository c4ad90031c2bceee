"""Scratch: what a step leaves in the attributes of its cell and no later step reads. Proved on recordings.

A step is recorded several times on the same twins: as it finds the cell, as a step of as many rows leaves it, and as
one of more or fewer rows does. If it is the same program each time and leaves the same kinds of things, it always is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.cells.base import shown_path
from unrolled.recording.events import UnrecordableError
from unrolled.recording.externals import External, held_tensors
from unrolled.recording.guards.environment import Environment
from unrolled.recording.guards.fingerprint import contents_of
from unrolled.recording.guards.twin import twin_of
from unrolled.recording.record import Recording, record_step
from unrolled.trees import Tree


class Twin:
    """A twin, and what of its tensors and attributes running it has changed.

    Args:
        cell: the cell that it is made of.

    Attributes:
        module: the twin.
    """

    def __init__(self, cell: nn.Module) -> None:
        self.module = twin_of(cell)
        self._shown = functools.partial(shown_path, cell)
        self._cells = held_tensors(cell)
        self._at_first = held_tensors(self.module)
        self._contents = contents_of(self.module)

    def replaced(self) -> list[External]:
        """Where other tensors stand than at first."""
        now = held_tensors(self.module)
        return [place for place in {**self._at_first, **now} if now.get(place) is not self._at_first.get(place)]

    def overwritten(self) -> list[External]:
        """Where the same tensors stand as at first, with other numbers."""
        pairs = [(place, self._cells[place], x) for place, x in self._at_first.items() if place in self._cells]
        return [place for place, before, now in pairs if not same_numbers(before, now)]

    def left(self) -> list[str]:
        """The attributes in which something else stands than at first, by name."""
        before, now = map(_by_name, (self._contents, contents_of(self.module)))
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return list(dict.fromkeys(map(self._shown, [*(place.name for place in self.replaced()), *changed])))

    def refuse_overwritten(self) -> None:
        """Refuse a step that has written into a tensor of the cell: in its place the next one would find other numbers.

        Raises:
            UnrecordableError: naming the tensor.
        """
        for place in self.overwritten():
            raise UnrecordableError(f"its step changes the numbers of {self._shown(place.name)} in place")


def _by_name(contents: tuple[Any, ...]) -> dict[str, Any]:
    """What a cell holds but for parameters and buffers, by the attributes' paths."""
    return {f"{path}.{name}".lstrip("."): held for path, _, plain, *_ in contents for name, held in plain}


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, of one shape and with NaN in the same entries as numbers like any other."""
    return torch.equal(one.detach().nan_to_num(), other.detach().nan_to_num())


def record_cell(cell: nn.Module, samples: Sequence[tuple[Tree, Tree, Tree]]) -> Recording:
    """Record one step of a cell, on twins of it.

    Args:
        cell: the cell.
        samples: what to run it on, from `samples_of`.

    Raises:
        UnrecordableError: if the step cannot be written down as a list of operations, or depends on what a step before
            it has left.
    """
    twins, outside = [Twin(cell) for _ in samples], Environment.of(cell).tensors()

    def recorded(turn: Sequence[Twin]) -> Recording:
        return record_step([twin.module for twin in turn], samples, outside)

    first = recorded(twins)
    left = list(dict.fromkeys(name for twin in twins for name in twin.left()))
    if left:
        contents = [contents_of(twin.module) for twin in twins]
        for turn in (twins, twins[::-1], twins):
            _refuse_other(first, recorded(turn), left, cell)
            if turn is twins and [contents_of(twin.module) for twin in twins] != contents:
                raise UnrecordableError(f"every step leaves something else in {left[0]} for the next one")
    for twin in twins:
        twin.refuse_overwritten()
    return first


def _refuse_other(first: Recording, later: Recording, left: Sequence[str], cell: nn.Module) -> None:
    if later == first:
        return
    made = [one for one in later.externals if one not in first.externals and isinstance(one, External)]
    if made:
        raise UnrecordableError(
            f"its first step makes {shown_path(cell, made[0].name)}, and later ones read it; make it in __init__"
        )
    raise UnrecordableError(f"what its step does depends on {left[0]}, which the step before it left")
