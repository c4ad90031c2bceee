"""Places: where a step reads a value outside of its cell.

A place is looked at again at every call, to see whether a plan still holds, and is put back after a step was tried out.
"""

from __future__ import annotations

import operator
import types
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MISSING: Any = type("Missing", (), {"__repr__": lambda self: "nothing"})()
"""What stands where there is nothing."""

_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
PLAIN: tuple[Any, ...] = (int, float, complex, str, bytes, type(None), range, slice, type(...), np.generic, *_OF_TORCH)
CONTAINERS: tuple[Any, ...] = (list, dict, set, deque)


@dataclass(eq=False)
class Place:
    """Somewhere outside of a cell that its step can read; its class says how it is read and put back.

    Attributes:
        owner: whose place it is.
        name: what it is called there.
        label: what a person would call it.
        reader: the module of the code that reads it.
        first: the value when the place was first seen.
    """

    owner: Any
    name: Any
    label: str
    reader: str = ""

    def __post_init__(self) -> None:
        self.first = self.now()

    def now(self) -> Any:
        """The value that stands there."""
        raise NotImplementedError

    def put(self, value: Any) -> None:
        """Put a value there, as `now` returned it. What follows from other places is put back with them."""

    def anew(self) -> Place:
        """The place as if it was first seen now."""
        return type(self)(self.owner, self.name, self.label, self.reader)

    def changed(self) -> bool:
        """Whether another value stands there than at first."""
        return not same(self.now(), self.first)


class Entry(Place):
    """An entry of a dict: a global, or an attribute of an object that has a `__dict__`."""

    def now(self) -> Any:
        return self.owner.get(self.name, MISSING)

    def put(self, value: Any) -> None:
        if value is MISSING:
            self.owner.pop(self.name, None)
        else:
            self.owner[self.name] = value


class Slot(Place):
    """An attribute that is kept outside of a `__dict__`."""

    def now(self) -> Any:
        try:
            return object.__getattribute__(self.owner, self.name)
        except AttributeError:
            return MISSING

    def put(self, value: Any) -> None:
        if value is not MISSING:
            setattr(self.owner, self.name, value)
        elif hasattr(self.owner, self.name):
            delattr(self.owner, self.name)


class ClassEntry(Slot):
    """An entry of a class itself, whatever its bases have."""

    def now(self) -> Any:
        return vars(self.owner).get(self.name, MISSING)


class ClassNames(Place):
    """All names of a class: one that comes to be there hides that of a base."""

    def now(self) -> Any:
        return tuple(vars(self.owner))

    def put(self, value: Any) -> None:
        for name in set(vars(self.owner)).difference(value):
            delattr(self.owner, name)


class ClassOf(Place):
    """An object's class."""

    def now(self) -> Any:
        return type(self.owner)

    def put(self, value: Any) -> None:
        self.owner.__class__ = value


class Definition(Place):
    """A function's code, its defaults and its attributes."""

    def now(self) -> Any:
        function: types.FunctionType = self.owner
        keywords, attributes = function.__kwdefaults__, vars(function)
        return (
            function.__code__,
            function.__defaults__,
            tuple(keywords.items()) if keywords else None,
            tuple(attributes.items()) if attributes else None,
        )

    def put(self, value: Any) -> None:
        self.owner.__code__, self.owner.__defaults__, keywords, attributes = value
        self.owner.__kwdefaults__ = dict(keywords) if keywords else None
        vars(self.owner).clear()
        vars(self.owner).update(attributes or ())


class ClosureVariable(Place):
    """A variable of a closure."""

    def now(self) -> Any:
        try:
            return self.owner.cell_contents
        except ValueError:
            return MISSING

    def put(self, value: Any) -> None:
        if value is MISSING:
            del self.owner.cell_contents
        else:
            self.owner.cell_contents = value


class Content(Place):
    """What a list, dict, set or deque holds, in order."""

    def now(self) -> Any:
        return tuple(self.owner.items()) if isinstance(self.owner, dict) else tuple(self.owner)

    def put(self, value: Any) -> None:
        if isinstance(self.owner, list):
            self.owner[:] = value
            return
        self.owner.clear()
        self.owner.extend(value) if isinstance(self.owner, deque) else self.owner.update(value)


class ArrayContent(Place):
    """A numpy array's numbers."""

    def now(self) -> Any:
        return (self.owner.dtype.str, self.owner.shape, self.owner.tobytes())

    def put(self, value: Any) -> None:
        dtype, shape, numbers = value
        self.owner[...] = np.frombuffer(numbers, dtype=dtype).reshape(shape)


class ContextValue(Place):
    """A context variable's value in the context of the call."""

    def now(self) -> Any:
        return self.owner.get(MISSING)

    def put(self, value: Any) -> None:
        if value is not MISSING:
            self.owner.set(value)


class Referent(Place):
    """What a weak reference leads to."""

    def now(self) -> Any:
        return self.owner()


class KindOfTensor(Place):
    """What of a tensor a step can ask without reading its numbers."""

    def now(self) -> Any:
        return kind_of(self.owner)


def kind_of(tensor: Tensor) -> tuple[Any, ...]:
    """What of a tensor a recording depends on, as plain values; how it lies in memory says which draw goes where."""
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return tuple(tensor.shape), strides, tensor.dtype, tensor.device, tensor.requires_grad, type(tensor)


def is_small(values: np.ndarray | np.generic) -> bool:
    """Whether an array holds numbers only, and so few that they can be compared at every call."""
    return values.nbytes <= 4096 and not values.dtype.hasobject


def same(now: Any, before: Any) -> bool:
    """Whether a value is what it was: the same object, or a plain value of the same type and digits.

    Example:
        >>> same(1.0, 1.0), same(1, True), same(0.0, -0.0), same((1, "a"), (1, "a")), same([], [])
        (True, False, False, True, False)
    """
    if now is before:
        return True
    if type(now) is not type(before):
        return False
    if isinstance(now, tuple):
        alike = len(now) == len(before)
        return alike and (all(map(operator.is_, now, before)) or all(map(same, now, before)))
    if isinstance(now, np.generic):
        return now.dtype == before.dtype and now.tobytes() == before.tobytes()
    if isinstance(now, types.MethodType):
        return now.__self__ is before.__self__ and now.__func__ is before.__func__
    if isinstance(now, int | float | complex):
        return repr(now) == repr(before)
    return isinstance(now, PLAIN) and bool(now == before)
