"""Guards: what a recording holds under. A cell is a Python object, and whatever its step reads may change.

The fingerprint of a cell is a nested tuple of all plain values that its modules hold, of the code of its functions with
what these close over and the plain globals they name, and of modes and types. Tensors are not in it: a program reads
them anew at every call. What cannot be put into such a tuple bars recording.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unrolled.plan.tape import UnrecordableError

__all__ = ["Binding", "fingerprint", "surroundings"]

_PLAIN = (int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format, range, slice)
_BY_IDENTITY = (
    type,
    types.BuiltinFunctionType,
    types.ModuleType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
# Where our own layers keep the network that runs them, plans and all: nothing that a step reads.
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"} | {"_network"}
_MOST_BYTES = 4096
_MODES: dict[str, Callable[[], Any]] = {
    name: getattr(torch, name)
    for name in """
    is_grad_enabled is_inference_mode_enabled get_default_dtype get_num_threads get_num_interop_threads
    is_anomaly_enabled are_deterministic_algorithms_enabled get_float32_matmul_precision
    """.split()
    if hasattr(torch, name)
}
# What a recording has on whatever the mode of the call: a step that asks is recorded only for calls that have it too.
_RECORDED_WITH = {"is_grad_enabled": True, "is_inference_mode_enabled": False}

Binding = tuple[Any, str, Any]
"""A plain value that a step reads and the cell does not hold: whose name, the name, the value."""


def fingerprint(cell: nn.Module) -> tuple[Any, ...]:
    """Everything about a cell, but for its tensors' numbers, that its step may depend on.

    Raises:
        UnrecordableError: if it holds something that cannot be compared, or hooks, which must see every copy.
    """
    if any(getattr(nn.modules.module, hooks, None) for hooks in _GLOBAL_HOOKS):
        raise UnrecordableError("there are hooks on all modules, which must be called for every copy")
    return _Freezer().modules(cell)


def surroundings(cell: nn.Module) -> tuple[list[Binding], list[Any]]:
    """What a cell's step may read and share with its copies: names with their plain values; lists, dicts and sets."""
    freezer = _Freezer()
    freezer.modules(cell)
    return freezer.bindings, freezer.containers


