"""Memory: what lies where while a tape runs, and what a write in place makes of it.

A tensor is known by its `Region`. A write is recorded as an operation that returns what is written. What the written
tensor is a view of becomes the result of the view's counterpart, a slice's of `slice_scatter`; whatever else shares
entries with it is outdated, and viewed anew when it is read next.

Autograd may not see a write: with gradients off, or through a detached alias. Then the numbers are new and the gradient
goes on to what was there before. So a place may have two values, one for those tensors there that have a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unrolled.recording.events import Event, Events, RawCustom, RawProgram, UnrecordableError
from unrolled.recording.program import Ref
from unrolled.recording.view_writes import ViewStep, put_back


class Region(NamedTuple):
    """Where a tensor lies in memory, and whether it shows the conjugates or negatives of what lies there."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    conjugate: bool
    negative: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Region:
        """Where a tensor lies."""
        storage, shape = tensor.untyped_storage().data_ptr(), tuple(tensor.shape)
        bits = tensor.is_conj(), tensor.is_neg()
        return cls(storage, tensor.storage_offset(), shape, tensor.stride(), tensor.dtype, *bits)

    @property
    def end(self) -> int:
        """The place behind its last entry in the storage."""
        return self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)) + 1

    def overlaps(self, other: Region) -> bool:
        """Whether it shares entries with another one, which may be a broadcast."""
        if self.storage != other.storage or 0 in self.shape or 0 in other.shape:
            return False
        if self.dtype.itemsize != other.dtype.itemsize:
            return True
        marks = torch.zeros(max(self.end, other.end), dtype=torch.bool)
        marks.as_strided(self.shape, self.strides, self.offset).fill_(True)
        return bool(marks.as_strided(other.shape, other.strides, other.offset).any())


@dataclass(eq=False)
class _Place:
    """What lies in a region now.

    Attributes:
        like: a tensor of the shape that lies there.
        value: the value of tensors with a gradient, and of others while there are none; None if it is outdated.
        plain: that of tensors without one, if it is another; None if it is outdated.
        before: the value whose gradient those with a gradient still have after a write that autograd did not see.
        own: whether the step made what lies there.
        tracked: whether a tensor that lies there was seen to have a gradient. It is not asked later: torch refuses to
            tell of a view that was made with gradients off, once what it shows is written to.
        view: what it shows, and how; None for the first that lay in its memory.
        made: the values that `autograd.Function`s left here, by their edges in autograd's graph.
    """

    like: Tensor
    value: int | None
    plain: int | None = None
    before: int | None = None
    own: bool = True
    tracked: bool = False
    view: tuple[_Place, ViewStep] | None = None
    made: dict[Any, int] = field(default_factory=dict)

    def replace(self, value: int | None = None, *, plain: int | None = None, before: int | None = None) -> None:
        """Other values lie there now, or none that is known."""
        self.value, self.plain, self.before = value, plain, before
        self.made.clear()

    def path(self) -> Iterator[_Place]:
        """It, what it is a view of, and so on to the first that lay there."""
        place: _Place | None = self
        while place is not None:
            yield place
            place = place.view[0] if place.view is not None else None


