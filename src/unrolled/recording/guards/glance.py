"""Glances: whether places have the values that they had, asked at every call and so in as few calls as Python needs.

Most places are entries of dicts, many of the same one: each dict is read once, for all of its names.
"""

from __future__ import annotations

import operator
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

from unrolled.recording.guards.places import (
    MISSING,
    ClassEntry,
    ClassNames,
    Content,
    Definition,
    Entry,
    Place,
    same,
)

_TRUE_IF_FILLED = (list, dict, set, deque, OrderedDict)  # not what a user derives from them


class Glance:
    """Places and the values that were found there.

    Args:
        found: each place with its value.
    """

    def __init__(self, found: Iterable[tuple[Place, Any]] = ()) -> None:
        self._dicts: list[tuple[Callable[[Any], Any], Mapping[Any, Any], Any]] = []
        self._without: list[tuple[Callable[[Any], bool], list[Any]]] = []
        self._empty: list[Any] = []
        self._names: list[tuple[Mapping[Any, Any], tuple[Any, ...]]] = []
        self._functions: list[tuple[FunctionType, Any, Any]] = []
        self._others: list[tuple[Callable[[], Any], Any]] = []
        entries: dict[int, tuple[Mapping[Any, Any], dict[Any, Any]]] = {}
        for place, value in found:
            if isinstance(place, Entry) and type(place.owner) is dict:
                entries.setdefault(id(place.owner), (place.owner, {}))[1][place.name] = value
            elif isinstance(place, ClassEntry):
                entries.setdefault(id(place.owner), (vars(place.owner), {}))[1][place.name] = value
            else:
                self._add(place, value)
        for held, values in entries.values():
            self._add_entries(held, values)

    def stands(self) -> bool:
        """Whether every place has the value that it had."""
        if any(self._empty):
            return False
        for read, held, values in self._dicts:
            try:
                now = read(held)
            except KeyError:
                return False
            if not all(map(operator.is_, now, values)) and not all(map(same, now, values)):
                return False
        for holds, absent in self._without:
            if any(map(holds, absent)):
                return False
        for held, names in self._names:
            if tuple(held) != names:
                return False
        for function, code, defaults in self._functions:
            if function.__code__ is not code or function.__defaults__ is not defaults:
                return False
            if function.__kwdefaults__ or function.__dict__:
                return False
        for fetch, value in self._others:
            now = fetch()
            if now is not value and not same(now, value):
                return False
        return True

    def _add(self, place: Place, value: Any) -> None:
        if isinstance(place, Content) and value == () and type(place.owner) in _TRUE_IF_FILLED:
            self._empty.append(place.owner)
        elif isinstance(place, ClassNames) and all(type(name) is str for name in value):
            self._names.append((vars(place.owner), value))
        elif isinstance(place, Definition) and value[2:] == (None, None):
            self._functions.append((place.owner, *value[:2]))
        else:
            self._others.append((place.now, value))

    def _add_entries(self, held: Mapping[Any, Any], values: Mapping[Any, Any]) -> None:
        there = [name for name, value in values.items() if value is not MISSING]
        missing = [name for name, value in values.items() if value is MISSING]
        if missing:
            self._without.append((held.__contains__, missing))
        if there:
            names = [there[0], *there]  # one name alone would be read as its value, and not as a tuple
            self._dicts.append((operator.itemgetter(*names), held, tuple([values[name] for name in names])))
