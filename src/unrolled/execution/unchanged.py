"""Tensors that do not change for a while: what is computed from them is computed once.

A network that is run segment by segment reads the same weights each time. What an engine makes of a weight before it
can use it (a matrix packed as its kernel reads it) then holds for all segments of a pass.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator

from torch import Tensor


class _Unchanged(threading.local):
    def __init__(self) -> None:
        self.storages: frozenset[int] = frozenset()
        self.made: dict[Hashable, Tensor] = {}


_unchanged = _Unchanged()


@contextlib.contextmanager
def unchanged(tensors: Iterable[Tensor]) -> Iterator[None]:
    """A context inside of which nobody writes into some tensors, which the caller keeps; in this thread."""
    before = _unchanged.storages, _unchanged.made
    _unchanged.storages, _unchanged.made = frozenset(x.untyped_storage().data_ptr() for x in tensors), {}
    try:
        yield
    finally:
        _unchanged.storages, _unchanged.made = before


def something_unchanged() -> bool:
    """Whether there is anything that is known not to change."""
    return bool(_unchanged.storages)


def made_once(make: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What is made of a tensor; if it is known not to change, made once for each view of it.

    Example:
        >>> import torch
        >>> weight = torch.ones(2, 3)
        >>> with unchanged([weight]):
        ...     made_once(torch.clone, weight.t()) is made_once(torch.clone, weight.t())
        True
    """
    if not _unchanged.storages or tensor.untyped_storage().data_ptr() not in _unchanged.storages:
        return make(tensor)
    key = make, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
    if key not in _unchanged.made:
        _unchanged.made[key] = make(tensor)
    return _unchanged.made[key]
