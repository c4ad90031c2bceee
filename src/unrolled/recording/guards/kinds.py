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

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from unrolled.recording.guards.places import CONTAINERS, PLAIN, is_small

BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"} | {"_network"}
"""What modules keep beside their attributes, and where our own layers keep the network that runs them."""

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

BY_IDENTITY: tuple[Any, ...] = (
    type,
    types.BuiltinFunctionType,
    types.FunctionType,
    types.ModuleType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
)
"""What is another one when it is not the same object."""

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


def is_comparable(value: Any) -> bool:
    """Whether it can be seen of an object that a cell holds, container or not, that it has changed."""
    if isinstance(value, np.ndarray | np.generic):
        return is_small(value)
    known = (
        *PLAIN,
        *CONTAINERS,
        *BY_IDENTITY,
        torch.Generator,
        Tensor,
        tuple,
        frozenset,
        types.MethodType,
        functools.partial,
    )
    return isinstance(value, known) or held_by(value) is not None or is_function_of_torch(value)


def held_by(thing: Any) -> dict[str, Any] | None:
    """What an object that is written in Python holds, by name, slots as well; None for other objects."""
    held = attributes_of(thing)
    kind: Any = type(thing)
    slots = {name: getattr(thing, name) for name in slots_of(kind) if hasattr(thing, name)}
    if held is None and not slots:
        return None
    return {**(held or {}), **slots}


_OPERATIONS = (type(torch.ops.aten.add), type(torch.ops.aten.add.Tensor), torch.jit.ScriptFunction)


def is_function_of_torch(value: Any) -> bool:
    """Whether an object is a function of torch's that has no settings."""
    if isinstance(value, _OPERATIONS):
        return True
    return type(value).__module__.startswith("torch.") and callable(value) and held_by(value) is None


def what_hooks_ask(module: Any) -> str:
    """What a module's hooks ask of whoever runs it, in words; empty where there are none, or nothing is asked.

    Torch's own that make a weight before the module runs are a part of what it computes: they are recorded.
    """
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kinds = {type(hook) for hooks in names for hook in (getattr(module, hooks, None) or {}).values()}
    if not kinds <= {WeightNorm, SpectralNorm}:
        return "has hooks, which must be called for every copy"
    if SpectralNorm in kinds and module.training:
        return "has a spectral_norm that changes its buffers at every step in training; in eval it does not"
    return ""
