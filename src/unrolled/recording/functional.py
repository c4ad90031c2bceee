"""In-place operations as functional ones: what returns that which they write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unrolled.recording.events import Events, UnrecordableError
from unrolled.recording.program import Ref

_ATEN = torch.ops.aten

# By what number the operation fills a tensor; None if by its last argument. What is empty may hold anything.
_FILLED = {
    **dict.fromkeys((_ATEN.new_zeros.default, _ATEN.zeros_like.default, _ATEN.zeros.default, _ATEN.zero_.default), 0),
    **dict.fromkeys((_ATEN.new_ones.default, _ATEN.ones_like.default, _ATEN.ones.default), 1),
    **dict.fromkeys((_ATEN.empty.memory_format, _ATEN.empty_like.default, _ATEN.new_empty.default), 0),
    **dict.fromkeys((_ATEN.empty_strided.default, _ATEN.new_empty_strided.default), 0),
    **dict.fromkeys((_ATEN.new_full.default, _ATEN.full_like.default, _ATEN.fill_.Scalar), None),
}
_COPIES = (_ATEN.copy_.default, _ATEN.fill_.Tensor)

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A target, its arguments and its keyword arguments."""


def as_full(func: Any, args: tuple[Any, ...], result: Tensor) -> Call | None:
    """An operation that fills a tensor with a number, by nothing but shape and number; None for any other.

    Only the shapes of its arguments count: nothing is read, and nothing need be kept.
    """
    if func not in _FILLED:
        return None
    number = args[-1] if _FILLED[func] is None else _FILLED[func]
    kwargs = {"dtype": result.dtype, "device": result.device}
    return _ATEN.full.default, (tuple(result.shape), number), kwargs


def refuse_if_more_is_written(func: Any, args: tuple[Any, ...]) -> None:
    """Refuse what writes into anything but its first argument.

    Raises:
        UnrecordableError: if an operation does.
    """
    written = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if any(argument.is_out for argument in written):
        raise UnrecordableError(f"{func} writes into its `out=`; take what it returns instead")
    if len(written) != 1 or written[0] is not func._schema.arguments[0] or not isinstance(args[0], Tensor):
        names = ", ".join(argument.name for argument in written)
        raise UnrecordableError(f"{func} writes into {names}, which has no functional counterpart")


def note_written(
    events: Events, func: Any, recorded: tuple[Any, ...], named: dict[str, Any], args: tuple[Any, ...], kwargs: Any
) -> int:
    """Note down the functional counterpart of an in-place operation, before that has run.

    Args:
        events: where.
        func: the operation.
        recorded: its arguments, with a `Ref` for each tensor.
        named: its keyword arguments, likewise.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        The value that is written.

    Raises:
        UnrecordableError: if there is no counterpart.
    """
    tensor = args[0]
    full = as_full(func, recorded, tensor)
    if full is not None:
        return _note(events, *full, tensor)
    if func in _COPIES:
        return _copied(events, recorded[1], args[1], tensor)
    target = counterpart(func)
    result = target(*args, **kwargs)
    return _cast(events, _note(events, target, recorded, named, result), result, tensor)


def _copied(events: Events, value: Ref, source: Tensor, tensor: Tensor) -> int:
    """What is copied into a tensor: cast and broadcast."""
    found = _cast(events, value.value, source, tensor)
    if source.shape != tensor.shape:
        return _note(events, _ATEN.expand.default, (Ref(found), tuple(tensor.shape)), {}, tensor)
    return _note(events, _ATEN.clone.default, (Ref(found),), {}, tensor) if found == value.value else found


def _cast(events: Events, value: int, source: Tensor, tensor: Tensor) -> int:
    """A value as a tensor holds it, which may have another dtype than what is written into it."""
    kwargs = {
        name: getattr(tensor, name) for name in ("dtype", "device") if getattr(tensor, name) != getattr(source, name)
    }
    if not kwargs:
        return value
    return _note(events, _ATEN._to_copy.default, (Ref(value),), kwargs, source.to(**kwargs))


def _note(events: Events, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Tensor) -> int:
    return events.note(target, args, (like,), differentiable=torch.is_grad_enabled(), kwargs=kwargs)[0]


def counterpart(func: Any) -> Any:
    """The operation that returns what an in-place one writes.

    Raises:
        UnrecordableError: if there is none.
    """
    name = func._schema.name.removeprefix("aten::")
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    # The counterpart may be called something else: that of `pow_.Scalar` is `pow.Tensor_Scalar`.
    names = [] if packet is None else [func._overloadname, *packet.overloads()]
    for functional in [getattr(packet, name) for name in names if hasattr(packet, name)]:
        types, wanted = ([str(argument.type) for argument in f._schema.arguments] for f in (functional, func))
        if not functional._schema.is_mutable and types == wanted:
            return functional
    raise UnrecordableError(f"{func} has no functional counterpart")