class _Freezer:
    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.bindings: list[Binding] = []
        self.containers: list[Any] = []

    def modules(self, cell: nn.Module) -> tuple[Any, ...]:
        return tuple([self.module(name, module) for name, module in cell.named_modules()])

    def module(self, name: str, module: nn.Module) -> tuple[Any, ...]:
        for hooks in _HOOKS:
            if getattr(module, hooks):
                raise UnrecordableError(f"{name or 'it'} has hooks, which must be called for every copy")
        self.seen.add(id(module))
        held = vars(module)
        plain = tuple([(key, self.value(held[key], key)) for key in held if key not in _BOOKKEEPING])
        tensors = tuple(
            [(key, _kind(t)) for group in (module._parameters, module._buffers) for key, t in group.items()]
        )
        return (name, type(module), plain, tensors, self.code(type(module)))

    def code(self, kind: type) -> tuple[Any, ...]:
        """What a user's class adds: its plain attributes, and what its forward reads beside them."""
        if kind.__module__.startswith("torch.") and "parametrize" not in kind.__module__:
            return ()
        found: list[Any] = []
        for base in kind.__mro__:
            if base is nn.Module:
                break
            if base.__module__.startswith("unrolled."):
                found.append(getattr(vars(base).get("forward"), "__code__", None))
                continue
            found += [(key, self.class_entry(base, value, key)) for key, value in vars(base).items() if key[:2] != "__"]
        return tuple(found)

    def class_entry(self, owner: type, value: Any, name: str) -> Any:
        """A class's attribute: a plain value, or the code of a method or property."""
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if isinstance(value, property):
            value = value.fget
        if isinstance(value, types.FunctionType):
            return self.function(value)
        return self.bound(owner, name, value) if _is_simple(value) else id(value)

    def bound(self, owner: Any, name: str, value: Any, called: str = "") -> Any:
        """A value by the name under which a step finds it outside of the cell."""
        self.bindings.append((owner, name, value))
        return self.value(value, called or name)

    def value(self, value: Any, name: str) -> Any:
        if value is None or isinstance(value, _PLAIN):
            # 1, 1.0 and True are equal, 0.0 and -0.0 too: the type and the digits tell them apart.
            return (type(value), repr(value)) if isinstance(value, float | int | complex) else value
        if isinstance(value, Tensor):
            return "a tensor"
        if isinstance(value, list | dict | set):
            if id(value) in self.seen:
                return "seen before"
            self.seen.add(id(value))
            self.containers.append(value)
        if isinstance(value, tuple | list | set | frozenset):
            return (type(value), tuple([self.value(child, name) for child in value]))
        if isinstance(value, dict):
            return (type(value), tuple([(self.value(k, name), self.value(v, name)) for k, v in value.items()]))
        if isinstance(value, _BY_IDENTITY):
            return value
        if isinstance(value, np.ndarray | np.generic) and value.nbytes <= _MOST_BYTES:
            return (str(value.dtype), value.shape, value.tobytes())
        if id(value) in self.seen:
            return "seen before"
        self.seen.add(id(value))
        return self.thing(value, name)

    def thing(self, value: Any, name: str) -> Any:
        """Functions and objects, which may lead back to themselves."""
        if isinstance(value, types.FunctionType):
            return self.function(value)
        if isinstance(value, types.MethodType):
            return (self.value(value.__func__, name), self.value(value.__self__, name))
        if isinstance(value, functools.partial):
            return (self.value(value.func, name), self.value(value.args, name), self.value(value.keywords, name))
        if type(value).__module__.startswith("torch.") and callable(value) and not isinstance(value, nn.Module):
            return id(value)
        if hasattr(value, "__dict__") and not hasattr(type(value), "__slots__"):
            return (type(value), self.value(vars(value), name))
        raise UnrecordableError(f"its attribute {name} is a {type(value).__name__}, whose changes cannot be seen")

    def function(self, function: types.FunctionType) -> tuple[Any, ...]:
        closed = [cell for cell in function.__closure__ or () if not _is_empty(cell)]
        module = function.__module__ or ""
        inner = () if module.startswith("torch.") else tuple(self.globals_of(function))
        return (
            function.__code__,
            tuple([self.bound(cell, "cell_contents", cell.cell_contents, function.__name__) for cell in closed]),
            self.value(function.__defaults__, function.__name__),
            self.value(function.__kwdefaults__, function.__name__),
            tuple([(key, repr(held)) for key, held in vars(function).items()]),
            inner,
        )

    def globals_of(self, function: types.FunctionType) -> Iterator[Any]:
        yield from _modes(function.__code__)
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            if value is None:
                yield (name, None)
            elif _is_simple(value):
                yield (name, self.bound(function.__globals__, name, value))
            elif isinstance(value, types.FunctionType):
                yield (name, self.value(value, name))
            elif getattr(value, "__name__", "").partition(".")[0] != "torch":
                yield (name, id(value))
                yield from self.attributes_of(value, function.__code__)

    def attributes_of(self, thing: Any, code: types.CodeType) -> Iterator[Any]:
        """Attributes of a module, class or object that a function may look up by name."""
        held = getattr(thing, "__dict__", {})
        for name in _names(code):
            value = held.get(name)
            if _is_simple(value):
                yield (name, self.bound(thing, name, value))
            elif value is not None:
                yield (name, self.helper(value, name))

    def helper(self, value: Any, name: str) -> Any:
        """A function by all that it reads, where that can be seen; anything else by itself."""
        if not isinstance(value, types.FunctionType):
            return id(value)
        try:
            return self.value(value, name)
        except UnrecordableError:
            return (id(value), value.__code__)


def _is_simple(value: Any) -> bool:
    return isinstance(value, (*_PLAIN, tuple, list, dict))


def _modes(code: types.CodeType) -> Iterator[tuple[str, Any]]:
    """The modes of torch that a function asks for, as they are."""
    for name in _asked_modes(code):
        value = _MODES[name]()
        if value is not _RECORDED_WITH.get(name, value):
            raise UnrecordableError(f"its step asks {name}(), which is {value} here")
        yield (name, value)


@functools.lru_cache(maxsize=1024)
def _asked_modes(code: types.CodeType) -> tuple[str, ...]:
    return tuple(name for name in _names(code) if name in _MODES)


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """All names that a function's code, or that of functions inside it, may look up among the globals."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return tuple(dict.fromkeys([*code.co_names, *(name for names in inner for name in names)]))


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (raises where there is nothing yet)
    except ValueError:
        return True
    return False


def _kind(tensor: Tensor | None) -> Any:
    """What of a parameter or buffer a program depends on."""
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, type(tensor))
