"""Values that a step reaches through chains of Python's ways to hold a value, each link of which can be set anew."""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from torch import nn


class Link(NamedTuple):
    """What holds a value: the holder, how source code gets at the value, and what puts another value in its place."""

    holder: Any
    way: str
    put: Callable[[Any], None]


class Slotted:
    __slots__ = ("a",)


class Method:
    def __init__(self, value: Any) -> None:
        self.value = value

    def m(self) -> Any:
        return self.value

    @property
    def p(self) -> Any:
        return self.value

    def __call__(self) -> Any:
        return self.value

    def __getitem__(self, key: str) -> Any:
        return self.value

    def __enter__(self) -> Any:
        return self.value


class Lazy:
    def __init__(self, value: Any) -> None:
        self.__dict__["_values"] = {"a": value}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(name) from None


class Module(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.a = value


def _attribute(value: Any) -> Link:
    held = SimpleNamespace(a=value)
    return Link(held, ".a", lambda new: setattr(held, "a", new))


def _named(value: Any) -> Link:
    held = SimpleNamespace(a=value)
    return Link(held, ":getattr({}, 'a')", lambda new: setattr(held, "a", new))


def _slot(value: Any) -> Link:
    held = Slotted()
    held.a = value
    return Link(held, ".a", lambda new: setattr(held, "a", new))


def _lazy(value: Any) -> Link:
    held = Lazy(value)
    return Link(held, ".a", lambda new: held._values.update(a=new))


def _entry(kind: Callable[[], Any], way: str) -> Callable[[Any], Link]:
    def link(value: Any) -> Link:
        held = kind()
        held["a"] = value
        return Link(held, way, lambda new: held.__setitem__("a", new))

    return link


def _item(kind: Callable[[Any], Any], way: str = "[0]") -> Callable[[Any], Link]:
    def link(value: Any) -> Link:
        held = kind([value])
        return Link(held, way, lambda new: held.__setitem__(0, new))

    return link


def _unbound(value: Any) -> Any:
    """A class's attribute that objects read as it is: a function or a cached one would become a method of theirs."""
    return staticmethod(value) if hasattr(type(value), "__get__") else value


def _class_attribute(value: Any) -> Link:
    held = type("Held", (), {"a": _unbound(value)})
    return Link(held, ".a", lambda new: setattr(held, "a", _unbound(new)))


def _inherited(value: Any) -> Link:
    base = type("Base", (), {"a": _unbound(value)})
    held = type("Held", (base,), {})
    return Link(held(), ".a", lambda new: setattr(base, "a", _unbound(new)))


def _shadowed(value: Any) -> Link:
    base = type("Base", (), {"a": _unbound(value)})
    held = type("Held", (base,), {})
    return Link(held(), ".a", lambda new: setattr(held, "a", _unbound(new)))


def _shadowed_by_the_object(value: Any) -> Link:
    held = type("Held", (), {"a": _unbound(value)})()
    return Link(held, ".a", lambda new: setattr(held, "a", new))


def _method(way: str) -> Callable[[Any], Link]:
    def link(value: Any) -> Link:
        held = Method(value)
        return Link(held, way, lambda new: setattr(held, "value", new))

    return link


def _bound_method(value: Any) -> Link:
    held = Method(value)
    return Link(held.m, "()", lambda new: setattr(held, "value", new))


def _closure(value: Any) -> Link:
    def read() -> Any:
        return value

    def put(new: Any) -> None:
        nonlocal value
        value = new

    return Link(read, "()", put)


def _default(value: Any) -> Link:
    def read(held: Any = value) -> Any:
        return held

    return Link(read, "()", lambda new: setattr(read, "__defaults__", (new,)))


def _keyword(value: Any) -> Link:
    def read(*, held: Any = value) -> Any:
        return held

    return Link(read, "()", lambda new: setattr(read, "__kwdefaults__", {"held": new}))


def _function_attribute(value: Any) -> Link:
    def read() -> Any:
        return read.a

    read.a = value
    return Link(read, "()", lambda new: setattr(read, "a", new))


def _partial(value: Any) -> Link:
    held = functools.partial(lambda a: a, a=value)
    return Link(held, "()", lambda new: held.keywords.update(a=new))


def _variable(value: Any) -> Link:
    held: ContextVar[Any] = ContextVar("held", default=value)
    return Link(held, ".get()", lambda new: held.set(new) and None)


def _module(value: Any) -> Link:
    held = types.ModuleType("torch_held")
    held.a = value
    return Link(held, ".a", lambda new: setattr(held, "a", new))


def _submodule(value: Any) -> Link:
    held = Module(value)
    return Link(held, ".a", lambda new: setattr(held, "a", new))


def _cached(value: Any) -> Link:
    held = Method(value)
    read = functools.lru_cache(held.m)

    def put(new: Any) -> None:
        held.value = new
        read.cache_clear()

    return Link(read, "()", put)


LINKS: dict[str, Callable[[Any], Link]] = {
    "attribute": _attribute,
    "getattr": _named,
    "slot": _slot,
    "__getattr__": _lazy,
    "dict": _entry(dict, "['a']"),
    "dict.get": _entry(dict, ".get('a')"),
    "OrderedDict": _entry(collections.OrderedDict, "['a']"),
    "defaultdict": _entry(lambda: collections.defaultdict(int), "['a']"),
    "list": _item(list),
    "deque": _item(collections.deque),
    "iteration": _item(list, ":[part for part in {}][0]"),
    "unpacking": _item(list, ":(lambda first, *rest: first)(*{})"),
    "class": _class_attribute,
    "base class": _inherited,
    "shadowed by the class": _shadowed,
    "shadowed by the object": _shadowed_by_the_object,
    "method": _method(".m()"),
    "property": _method(".p"),
    "__call__": _method("()"),
    "__getitem__": _method("['a']"),
    "bound method": _bound_method,
    "closure": _closure,
    "default": _default,
    "keyword default": _keyword,
    "function's attribute": _function_attribute,
    "partial": _partial,
    "context variable": _variable,
    "module": _module,
    "nn.Module": _submodule,
    "lru_cache": _cached,
}


class Chain(NamedTuple):
    """A value behind some links.

    Attributes:
        root: the first holder.
        expression: how the value is reached, with `{}` for the root.
        put: for each link, first to last, what puts there a chain to another number.
    """

    root: Any
    expression: str
    put: list[Callable[[float], None]]


def chain(names: list[str], value: float, array: bool) -> Chain:
    """A chain of links of these names to a number, which may stand in a numpy array."""
    if not names:
        return Chain(np.array([value]), "float({}[0])", []) if array else Chain(value, "{}", [])
    inner = chain(names[1:], value, array)
    link = LINKS[names[0]](inner.root)
    around = link.way[1:] if link.way.startswith(":") else "{}" + link.way
    put = [lambda new: link.put(chain(names[1:], new, array).root), *inner.put]
    if array and len(names) == 1:
        put.append(inner.root.fill)
    return Chain(link.holder, inner.expression.replace("{}", around), put)
