"""Indexing as a step writes it, in operations whose shapes are known and that act row by row.

`x[mask] = v` is a choice between v and x. An index of one number, `memory[:, pointer]`, would be taken out of its
tensor. `memory[torch.arange(B), k]` goes along the rows: it is a gather with an index for each row. A list of places
is a tensor that would be made out of Python numbers.
"""

from __future__ import annotations

from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unrolled.recording.along_rows import AlongRows
from unrolled.recording.events import UnrecordableError

_READ, _WRITE, _ARANGE = Tensor.__getitem__, Tensor.__setitem__, torch.arange
_PUTS = (Tensor.index_put, torch.index_put, Tensor.index_put_, torch.index_put_)


class FixedShapes(TorchFunctionMode):
    """Runs what a step does with indices as operations whose results have the same shape whatever the numbers are."""

    def __init__(self) -> None:
        super().__init__()
        self._counting: dict[int, tuple[Tensor, int]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _WRITE:
            return self._write(*args)
        if func in _PUTS:
            return self._put(func, *args, **kwargs)
        result = self._read(*args) if func is _READ else func(*args, **kwargs)
        if func is _ARANGE and _from_zero(args, kwargs) and not result.dtype.is_floating_point:
            self._counting[id(result)] = result, 0
        elif isinstance(result, Tensor) and args and id(args[0]) in self._counting:
            self._note_view(result, *self._counting[id(args[0])])
        return result

    # -- tensors that are 0, 1, 2, ... along a dimension

    def _note_view(self, view: Tensor, source: Tensor, dim: int) -> None:
        """A view that has the same entries, with dimensions of length 1 around them, counts too."""
        there = view.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        if there and view.numel() == source.numel():
            self._counting[id(view)] = view, view.shape.index(source.shape[dim])

    def _counts(self, index: Tensor, size: int) -> int | None:
        """Along which dimension, from the last one, an index is 0, 1, 2, ... up to a size; None if it is not."""
        if id(index) not in self._counting:
            return None
        _, dim = self._counting[id(index)]
        written_into = index.is_inference() or index._version
        return None if written_into or index.shape[dim] != size or index.numel() != size else dim - index.dim()

    def _along_rows(self, x: Tensor, indices: dict[int, Tensor]) -> AlongRows | None:
        """An index that goes along a dimension of x together with others; None if it does not."""
        for rows, index in indices.items():
            counts = self._counts(index, x.shape[rows])
            if counts is not None and len(indices) > 1:
                return AlongRows(x, indices, rows, counts)
        return None

    # -- reading and writing

    def _read(self, x: Tensor, index: Any) -> Any:
        basic, found = _split(index, x.dim())
        if any(_is_mask(i) for i in found.values()):
            raise UnrecordableError(
                "x[mask] has as many entries as the mask is true; write torch.where(mask, x, other), which has all"
            )
        if not found:
            return x[index]
        view = x if basic is None else x[basic]
        found = _as_tensors(view, found)
        if list(found) == [0] and isinstance(x, nn.Parameter) and found[0].dim():
            return _from_table(view, found[0])
        rows = self._along_rows(view, found)
        return torch.ops.aten.index(view, _by_dimension(found)) if rows is None else rows.read()

    def _write(self, x: Tensor, index: Any, value: Any) -> None:
        basic, found = _split(index, x.dim())
        if not found:
            x[index] = value
            return
        view = x if basic is None else x[basic]
        found = _as_tensors(view, found)
        if any(_is_mask(i) for i in found.values()):
            _write_by_mask(view, found, value)
            return
        if not isinstance(value, Tensor):
            value = torch.full((), value, dtype=x.dtype, device=x.device)
        rows = self._along_rows(view, found)
        if rows is None:
            torch.ops.aten.index_put_(view, _by_dimension(found), value.to(x.dtype))
        else:
            view.copy_(rows.written(value.to(x.dtype)))

    def _put(self, func: Any, x: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Tensor:
        """`x.index_put(indices, values)`, or into x itself; masks are left to it."""
        found = {d: index for d, index in enumerate(indices) if index is not None}
        rows = None if any(map(_is_mask, found.values())) else self._along_rows(x, found)
        if rows is None:
            return func(x, indices, values, accumulate)
        result = rows.written(values, added=accumulate)
        return x.copy_(result) if func in _PUTS[2:] else result


def _from_zero(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `torch.arange` is asked for 0, 1, 2, ..."""
    start = args[0] if len(args) > 1 or (args and "end" in kwargs) else kwargs.get("start", 0)
    step = args[2] if len(args) > 2 else kwargs.get("step", 1)
    return bool(start == 0 and step == 1)


def _split(index: Any, rank: int) -> tuple[tuple[Any, ...] | None, dict[int, Any]]:
    """An index as a basic one, None if that takes all, and then indices by tensors or lists, by their dimension."""
    items = index if isinstance(index, tuple) else (index,)
    if not any(_is_advanced(item) for item in items):
        return None, {}
    at = next((n for n, item in enumerate(items) if item is Ellipsis), None)
    if at is not None:
        items = (*items[:at], *(slice(None),) * (rank - sum(map(_takes, items))), *items[at + 1 :])
    found: dict[int, Any] = {}
    basic: list[Any] = []
    dim = 0
    for item in items:
        if _is_advanced(item):
            found[dim] = item
        basic += [slice(None)] * _takes(item) if _is_advanced(item) else [item]
        dim += _takes(item) if _is_advanced(item) else not _is_number(item)
    whole = all(isinstance(item, slice) and item == slice(None) for item in basic)
    return None if whole else tuple(basic), found


def _is_number(item: Any) -> bool:
    return isinstance(item, Integral) and not isinstance(item, bool)


def _is_advanced(item: Any) -> bool:
    if isinstance(item, Tensor):
        return not item.dtype.is_floating_point and (item.dim() > 0 or not _is_mask(item))
    return isinstance(item, list) and bool(item) and all(type(n) is int for n in item)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _takes(item: Any) -> int:
    """How many dimensions of what is indexed an item stands for."""
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if _is_mask(item) else 1


def _as_tensors(x: Tensor, found: dict[int, Any]) -> dict[int, Tensor]:
    """Indices, lists among them as tensors that operations make: joined runs of adjacent places."""
    return {d: _joined_runs(i, x.device) if isinstance(i, list) else i for d, i in found.items()}


def _joined_runs(places: list[int], device: torch.device) -> Tensor:
    ends = [*(n for n, (a, b) in enumerate(pairwise(places), 1) if b != a + 1), len(places)]
    return torch.cat([torch.arange(places[i], places[j - 1] + 1, device=device) for i, j in pairwise([0, *ends])])


def _by_dimension(indices: dict[int, Tensor]) -> list[Tensor | None]:
    return [indices.get(d) for d in range(max(indices) + 1)]


def _from_table(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table: its gradient is an embedding's."""
    places = torch.where(index < 0, index + table.shape[0], index)
    rows = nn.functional.embedding(places, table.reshape(table.shape[0], -1))
    return rows.reshape(*index.shape, *table.shape[1:])


def _write_by_mask(x: Tensor, found: dict[int, Tensor], value: Any) -> None:
    """`x[mask] = value`, where value is the same for all entries that are chosen."""
    if len(found) > 1:
        raise UnrecordableError("an index by a mask and other tensors; write torch.where(mask, value, x)")
    ((dim, mask),) = found.items()
    behind = x.dim() - dim - mask.dim()
    chosen = mask.bool().reshape(*mask.shape, *(1,) * behind)
    if not isinstance(value, Tensor) or value.dim() == 0:
        x.masked_fill_(chosen, value)
        return
    if value.dim() > behind:
        before, (count, *rest) = value.shape[: value.dim() - behind - 1], value.shape[value.dim() - behind - 1 :]
        if count != 1:
            raise UnrecordableError(
                "x[mask] = values has as many values as the mask is true; write torch.where(mask, values, x)"
            )
        value = value.reshape(*before, *(1,) * mask.dim(), *rest)
    x.copy_(torch.where(chosen, value.to(x.dtype), x))
