"""Kinds of Python's objects: which can change, which hide what they read, and which only compute with arguments."""

from __future__ import annotations

import functools
import operator
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch

INERT: tuple[Any, ...] = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.ClassMethodDescriptorType,
    types.GenericAlias,
    types.UnionType,
    types.CodeType,
    torch.finfo,
    torch.iinfo,
    torch.Size,
)
"""What has nothing of its own that could change."""

HIDING: tuple[Any, ...] = (
    type(functools.lru_cache(len)),
    operator.attrgetter,
    operator.methodcaller,
    threading.local,
    weakref.ProxyType,
    weakref.CallableProxyType,
)
"""What keeps out of sight what it reads."""

_PURE = frozenset(
    """
    builtins math cmath _operator operator itertools _functools functools collections _collections _abc abc types typing
    _typing numpy torch torchgen re _sre enum numbers fractions decimal _decimal string copyreg copy _weakref weakref
    contextlib dataclasses unrolled _thread _contextvars pybind11_builtins _warnings _struct struct opt_einsum sympy
    """.split()
)


def is_pure(module: Any) -> bool:
    """Whether what a module has in C gives the same answers to the same questions."""
    return isinstance(module, str) and module.partition(".")[0] in _PURE


def is_common(module: str) -> bool:
    """Whether a module is Python's own, or one that holds functions and no settings."""
    return is_pure(module) or module.partition(".")[0] in sys.stdlib_module_names


def is_written_in_python(kind: type) -> bool:
    """Whether a class can be changed: one written in C cannot."""
    heap_type, immutable = 1 << 9, 1 << 8  # Py_TPFLAGS_HEAPTYPE and Py_TPFLAGS_IMMUTABLETYPE
    return bool(kind.__flags__ & heap_type) and not kind.__flags__ & immutable


@functools.lru_cache(maxsize=4096)
def slots_of(kind: Any) -> frozenset[str]:
    """The slots of a class and its bases."""
    found = (vars(base)["__slots__"] for base in kind.__mro__ if "__slots__" in vars(base))
    names = [name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)]
    return frozenset(names) - {"__dict__", "__weakref__"}


def attributes_of(thing: Any) -> dict[str, Any] | None:
    """An object's `__dict__`, read without any `__getattribute__` of its own; None if it has none."""
    try:
        held = object.__getattribute__(thing, "__dict__")
    except (AttributeError, TypeError):
        return None
    return held if type(held) is dict else None


def functions_of(value: Any) -> Iterator[Any]:
    """What runs when an entry of a class is looked up or called."""
    if isinstance(value, staticmethod | classmethod):
        yield value.__func__
    elif isinstance(value, property):
        yield from (function for function in (value.fget, value.fset) if function is not None)
    elif isinstance(value, functools.cached_property):
        yield value.func
    else:
        yield value


def name_in_class(code: types.CodeType, kind: type) -> str:
    """By what name a class finds a function with this code; the function's own where it is another one's."""
    for base in kind.__mro__:
        for name, value in vars(base).items():
            if any(type(found) is types.FunctionType and found.__code__ is code for found in functions_of(value)):
                return name
    return code.co_name


def has_hooks(module: Any) -> bool:
    """Whether a module has hooks, which must be called for every copy."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, hooks, None) for hooks in names)
