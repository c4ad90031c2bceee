"""Guards: what a recording holds under. A cell is a Python object, and whatever its step reads may change.

The fingerprint of a cell is a nested tuple of all plain values that its modules hold, of the kinds of its tensors and
which of them are one, of its modules' types and modes; and a number for everything that its steps were seen to be able
to read outside of it (`watch`). Tensors' numbers are not in it: a program reads them anew at every call.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from typing import Any

import numpy as np
from torch import Generator, Tensor, nn

from unrolled.internals import modules_are_patched
from unrolled.recording.events import UnrecordableError
from unrolled.recording.guards.environment import Environment
from unrolled.recording.guards.kinds import (
    BOOKKEEPING,
    BY_IDENTITY,
    held_by,
    is_comparable,
    is_function_of_torch,
    what_hooks_ask,
)
from unrolled.recording.guards.places import PLAIN, kind_of


def fingerprint(cell: nn.Module) -> tuple[Any, ...]:
    """Everything that the step of a cell may depend on, but for its tensors' numbers.

    Raises:
        UnrecordableError: if there are hooks on all modules, or a mode that the step asks for is another one.
    """
    refuse_hooks_on_all()
    environment = Environment.of(cell)
    modes = asked_modes(environment)
    return contents_of(cell), environment.version(), modes, modules_are_patched()


_ON_ALL = "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks"
_RECORDED_WITH = {"is_grad_enabled": True, "is_inference_mode_enabled": False}
"""Modes under which recordings are made: a step that asks for one is recorded only for calls that have it so."""


def refuse_hooks_on_all() -> None:
    """Refuse hooks on all modules.

    Raises:
        UnrecordableError: if there are any.
    """
    if any(getattr(nn.modules.module, hooks, None) for hooks in _ON_ALL):
        raise UnrecordableError("there are hooks on all modules, which must be called for every copy")


def asked_modes(environment: Environment) -> tuple[Any, ...]:
    """The modes of torch's that steps ask for, as they are now.

    Raises:
        UnrecordableError: if one of them is not what recordings are made with.
    """
    modes = []
    for name, read in environment.modes.items():
        value = read()
        if value is not _RECORDED_WITH.get(name, value):
            raise UnrecordableError(f"its step asks {name}(), which is {value} here")
        modes.append(value)
    return tuple(modes)


def contents_of(cell: nn.Module) -> tuple[Any, ...]:
    """What a cell itself holds; of what cannot be compared it tells one object from another."""
    freezer = _Freezer()
    return tuple([freezer.module(name, module) for name, module in cell.named_modules()])


def hidden_in(cell: nn.Module) -> list[str]:
    """What a cell holds that cannot be compared, in words: a step must not read it."""
    freezer = _Freezer()
    for name, module in cell.named_modules():
        freezer.module(name, module)
    return freezer.hidden


class _Freezer:
    def __init__(self) -> None:
        self.hidden: list[str] = []
        self.seen: set[int] = set()
        self.tensors: dict[int, int] = {}

    def module(self, name: str, module: nn.Module) -> tuple[Any, ...]:
        self.seen.add(id(module))
        held = vars(module)
        plain = tuple([(key, self.value(held[key], key)) for key in held if key not in BOOKKEEPING])
        tensors = tuple(
            [(key, self.kind(t)) for group in (module._parameters, module._buffers) for key, t in group.items()]
        )
        # Those that a recording may have: what they do to a weight goes by their settings.
        hooks = self.value(tuple(getattr(module, "_forward_pre_hooks", {}).values()), "a hook")
        return (name, type(module), plain, tensors, what_hooks_ask(module), hooks)

    def kind(self, tensor: Tensor | None) -> Any:
        """What of a tensor a program depends on, and which one it is: it may be held by other names."""
        if tensor is None:
            return None
        number = self.tensors.setdefault(id(tensor), len(self.tensors))
        return (*kind_of(tensor), number)

    def value(self, value: Any, name: str) -> Any:
        if isinstance(value, PLAIN):
            # 1, 1.0 and True are equal, 0.0 and -0.0 too: the type and the digits tell them apart.
            return (type(value), repr(value)) if isinstance(value, float | int | complex) else value
        if isinstance(value, Tensor):
            return self.kind(value)
        if isinstance(value, Generator):  # what it draws next is none of a program's business
            return ("a generator", value.device, self.tensors.setdefault(id(value), len(self.tensors)))
        if isinstance(value, BY_IDENTITY):
            return value
        if not is_comparable(value):
            self.hidden.append(f"{name}, a {type(value).__name__}")
            return ("not looked into", id(value))
        if isinstance(value, np.ndarray | np.generic):
            return (str(value.dtype), value.shape, value.tobytes())
        if not isinstance(value, tuple | frozenset):
            if id(value) in self.seen:
                return "seen before"
            self.seen.add(id(value))
        return self.thing(value, name)

    def thing(self, value: Any, name: str) -> Any:
        """Containers and objects, which may lead back to themselves."""
        if isinstance(value, dict):
            return (type(value), tuple([(self.value(k, name), self.value(v, name)) for k, v in value.items()]))
        if isinstance(value, tuple | list | set | frozenset | deque):
            return (type(value), tuple([self.value(child, name) for child in value]))
        if isinstance(value, types.MethodType):
            return (self.value(value.__func__, name), self.value(value.__self__, name))
        if isinstance(value, functools.partial):
            return (self.value(value.func, name), self.value(value.args, name), self.value(value.keywords, name))
        if is_function_of_torch(value):
            return id(value)
        return (type(value), self.value(held_by(value), name))
