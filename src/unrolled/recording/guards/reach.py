"""Reach: what code that runs can read outside of a cell.

It is followed from the globals, closures, classes and arguments of every function that runs, through all attributes and
entries that the function names. Nothing is exempt by where it was written: a helper of another library's, torch's own
Python code and a parametrisation are followed alike. What cannot be looked into makes the reach *open*: a plan then has
a witness at every call.
"""

from __future__ import annotations

import functools
import re
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unrolled.internals import has_memory
from unrolled.recording.events import IrreversibleError
from unrolled.recording.guards import places
from unrolled.recording.guards.generators import GENERATORS
from unrolled.recording.guards.kinds import (
    HIDING,
    INERT,
    attributes_of,
    functions_of,
    is_common,
    is_comparable,
    is_pure,
    is_written_in_python,
    name_in_class,
    slots_of,
)
from unrolled.recording.guards.names import Names, names_in
from unrolled.recording.guards.places import CONTAINERS, MISSING, PLAIN, Place, is_small

_MOST_PLACES, _MOST_ITEMS = 4096, 1024
_NO_NAMES = Names(frozenset(), frozenset(), frozenset(), computed=False)


class Reachable:
    """The places that were found so far.

    Args:
        own: objects that belong to the cell (to the twin of it that is run): their attributes are not
            outside, and are compared in another way.

    Attributes:
        places: each with the value that it had when it was first seen, before the code that names it ran.
        generators: of random numbers.
        modes: functions by which a step asks torch about its modes, by name.
        memory: what tensors outside lie in, by address, and what they are called.
        large: arrays that are too large to be looked at in every call, with what they held.
        open: what cannot be followed; empty if everything can.
        hidden: what of the cell's own cannot be compared.
    """

    def __init__(self, own: Iterable[Any] = ()) -> None:
        self.places: dict[Any, Place] = {}
        self.generators: dict[int, Any] = {}
        self.modes: dict[str, Callable[[], Any]] = {}
        self.memory: dict[int, str] = {}
        self.large: list[tuple[np.ndarray, np.ndarray, str]] = []
        self.open = ""
        self.hidden: list[str] = []
        self._keep: list[Any] = [*own]
        self._own = frozenset(map(id, self._keep))
        self._outside: dict[int, Any] = {}
        self._seen: set[tuple[int, int, bool]] = set()
        self._reader = ""
        self._entered: set[types.CodeType] = set()
        self._methods: set[tuple[types.CodeType, type]] = set()
        self._functions: dict[types.CodeType, list[types.FunctionType]] = {}

    def put_arrays_back(self) -> list[str]:
        """Put back the numbers of large arrays that were changed; what these are called."""
        changed = [(now, before, label) for now, before, label in self.large if now.tobytes() != before.tobytes()]
        for now, before, _ in changed:
            now[...] = before
        return [label for *_, label in changed]

    # -- what runs ----------------------------------------------------------------------------------------------------

    def enter(self, code: types.CodeType, frame: types.FrameType) -> None:
        """A function begins: its globals, its arguments and the class it was found in can be read."""
        names = names_in(code)
        self._reader = frame.f_globals.get("__name__", "")
        if code not in self._entered:
            self._entered.add(code)
            self._globals(frame.f_globals, names)
            for function in self._functions.get(code, []):
                self._defined(function)
        arguments = frame.f_locals
        for value in arguments.values():
            self.pass_on(value, names)
        if code.co_argcount:
            self._method(code, arguments.get(code.co_varnames[0]))

    def pass_on(self, value: Any, names: Names) -> None:
        """A value is an argument of code with these names, or is returned to it."""
        self._follow(value, names, "", outside=id(value) in self._outside)

    def call(self, function: Any) -> None:
        """A function written in C is called."""
        owner = getattr(function, "__self__", None)
        name = getattr(function, "__name__", "")
        if function is print or (id(owner) in self._outside and type(owner).__module__ == "_io"):
            raise IrreversibleError(f"it calls {name}, which does something outside of the cell at every step")
        if owner is None or isinstance(owner, type):
            module = getattr(function, "__module__", None) or getattr(owner, "__module__", "")
            known = is_pure(module)
            if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
                self._autograd_function(owner)
                known = True
        elif function is sys.getrecursionlimit:  # asked by `inspect`, to give up in time
            known = True
        elif isinstance(owner, types.ModuleType):
            if owner.__name__.startswith("torch") and re.match("_?(get|is|are)_", name):
                self._mode(name, function)
            # Builtins that reach where no name leads.
            opening = ("eval", "exec", "compile", "open", "input", "globals", "locals", "__import__")
            known = is_pure(owner.__name__) and not (owner.__name__ == "builtins" and name in opening)
        else:
            known = isinstance(owner, (*PLAIN, *CONTAINERS, tuple, frozenset, Tensor, np.ndarray, *GENERATORS))
            known = known or is_pure(type(owner).__module__) or isinstance(owner, ContextVar)
            if isinstance(owner, GENERATORS):
                self._generator(owner)
        if not known:
            self._opened(f"it calls {getattr(function, '__qualname__', name)}, whose answers may change")

    def _autograd_function(self, kind: type) -> None:
        """A Function of a user's is applied: torch looks these up by itself."""
        for name in ("forward", "setup_context", "backward"):
            self._class_entry(kind, name, _NO_NAMES)

    def _mode(self, name: str, ask: Callable[[], Any]) -> None:
        if name not in self.modes and "()" in (ask.__doc__ or "()"):
            try:
                value = ask()
            except TypeError:  # it needs an argument, so it is about a thing and not about a mode
                return
            if isinstance(value, PLAIN):
                self.modes[name] = ask

    def _method(self, code: types.CodeType, first: Any) -> None:
        """Where the class of a function's first argument finds that function: another may come to stand there."""
        kind = first if isinstance(first, type) else type(first)
        if (code, kind) not in self._methods and is_written_in_python(kind):
            self._methods.add((code, kind))
            self._class_entry(kind, name_in_class(code, kind), names_in(code))

    def _globals(self, held: dict[str, Any], names: Names) -> None:
        module = held.get("__name__", "")
        for name in names.globals:
            if name in held:
                self._at(places.Entry, held, name, f"{module}.{name}", names)
                if names.computed and isinstance(held[name], types.ModuleType) and not is_common(held[name].__name__):
                    self._opened(f"it looks up names in {held[name].__name__} that it makes as it runs")
            else:
                builtins = held.get("__builtins__", {})
                builtins = vars(builtins) if isinstance(builtins, types.ModuleType) else builtins
                self._at(places.Entry, held, name, f"{module}.{name}", names)
                self._at(places.Entry, builtins, name, name, names)
        for name in names.modules:
            self._at(places.Entry, sys.modules, name, name, names)

    # -- what it reaches ----------------------------------------------------------------------------------------------

    def _at(self, kind: type[Place], owner: Any, name: Any, label: str, names: Names) -> None:
        """Note a place, and follow what stands there."""
        if len(self.places) >= _MOST_PLACES and (kind, id(owner), name) not in self.places:
            self._opened(f"it can read more than {_MOST_PLACES} places")
            return
        self._follow(self._note(kind, owner, label, name).now(), names, label, outside=True)

    def _note(self, kind: type[Place], owner: Any, label: str, name: Any = "") -> Place:
        """Note a place whose content, if any, is followed in another way."""
        key = (kind, id(owner), name)
        if key not in self.places:
            self.places[key] = kind(owner, name, label, self._reader)
        return self.places[key]

    def _follow(self, value: Any, names: Names, label: str, *, outside: bool) -> None:
        if issubclass(type(value), PLAIN) or value is MISSING:
            return
        if outside and id(value) not in self._own:
            self._outside[id(value)] = value
        else:
            outside = id(value) in self._outside
        key = (id(value), id(names), outside)
        if key in self._seen:
            return
        self._seen.add(key)
        self._keep += (value, names)
        self._look_into(value, names, label, outside)

    def _look_into(self, value: Any, names: Names, label: str, outside: bool) -> None:
        if not outside and id(value) in self._own and not is_comparable(value):
            self.hidden.append(f"{label}, a {type(value).__name__}")
        for kinds, follow in self._ways():
            if issubclass(type(value), kinds):
                follow(value, names, label, outside)
                return
        kind: Any = type(value)
        if hasattr(kind, "__next__") and not is_written_in_python(kind) and kind.__module__ != "_io":
            if outside and not is_common(self._reader):
                raise IrreversibleError(f"it reads {label}, an iterator, which moves on outside of the cell")
            if outside:  # a library keeps it, as a tracer of torch's does that is at work around this
                self._opened(f"it may read {label}, an iterator")
        elif attributes_of(value) is not None or slots_of(kind):
            self._object(value, names, label, outside)
        elif outside and not is_pure(kind.__module__):
            self._opened(f"it reads {label}, a {kind.__name__}, which cannot be looked into")

    def _ways(self) -> Iterator[tuple[Any, Callable[..., None]]]:
        yield HIDING, self._hidden
        yield types.FunctionType, self._function
        yield type, self._class
        yield types.ModuleType, self._module
        yield nn.Module, self._object
        yield Tensor, self._tensor
        yield CONTAINERS, self._container
        yield (tuple, frozenset), self._items
        yield types.MethodType, self._bound
        yield weakref.ref, self._reference
        yield functools.partial, self._partial
        yield (staticmethod, classmethod, property), self._wrapped
        yield GENERATORS, self._generator
        yield np.ndarray, self._array
        yield ContextVar, self._variable
        yield INERT, self._builtin

    def _function(self, function: types.FunctionType, names: Names, label: str, outside: bool) -> None:
        """What a function reads matters once it runs; until then it matters only which one it is."""
        self._functions.setdefault(function.__code__, []).append(function)
        if function.__code__ in self._entered or not names.attributes.isdisjoint(vars(function)):
            self._defined(function)

    def _defined(self, function: types.FunctionType) -> None:
        label, inside = function.__qualname__, names_in(function.__code__)
        self._note(places.Definition, function, f"the definition of {label}")
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._at(places.ClosureVariable, cell, "", f"{variable} of {label}", inside)
        held = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values())
        for value in held:
            self._follow(value, inside, f"a default of {label}", outside=True)

    def _class(self, kind: type, names: Names, label: str, outside: bool) -> None:
        if is_written_in_python(kind):
            wanted = set(names.attributes)
            if names.computed:
                bases = [base for base in kind.__mro__ if not is_pure(base.__module__)]
                wanted.update(name for base in bases for name in vars(base) if name[:2] != "__")
            for name in wanted:
                self._class_entry(kind, name, names)
        elif not is_pure(kind.__module__):
            self._opened(f"it uses {label or kind.__qualname__}, a class that cannot be looked into")

    def _class_entry(self, kind: type, name: str, names: Names) -> None:
        for base in kind.__mro__:
            if not is_written_in_python(base):
                return
            few = len(vars(base)) <= 40  # a class with more names is looked over name by name, not as a whole
            if few:
                self._note(places.ClassNames, base, f"the names of {base.__qualname__}")
            if name in vars(base) or not few:
                self._at(places.ClassEntry, base, name, f"{base.__qualname__}.{name}", names)
            if name in vars(base):
                return

    def _module(self, module: types.ModuleType, names: Names, label: str, outside: bool) -> None:
        held = vars(module)
        for name in names.attributes:
            if name in held:
                self._at(places.Entry, held, name, f"{module.__name__}.{name}", names)

    def _object(self, thing: Any, names: Names, label: str, outside: bool) -> None:
        kind: Any = type(thing)
        held = attributes_of(thing)
        held = {} if held is None else held
        label = label or kind.__qualname__
        slots = slots_of(kind)
        if outside:
            self._at(places.ClassOf, thing, "", f"the class of {label}", names)
        else:
            self._class(kind, names, label, outside)
        if isinstance(thing, nn.Module):
            for name in ("_parameters", "_buffers", "_modules"):
                if name not in held:  # a module that is being made has none yet
                    continue
                if outside:
                    self._outside[id(held[name])] = held[name]
                self._follow(held[name], names, f"{label}.{name}", outside=outside)
        for name in self._looked_up(names, [*held, *slots]):
            place, owner = (places.Slot, thing) if name in slots else (places.Entry, held)
            if outside:
                self._at(place, owner, name, f"{label}.{name}", names)
            else:
                self._follow(place(owner, name, label).first, names, f"{label}.{name}", outside=False)
        if outside:
            self._class(kind, names, label, outside)
        if isinstance(thing, CONTAINERS):
            self._container(thing, names, label, outside)

    def _looked_up(self, names: Names, held: Iterable[str]) -> Iterable[str]:
        """Which names are looked up in a thing that holds these: all of them, where code makes names as it runs."""
        if not names.computed:
            return names.attributes
        return dict.fromkeys([*names.attributes, *(name for name in held if name[:2] != "__")])

    def _container(self, container: Any, names: Names, label: str, outside: bool) -> None:
        if len(container) > _MOST_ITEMS:
            if outside:
                self._opened(f"it reads {label}, which holds more than {_MOST_ITEMS} things")
            return
        if outside:
            self._note(places.Content, container, f"what {label} holds")
        self._items(container, names, label, outside)
        held = attributes_of(container)
        if type(container) not in CONTAINERS and held is not None:
            self._class(type(container), names, label, outside)
            if outside:
                self._note(places.Content, held, f"the attributes of {label}")
            self._items(held, names, label, outside)

    def _items(self, container: Any, names: Names, label: str, outside: bool) -> None:
        pairs = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in list(pairs):
            self._follow(key, names, f"a key of {label}", outside=outside)
            self._follow(value, names, f"{label}[{key!r}]" if isinstance(key, str | int) else label, outside=outside)

    def _bound(self, method: types.MethodType, names: Names, label: str, outside: bool) -> None:
        self._follow(method.__func__, names, label, outside=True)
        self._follow(method.__self__, names, label, outside=outside)
        code = getattr(method.__func__, "__code__", None)
        if code is not None:
            self._follow(method.__self__, names_in(code), label, outside=outside)

    def _partial(self, partial: Any, names: Names, label: str, outside: bool) -> None:
        for value in (partial.func, *partial.args, *partial.keywords.values()):
            self._follow(value, names, label, outside=outside)
        if outside:
            self._at(places.Slot, partial, "keywords", f"{label}.keywords", names)
            self._follow(partial.keywords, names, label, outside=True)

    def _wrapped(self, wrapper: Any, names: Names, label: str, outside: bool) -> None:
        for function in functions_of(wrapper):
            self._follow(function, names, label, outside=True)

    def _tensor(self, tensor: Tensor, names: Names, label: str, outside: bool) -> None:
        if outside:
            self._note(places.KindOfTensor, tensor, label)
            if has_memory(tensor):
                self.memory[tensor.untyped_storage().data_ptr()] = label

    def _generator(self, generator: Any, *_: Any) -> None:
        self.generators.setdefault(id(generator), generator)

    def _array(self, values: np.ndarray, names: Names, label: str, outside: bool) -> None:
        if not outside:
            return
        if not is_small(values):
            self._opened(f"it reads {label}, an array of {values.nbytes} bytes")
            self.large.append((values, values.copy(), label))
            return
        self._note(places.ArrayContent, values, label)

    def _variable(self, variable: ContextVar[Any], names: Names, label: str, outside: bool) -> None:
        self._at(places.ContextValue, variable, "", f"the context variable {variable.name}", names)

    def _reference(self, reference: Any, names: Names, label: str, outside: bool) -> None:
        self._at(places.Referent, reference, "", f"what {label} refers to", names)

    def _hidden(self, thing: Any, names: Names, label: str, outside: bool) -> None:
        """What looks like an object of Python's and keeps what it reads out of sight."""
        self._opened(f"it reads {label or 'something'}, a {type(thing).__name__}, which cannot be looked into")
        self._follow(getattr(thing, "__wrapped__", None), names, label, outside=outside)

    def _builtin(self, function: Any, names: Names, label: str, outside: bool) -> None:
        owner = getattr(function, "__self__", None)
        if owner is not None and not isinstance(owner, types.ModuleType | type):
            self._follow(owner, names, label, outside=outside)

    def _opened(self, why: str) -> None:
        self.open = self.open or why
