"""How much memory some work takes at its peak: each storage that torch allocates and frees is recorded."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, UntypedStorage

from unrolled.internals import DispatchMode


class Allocations(DispatchMode):
    """A context that records what is allocated inside of it, on every device, the backward pass included.

    Memory that was there before does not count; what is allocated inside is followed until it is freed, also outside.

    Example:
        >>> import torch
        >>> with Allocations() as allocations:
        ...     kept = torch.zeros(100) + 1
        >>> allocations.peak(), allocations.peak(without=[kept])
        (800, 400)
    """

    def __init__(self) -> None:
        super().__init__()
        self._events: list[tuple[int, int]] = []
        self._known: dict[int, tuple[int, weakref.ref[UntypedStorage]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation; record the storages of its results that are not those of its operands."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        new = [storage for storage in _storages([result]) if self._number(storage) is None]
        if new:
            operands = {id(storage) for storage in _storages([*args, *kwargs.values()])}
            for storage in new:
                if id(storage) not in operands and self._number(storage) is None:
                    self._record(storage)
        return result

    def _number(self, storage: UntypedStorage) -> int | None:
        number, known = self._known.get(id(storage), (None, None))
        return number if known is not None and known() is storage else None

    def _record(self, storage: UntypedStorage) -> None:
        number, count = len(self._events), storage.nbytes()
        self._events.append((number, count))
        self._known[id(storage)] = number, weakref.ref(storage, lambda _: self._events.append((number, -count)))

    def peak(self, without: Iterable[Tensor] = ()) -> int:
        """The most bytes that were held at once.

        Args:
            without: tensors, still held, whose memory is not counted.
        """
        uncounted = {self._number(tensor.untyped_storage()) for tensor in without}
        now = highest = 0
        for number, count in self._events:
            now += 0 if number in uncounted else count
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
