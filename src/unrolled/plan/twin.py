"""A twin of a cell to record on, and what running it has changed: nothing may happen to the cell itself."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.plan.guards import fingerprint, surroundings
from unrolled.plan.tape import UnrecordableError

__all__ = ["scratch_of", "surroundings_kept", "twin_of"]


def twin_of(cell: nn.Module) -> nn.Module:
    """A deep copy of a cell.

    Raises:
        UnrecordableError: if it cannot be copied.
    """
    # Tensors with a graph, as a step before may have left in an attribute, do not copy themselves.
    held = [t for module in cell.modules() for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf]
    try:
        copies = {id(tensor): tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in held}
        return copy.deepcopy(cell, copies)
    except Exception as error:
        raise UnrecordableError(f"it cannot be copied to be recorded: {error}") from error


def scratch_of(cell: nn.Module, twin: nn.Module) -> list[str]:
    """Tensor attributes that running the twin has written: they may be no more than scratch.

    Raises:
        UnrecordableError: if it has changed anything else: that is state which one step leaves for the next.
    """
    written = []
    for (name, before), (_, after) in zip(cell.named_modules(), twin.named_modules(), strict=True):
        for kind in ("_parameters", "_buffers"):
            _refuse_changed(name, getattr(before, kind), getattr(after, kind))
        for key in dict.fromkeys([*vars(before), *vars(after)]):
            old, new = vars(before).get(key), vars(after).get(key)
            if isinstance(new, Tensor) and not (isinstance(old, Tensor) and _same(old, new)):
                written.append(key)
                vars(after).pop(key)
                if key in vars(before):
                    vars(after)[key] = old
    if fingerprint(cell) != fingerprint(twin):
        raise UnrecordableError("its step leaves something in an attribute for the next one")
    return written


def _refuse_changed(module: str, before: dict[str, Tensor | None], after: dict[str, Tensor | None]) -> None:
    for key, old in before.items():
        new = after.get(key)
        if (old is None) != (new is None) or (old is not None and new is not None and not _same(old, new)):
            raise UnrecordableError(f"its step changes {f'{module}.{key}'.lstrip('.')}")


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.equal(one.detach().nan_to_num(), other.detach().nan_to_num())


@contextmanager
def surroundings_kept(cell: nn.Module) -> Iterator[None]:
    """Python's random numbers, and what a cell's step reads outside of the cell, as they were before.

    Raises:
        UnrecordableError: if the step drew random numbers, or left something there for the next one.
    """
    numbers, before = random.getstate(), fingerprint(cell)
    bindings, containers = surroundings(cell)
    contents = [copy.copy(container) for container in containers]
    try:
        yield
        if random.getstate() != numbers:
            raise UnrecordableError("it draws random numbers of Python's")
        if fingerprint(cell) != before:
            raise UnrecordableError("its step leaves something outside of the cell for the next one")
    finally:
        random.setstate(numbers)
        for binding in bindings:
            _rebind(*binding)
        for container, content in zip(containers, contents, strict=True):
            if not _holds_the_same(container, content):
                _refill(container, content)


def _rebind(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        if owner.get(name) is not value:
            owner[name] = value
    elif getattr(owner, name, None) is not value:
        setattr(owner, name, value)


def _holds_the_same(container: Any, content: Any) -> bool:
    if isinstance(container, dict):
        return _holds_the_same([*container, *container.values()], [*content, *content.values()])
    return len(container) == len(content) and all(one is other for one, other in zip(container, content, strict=True))


def _refill(container: Any, content: Any) -> None:
    """A list, dict or set with what it held: the same things, in the same order."""
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content)
