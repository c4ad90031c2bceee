"""Places: where a step reads a value that it does not own. A place is looked at again at every call, and put back."""

from __future__ import annotations

import types
import weakref
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

MISSING: Any = type("Missing", (), {"__repr__": lambda self: "nothing"})()
"""What stands where there is nothing."""

_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
PLAIN: tuple[Any, ...] = (int, float, complex, str, bytes, type(None), range, slice, type(...), np.generic, *_OF_TORCH)
CONTAINERS: tuple[Any, ...] = (list, dict, set, deque)

Fetch: TypeAlias = Callable[[Any, Any], Any]


@dataclass(frozen=True, eq=False)
class Place:
    """Somewhere outside of a cell that its step can read.

    Attributes:
        fetch: how the value there is found: of an owner, by a name.
        owner: whose place it is.
        name: what it is called there.
        label: what a person would call it.
        first: the value when the place was first seen.
        reader: the module of the code that reads it.
    """

    fetch: Fetch
    owner: Any
    name: Any
    label: str
    first: Any
    reader: str = ""

    def now(self) -> Any:
        """The value that stands there."""
        return self.fetch(self.owner, self.name)

    def anew(self) -> Place:
        """The place as if it was first seen now."""
        return replace(self, first=self.now())

    def put(self, value: Any) -> None:
        """Put a value there, as it was fetched."""
        _PUT[self.fetch](self.owner, self.name, value)


def held_in(mapping: Any, name: Any) -> Any:
    """An entry of a dict: a global, or an attribute of an object that has a `__dict__`."""
    return mapping.get(name, MISSING)


def of_class(owner: type, name: str) -> Any:
    """An entry of a class itself, apart from its bases."""
    return vars(owner).get(name, MISSING)


def names_of_class(owner: type, _: Any) -> Any:
    """All names of a class: one that comes to be there hides that of a base."""
    return tuple(vars(owner))


def named(owner: Any, name: str) -> Any:
    """An attribute that is kept outside of a `__dict__`, in a slot."""
    try:
        return object.__getattribute__(owner, name)
    except AttributeError:
        return MISSING


def definition(function: types.FunctionType, _: Any) -> Any:
    """A function's code, its defaults and what hangs on it."""
    keywords, attributes = function.__kwdefaults__, vars(function)
    return (
        function.__code__,
        function.__defaults__,
        tuple(keywords.items()) if keywords else None,
        tuple(attributes.items()) if attributes else None,
    )


def closed_over(cell: types.CellType, _: Any) -> Any:
    """A variable of a closure."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def content(container: Any, _: Any) -> Any:
    """What a list, dict, set or deque holds, in order."""
    return tuple(container.items()) if isinstance(container, dict) else tuple(container)


def array(values: np.ndarray, _: Any) -> Any:
    """A numpy array's numbers."""
    return (values.dtype.str, values.shape, values.tobytes())


def value_of_variable(variable: ContextVar[Any], _: Any) -> Any:
    """A context variable's value in the context of the call."""
    return variable.get(MISSING)


def referent(reference: weakref.ref[Any], _: Any) -> Any:
    """What a weak reference leads to."""
    return reference()


def type_of(owner: Any, _: Any) -> Any:
    """An object's class."""
    return type(owner)


def kind_of(tensor: Tensor, _: Any) -> Any:
    """What of a tensor a step can ask without reading its numbers."""
    return (tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad, type(tensor))


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
        return len(now) == len(before) and all(map(same, now, before))
    if isinstance(now, np.generic):
        return now.dtype == before.dtype and now.tobytes() == before.tobytes()
    if isinstance(now, types.MethodType):
        return now.__self__ is before.__self__ and now.__func__ is before.__func__
    if isinstance(now, int | float | complex):
        return repr(now) == repr(before)
    return isinstance(now, PLAIN) and bool(now == before)


def _put_entry(mapping: Any, name: Any, value: Any) -> None:
    if value is MISSING:
        mapping.pop(name, None)
    else:
        mapping[name] = value


def _put_attribute(owner: Any, name: str, value: Any) -> None:
    if value is not MISSING:
        setattr(owner, name, value)
    elif hasattr(owner, name):
        delattr(owner, name)


def _put_definition(function: types.FunctionType, _: Any, value: Any) -> None:
    function.__code__, function.__defaults__, keywords, attributes = value
    function.__kwdefaults__ = dict(keywords) if keywords else None
    vars(function).clear()
    vars(function).update(attributes or ())


def _put_closed_over(cell: types.CellType, _: Any, value: Any) -> None:
    if value is MISSING:
        del cell.cell_contents
    else:
        cell.cell_contents = value


def _put_content(container: Any, _: Any, value: Any) -> None:
    if isinstance(container, list):
        container[:] = value
        return
    container.clear()
    container.extend(value) if isinstance(container, deque) else container.update(value)


def _put_array(values: np.ndarray, _: Any, value: Any) -> None:
    kind, shape, numbers = value
    values[...] = np.frombuffer(numbers, dtype=kind).reshape(shape)


def _put_variable(variable: ContextVar[Any], _: Any, value: Any) -> None:
    if value is not MISSING:
        variable.set(value)


def _put_names(owner: type, _: Any, value: Any) -> None:
    for name in set(vars(owner)).difference(value):
        delattr(owner, name)


def _left(owner: Any, name: Any, value: Any) -> None:
    """What follows from other places is put back with them."""


_PUT: dict[Fetch, Callable[[Any, Any, Any], None]] = {
    held_in: _put_entry,
    of_class: _put_attribute,
    names_of_class: _put_names,
    named: _put_attribute,
    definition: _put_definition,
    closed_over: _put_closed_over,
    content: _put_content,
    array: _put_array,
    value_of_variable: _put_variable,
    type_of: lambda owner, _, value: setattr(owner, "__class__", value),
    kind_of: _left,
    referent: _left,
}
