"""A cache of what was made for a kind of call, of limited size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class LRUCache(Generic[T]):
    """A mapping of limited size: the entry that was used longest ago goes.

    Args:
        most: how many entries are kept.

    Example:
        >>> kept = LRUCache(2)
        >>> [kept.get(lambda n=n: n, lambda n=n: n * n) for n in (1, 2, 1, 3)], 1 in kept, 2 in kept
        ([1, 4, 1, 9], True, False)
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._entries: OrderedDict[Hashable, T] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def drop(self, which: Callable[[T], bool]) -> None:
        """Remove the entries for which `which` is true."""
        for key in [key for key, kept in self._entries.items() if which(kept)]:
            self._entries.pop(key, None)

    def replace(self, which: Callable[[T], bool], entry: T) -> bool:
        """Put another entry in the place of those for which `which` is true; whether there were any."""
        keys = [key for key, kept in self._entries.items() if which(kept)]
        self._entries.update(dict.fromkeys(keys, entry))
        return bool(keys)

    def get(
        self, key: Callable[[], Hashable], make: Callable[[], T], *, holds: Callable[[T], bool] = lambda _: True
    ) -> T:
        """The entry for a key; made if there is none, or if it no longer holds.

        Args:
            key: computes the key; called again after something was made, which may change what the key depends on.
            make: makes what is missing.
            holds: whether an entry is still right.
        """
        at = key()
        if at not in self._entries or not holds(self._entries[at]):
            made = make()
            at = key()
            if at not in self._entries or not holds(self._entries[at]):  # under that key there may be one that holds
                self._entries[at] = made
            while len(self._entries) > self.most:
                self._entries.popitem(last=False)
        self._entries.move_to_end(at)
        return self._entries[at]
