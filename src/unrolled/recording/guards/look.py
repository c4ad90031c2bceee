"""Looks: whether a fingerprint would be the same again, found out without computing it again.

A fingerprint takes a cell apart at every call. A look remembers what was found in it, object by object, and compares
identities: a cell in which every object is the one that it was, and every tensor of the kind that it was, has the same
fingerprint. One that holds what can change without being another object, and is not looked into here, has no look.
"""

from __future__ import annotations

import functools
import operator
import types
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, cast

import numpy as np
from torch import Generator, Tensor, nn

from unrolled.internals import modules_are_patched
from unrolled.recording.guards.environment import Environment
from unrolled.recording.guards.fingerprint import asked_modes, refuse_hooks_on_all
from unrolled.recording.guards.kinds import (
    BOOKKEEPING,
    BY_IDENTITY,
    attributes_of,
    is_comparable,
    is_function_of_torch,
    slots_of,
)
from unrolled.recording.guards.places import CONTAINERS, PLAIN, kind_of

_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_OF_MODULES = "_parameters", "_buffers", "_modules", *_HOOKS
"""What fingerprints read of what modules keep beside their attributes."""

_STEADY: tuple[Any, ...] = (*PLAIN, *BY_IDENTITY, Generator)
"""What a fingerprint has the value or the identity of, and which stays what it is."""

_TAKEN_APART: tuple[Any, ...] = (*CONTAINERS, tuple, frozenset, functools.partial, np.ndarray)
"""What a fingerprint takes apart in its own way: of what is derived from them there is no look."""


class Look:
    """What a cell's fingerprint was made of, to be looked at again.

    Args:
        cell: the cell; as long as there is the look, what it holds now is kept.

    Attributes:
        cell: the cell.
        complete: whether everything can be looked at; if not, the look never stands.
    """

    def __init__(self, cell: nn.Module) -> None:
        self.cell = cell
        self.complete = True
        self._seen: set[int] = set()
        self._empty: list[Mapping[Any, Any]] = []
        self._full: list[tuple[Mapping[Any, Any], list[Any], list[Any]]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._classes: list[tuple[Any, type]] = []
        self._tensors: list[tuple[Tensor, tuple[Any, ...]]] = []
        self._environment = Environment.of(cell)
        self._around = self._what_is_around()
        self._module(cell)

    def stands(self) -> bool:
        """Whether the cell would have the fingerprint that it had.

        Raises:
            UnrecordableError: as `fingerprint` does.
        """
        return self.complete and self._cell_stands() and self._what_is_around() == self._around

    def _cell_stands(self) -> bool:
        if any(self._empty):
            return False
        for held, names, values in self._full:
            if len(held) != len(names) or not all(map(operator.is_, held.values(), values)):
                return False
            if not all(map(operator.is_, held, names)):
                return False
        for listed, entries in self._lists:
            if len(listed) != len(entries) or not all(map(operator.is_, listed, entries)):
                return False
        same_classes = all(type(thing) is kind for thing, kind in self._classes)
        return same_classes and all(kind_of(tensor) == kind for tensor, kind in self._tensors)

    def _what_is_around(self) -> Any:
        refuse_hooks_on_all()
        return self._environment.version(), asked_modes(self._environment), modules_are_patched()

    def _module(self, module: nn.Module) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        self._classes.append((module, type(module)))
        held = vars(module)
        self._mapping(held)
        self._values([value for name, value in held.items() if name not in BOOKKEEPING])
        for inside in [held[name] for name in _OF_MODULES if held.get(name) is not None]:
            if type(inside) in (dict, OrderedDict):
                self._mapping(inside)
                self._values(inside.values())
            else:  # what torch.jit made keeps its modules in a way of its own
                self.complete = False

    def _mapping(self, mapping: Mapping[Any, Any]) -> None:
        if mapping:
            self._full.append((mapping, list(mapping), list(mapping.values())))
        else:
            self._empty.append(mapping)

    def _value(self, value: Any) -> None:
        """Note what of a value can change although it is the same object; as `fingerprint` takes it apart."""
        if isinstance(value, Tensor):
            self._tensors.append((value, kind_of(value)))
        elif isinstance(value, nn.Module):
            self._module(value)
        elif not (isinstance(value, _STEADY) or is_function_of_torch(value) or id(value) in self._seen):
            self._seen.add(id(value))
            self._thing(value)

    def _thing(self, value: Any) -> None:
        """Containers and objects, which may lead back to themselves."""
        if type(value) in (tuple, frozenset):
            self._values(value)
        elif type(value) is list:
            self._lists.append((value, list(value)))
            self._values(value)
        elif type(value) is dict:
            self._mapping(value)
            self._values(value)
            self._values(value.values())
        elif isinstance(value, types.MethodType):
            self._value(value.__self__)
        elif is_comparable(value):  # of others a fingerprint has the identity
            self._object(value)

    def _object(self, value: Any) -> None:
        attributes, kind = attributes_of(value), cast(Hashable, type(value))
        if attributes is None or isinstance(value, _TAKEN_APART) or slots_of(kind):
            self.complete = False
            return
        self._classes.append((value, type(value)))
        self._mapping(attributes)
        self._values(attributes.values())

    def _values(self, values: Iterable[Any]) -> None:
        for value in values:
            self._value(value)
