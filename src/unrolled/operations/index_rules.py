"""Row rules of operations that read or write entries at computed places.

The rows must be none of the dimensions along which an index goes, and an index with rows of its own must have them
where the rows of what it goes through are: then each row reads and writes its own entries.
"""

from __future__ import annotations

from typing import Any

from unrolled.operations.row_rules import Place, Rows
from unrolled.recording.program import Ref
from unrolled.recording.selection import Selected, selection


def indices_of(named: Any) -> dict[int, Ref]:
    """The indices among the arguments of `index` and `index_put`, by the dimension of the source that each is for."""
    return {d: ref for d, ref in enumerate(named) if ref is not None}


def index(rows: Rows) -> list[Place]:
    """Entries that indices name: the indices have no rows, or the source has none."""
    return [_place_of_selected(rows)]


def index_put(rows: Rows) -> list[Place]:
    """Entries that indices name, written: what is written has its rows where they are read, or is the same for all."""
    source, values = rows.arg(0), rows.arg(2)
    selected = _place_of_selected(rows)
    if rows.place(source) is None:
        raise rows.refusal("writes rows into what has none")
    have, rank = rows.place(values), len(_selected_dims(rows))
    if have is not None and have + rank - len(rows.shape(values)) != selected:
        raise rows.refusal("writes rows into other rows")
    if have is None and _reaches(rows, values, rank - selected):
        raise rows.refusal("writes what is as long as the rows into them")
    return [rows.place(source)]


def along_index(rows: Rows) -> list[Place]:
    """Entries written or filled along a dimension, by an index that is the same for the whole batch."""
    source, dim = rows.arg(0), rows.arg(1) % len(rows.out())
    place, written = rows.place(source), rows.arg(3)
    if place is None or place == dim or rows.place(rows.arg(2)) is not None:
        raise rows.refusal("writes among the rows")
    whole = isinstance(written, Ref) and len(rows.shape(written)) == len(rows.out())
    if whole and rows.place(written) != place:
        raise rows.refusal("writes rows into other rows")
    return [place]


def scatter(rows: Rows) -> list[Place]:
    """Entries of a dimension written where an index with rows of its own says."""
    source, dim = rows.arg(0), rows.arg(1) % len(rows.out())
    refs = [arg for arg in (source, rows.arg(2), rows.arg(3)) if isinstance(arg, Ref) and rows.shape(arg)]
    places = {rows.place(ref) for ref in refs}
    if len(places) != 1 or dim in places:
        raise rows.refusal("scatters across rows")
    return [places.pop()]


def search(values: int, boundaries: int) -> Any:
    """A rule for what is looked for in sorted numbers: they are the same for the whole batch, or are its rows' own."""

    def rule(rows: Rows) -> list[Place]:
        wanted, ordered = rows.arg(values), rows.arg(boundaries)
        place, theirs = rows.place(wanted), rows.place(ordered)
        alone = theirs is None and len(rows.shape(ordered)) == 1
        if place is None or not (alone or theirs == place < len(rows.shape(ordered)) - 1):
            raise rows.refusal("looks rows up in rows")
        return [place]

    return rule


def _selected_dims(rows: Rows) -> list[Selected]:
    indexed = {d: len(rows.shape(ref)) for d, ref in indices_of(rows.arg(1)).items()}
    return selection(len(rows.shape(rows.arg(0))), indexed)


def _place_of_selected(rows: Rows) -> int:
    """In which dimension what is selected has the rows."""
    source, dims = rows.place(rows.arg(0)), _selected_dims(rows)
    of_indices = {
        rows.place(ref) - len(rows.shape(ref))  # type: ignore[operator]
        for ref in indices_of(rows.arg(1)).values()
        if rows.place(ref) is not None
    }
    if source is None and len(of_indices) == 1:
        return dims.index(Selected(None, of_indices.pop()))
    if source is None or of_indices or Selected(source, None) not in dims:
        raise rows.refusal("picks rows")
    return dims.index(Selected(source, None))


def _reaches(rows: Rows, ref: Any, from_end: int) -> bool:
    """Whether a value that broadcasts has a dimension of its own, so many from the end."""
    shape = rows.shape(ref)
    return len(shape) >= from_end and shape[len(shape) - from_end] != 1
