"""Signatures: what a function, a method or what torch.jit made of one can be called with."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from unrolled.errors import CellError


def parameters_of(function: Callable[..., Any]) -> Sequence[inspect.Parameter]:
    """A function's parameters, those of a method without `self`."""
    if isinstance(function, types.MethodType):
        return parameters_of(function.__func__)[1:]
    if isinstance(function, torch.ScriptMethod | torch.ScriptFunction):
        return _of_schema(function.schema, method=isinstance(function, torch.ScriptMethod))
    return _read_signature(function) if isinstance(function, types.FunctionType) else _signature(function)


def _of_schema(schema: Any, *, method: bool) -> Sequence[inspect.Parameter]:
    """The parameters of what torch.jit made, which has a schema in place of a signature."""
    found = []
    for argument in schema.arguments[1:] if method else schema.arguments:
        default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        found.append(inspect.Parameter(argument.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default))
    return found


def _signature(function: Callable[..., Any]) -> Sequence[inspect.Parameter]:
    try:
        return tuple(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise CellError(f"the signature of {function!r} cannot be read: {error}") from error


# Signatures are read at every call and cost more than all the other checks together.
_read_signature = functools.lru_cache(maxsize=512)(_signature)
