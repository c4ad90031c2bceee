"""A twin of a cell to record on, and what running it has changed: nothing may happen to the cell itself."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unrolled.plan.guards import fingerprint
from unrolled.plan.tape import UnrecordableError

__all__ = ["random_numbers_kept", "scratch_of", "twin_of"]


def twin_of(cell: nn.Module) -> nn.Module:
    """A deep copy of a cell.

    Raises:
        UnrecordableError: if it cannot be copied.
    """
    # Tensors with a graph, as a step before may have left in an attribute, do not copy themselves.
    held = [t for module in cell.modules() for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf]
    try:
        return copy.deepcopy(cell, {id(tensor): tensor.detach().clone() for tensor in held})
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
def random_numbers_kept() -> Iterator[None]:
    """Python's random numbers as they were before; a step that draws some cannot be recorded.

    Raises:
        UnrecordableError: if any were drawn.
    """
    before = random.getstate()
    try:
        yield
        if random.getstate() != before:
            raise UnrecordableError("it draws random numbers of Python's")
    finally:
        random.setstate(before)
