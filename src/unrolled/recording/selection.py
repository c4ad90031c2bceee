"""What an index by tensors selects: which dimensions are the source's own, and where those of the indices are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Selected(NamedTuple):
    """A dimension of what an index by tensors selects: one of the source's own, or one of the indices'.

    Those of indices are counted from the last one, -1, since indices broadcast.
    """

    own: int | None
    of_index: int | None


def selection(rank: int, indexed: Mapping[int, int]) -> list[Selected]:
    """The dimensions of `source[..., index, ...]`, as torch and numpy order them.

    Args:
        rank: how many dimensions the source has.
        indexed: for each of its dimensions that has an index, how many dimensions that has.
    """
    among = [Selected(None, d) for d in range(-max(indexed.values()), 0)]
    kept = [Selected(d, None) for d in range(rank) if d not in indexed]
    first, last = min(indexed), max(indexed)
    adjacent = len(indexed) == last - first + 1
    before = first if adjacent else 0
    return [*kept[:before], *among, *kept[before:]]