class Memory:
    """The values of what lies in memory.

    Args:
        events: what operations are noted down in.

    Attributes:
        edges: for each edge of autograd's graph that was read the value that it belongs to.
        in_backward: whether a backward runs, which reads without gradients what it keeps of values that have one.
    """

    def __init__(self, events: Events) -> None:
        self.edges: dict[tuple[Any, int], int] = {}
        self.in_backward = False
        self._events = events
        self._places: dict[Region, _Place] = {}

    def put(self, tensor: Tensor, value: int, *, own: bool) -> None:
        """A value lies where a tensor does, which is no view of another."""
        self._places[Region.of(tensor)] = _Place(tensor, value, own=own)

    def show(self, tensor: Tensor, value: int, source: Region, step: ViewStep, *, carries: bool) -> None:
        """A value is a view of what lies somewhere else.

        Args:
            tensor: where it lies.
            value: the value.
            source: what it shows.
            step: how.
            carries: whether it has the gradient of what it shows.
        """
        place = self._places.get(Region.of(tensor))
        if place is None:
            shown = self._places[source]
            place = _Place(tensor, None, own=shown.own, view=(shown, step))
            self._places[Region.of(tensor)] = place
        if carries:
            place.value = value
        else:
            place.plain = value

    def stands_for(self, like: Tensor, tensor: Tensor) -> None:
        """A tensor is about to lie elsewhere: another one says what shape lay there."""
        self._places[Region.of(tensor)].like = like

    def owns(self, tensor: Tensor) -> bool:
        """Whether the step made what lies where a tensor does."""
        place = self._places.get(Region.of(tensor))
        return place is not None and place.own

    def read(self, tensor: Tensor) -> int | None:
        """The value of a tensor; None if nothing is known of it."""
        place = self._places.get(Region.of(tensor))
        if place is None:
            return None
        edge = _edge_of(tensor)
        if edge is None:
            return self._plain(place)
        place.tracked = True
        value = self._left_by_function(place, edge)
        if value is None:
            value = self._with_gradient(place)
        if edge[0] is not None:
            self.edges.setdefault(edge, value)
        return value

    def _left_by_function(self, place: _Place, edge: tuple[Any, int]) -> int | None:
        """What an `autograd.Function` left in a place, where autograd was off; None if none did."""
        if not isinstance(edge[0], torch.autograd.function.BackwardCFunction):
            return None
        if edge not in self.edges:
            found = place.value if place.plain is None else place.plain
            if found is not None:
                place.made[edge] = found
                place.value = found if place.value is None else place.value
        return place.made.get(edge)

    def _with_gradient(self, place: _Place) -> int:
        """The value of the tensors of a place that have a gradient."""
        if place.value is None:
            if place.before is not None:
                place.value = self._unseen_by_autograd(place.before, self._plain(place), place.like)
            elif place.view is not None:
                source, step = place.view
                place.value = self._viewed(step, self._with_gradient(source), place.like, differentiable=True)
            else:
                place.value = self._plain(place)
        return place.value

    def _plain(self, place: _Place) -> int:
        """The value of the tensors of a place that have no gradient."""
        if place.plain is None and place.value is not None:
            if self.in_backward or not place.tracked:
                return place.value
            place.plain = self._viewed(ViewStep(torch.ops.aten.detach.default, ()), place.value, place.like)
        elif place.plain is None:
            if place.view is None:
                raise UnrecordableError("it writes into memory that tensors share which are no views of each other")
            source, step = place.view
            place.plain = self._viewed(step, self._plain(source), place.like)
        return place.plain

    def _viewed(self, step: ViewStep, value: int, like: Tensor, *, differentiable: bool | None = None) -> int:
        """A view, anew."""
        on = torch.is_grad_enabled() if differentiable is None else differentiable
        results: list[Tensor | None] = [None] * step.many
        results[step.result] = like
        return self._events.note(step.target, (Ref(value), *step.args), results, differentiable=on)[step.result]

    def _unseen_by_autograd(self, before: int, after: int, like: Tensor) -> int:
        """The numbers of one value with the gradient of another."""
        tensors, kept, grad = self._events.tensors, self._events.value(like), self._events.value(like)
        copy = Event(torch.ops.aten.clone.default, (Ref(after),), (), (kept,), differentiable=False)
        forward = RawProgram(tensors, [before, after], [copy], [kept])
        custom = RawCustom("write", forward, RawProgram(tensors, [grad], [], [grad, -1]), [])
        return self._events.note(custom, (Ref(before), Ref(after)), (like,), differentiable=True)[0]

    def write(self, tensor: Tensor, value: int, *, seen: bool) -> None:
        """A value was written where a tensor lies.

        Args:
            tensor: the tensor, before autograd knows of the write.
            value: what lies there now.
            seen: whether the written value has a gradient of its own.

        Raises:
            UnrecordableError: if the tensor is a view that no operation writes through.
        """
        path = list(self._places[Region.of(tensor)].path())
        carries = seen and tensor.requires_grad
        written = [value]
        for part, whole in pairwise(path):
            assert part.view is not None
            numbers = self._with_gradient(whole) if carries else self._plain(whole)
            target, args = put_back(part.view[1], (Ref(numbers), whole.like), (Ref(written[-1]), part.like))
            written += self._events.note(target, args, (whole.like,), differentiable=torch.is_grad_enabled())
        unseen = not seen and any(place.tracked for place in path)
        for place, new in zip(path, written, strict=True):
            if unseen and place.tracked:
                kept = place.before if place.value is None else place.value
                place.replace(plain=new, before=self._with_gradient(place) if kept is None else kept)
            elif unseen and place.view is not None:
                place.replace(plain=new)
            else:
                place.replace(new)
                place.tracked = place.tracked or seen
        self._outdate(Region.of(tensor), path)

    def _outdate(self, written: Region, path: list[_Place]) -> None:
        """Whatever else shares entries with what was written is to be viewed anew."""
        for region, place in self._places.items():
            if place not in path and written.overlaps(region):
                place.replace()


def _edge_of(tensor: Tensor) -> tuple[Any, int] | None:
    """Where a tensor is in autograd's graph; None if it has no gradient."""
    if not tensor.requires_grad:
        return None
    try:
        return tensor.grad_fn, tensor.output_nr
    except RuntimeError:  # a view that was made with gradients off, of what has been written to
        return None
