"""How much memory a piece of work takes at its peak: every storage that torch makes and lets go of is noted."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, UntypedStorage

from unrolled.internals import DispatchMode


class Allocations(DispatchMode):
    """A context that notes what is allocated while it is entered, on every device, the backward pass included.

    Memory that was there before is not seen; what is made inside is followed until it goes, also outside.

    Example:
        >>> import torch
        >>> with Allocations() as noted:
        ...     kept = torch.zeros(100) + 1
        >>> noted.peak(), noted.peak(without=[kept])
        (800, 400)
    """

    def __init__(self) -> None:
        super().__init__()
        self._events: list[tuple[int, int]] = []
        self._known: dict[int, tuple[int, weakref.ref[UntypedStorage]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation; note the storages of its results that are none of its operands'."""
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        given: set[int] | None = None
        for storage in _storages([found]):
            if self._number(storage) is None:
                given = {id(s) for s in _storages([*args, *kwargs.values()])} if given is None else given
                if id(storage) not in given:
                    self._note(storage)
        return found

    def _number(self, storage: UntypedStorage) -> int | None:
        number, known = self._known.get(id(storage), (None, None))
        return number if known is not None and known() is storage else None

    def _note(self, storage: UntypedStorage) -> None:
        number, count = len(self._events), storage.nbytes()
        self._events.append((number, count))
        self._known[id(storage)] = number, weakref.ref(storage, lambda _: self._events.append((number, -count)))

    def peak(self, without: Iterable[Tensor] = ()) -> int:
        """The most bytes that were held at once.

        Args:
            without: tensors, still held, whose memory is not counted.
        """
        apart = {self._number(tensor.untyped_storage()) for tensor in without}
        now = highest = 0
        for number, count in self._events:
            now += 0 if number in apart else count
            highest = max(highest, now)
        return highest


def _storages(tree: Iterable[Any]) -> list[UntypedStorage]:
    found: list[UntypedStorage] = []
    for x in tree:
        if isinstance(x, Tensor):
            found.append(x.untyped_storage())
        elif isinstance(x, list | tuple):
            found += _storages(x)
    return found
