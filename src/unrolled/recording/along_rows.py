"""An index that goes along the rows: `x[torch.arange(B), k]`, in each row of x the entries that k names."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from unrolled.internals import broadcast_shape
from unrolled.recording.selection import selection


class AlongRows:
    """Such an index as gather and scatter, on x as `[rows, named entries, rest]`.

    Args:
        x: what is indexed.
        indices: the indices, by its dimensions.
        rows: the dimension whose index is 0, 1, 2, ...
        counts: the dimension of the indices along which that one counts.
    """

    def __init__(self, x: Tensor, indices: dict[int, Tensor], rows: int, counts: int) -> None:
        others = [d for d in range(x.dim()) if d not in indices]
        self.named = [d for d in indices if d != rows]
        self.order = [rows, *self.named, *others]
        self.by_row = x.permute(self.order)
        self.sizes, rest = [x.shape[d] for d in self.named], [x.shape[d] for d in others]
        self.flat = self.by_row.reshape(x.shape[rows], prod(self.sizes), prod(rest))
        shape = broadcast_shape(*(index.shape for index in indices.values()))
        dims = [d - len(shape) for d in range(len(shape))]
        dims = [counts, *(d for d in dims if d != counts)]
        self.places = self._places(indices, shape, dims)
        # What is selected has its dimensions in torch's order; here, that of the rows is in front.
        self.selected = [*(shape[d] for d in dims), *rest]
        here = [(None, d) for d in dims] + [(d, None) for d in others]
        there = selection(x.dim(), {d: index.dim() for d, index in indices.items()})
        self.to_there = [here.index(tuple(d)) for d in there]  # type: ignore[arg-type]
        self.to_here = [self.to_there.index(d) for d in range(len(here))]

    def _places(self, indices: dict[int, Tensor], shape: torch.Size, dims: list[int]) -> Tensor:
        """For each row the entries that are named, `[rows, M, rest]`; what is out of range stays so."""
        total = None
        for d, size in zip(self.named, self.sizes, strict=True):
            place = torch.where(indices[d] < 0, indices[d] + size, indices[d])
            if len(self.named) > 1:
                place = torch.where((place < 0) | (place >= size), prod(self.sizes), place)
            total = place if total is None else total * size + place
        assert total is not None
        spread = total.expand(shape).permute([d + len(shape) for d in dims])
        return spread.reshape(self.flat.shape[0], -1, 1).expand(-1, -1, self.flat.shape[2])

    def read(self) -> Tensor:
        """`x[rows, k]`."""
        return self.flat.gather(1, self.places).reshape(self.selected).permute(self.to_there)

    def written(self, value: Tensor, *, added: bool = False) -> Tensor:
        """What x is after `x[rows, k] = value`, or `+=` that counts every entry."""
        values = value.expand([self.selected[d] for d in self.to_there]).permute(self.to_here)
        scatter = self.flat.scatter_add if added else self.flat.scatter
        flat = scatter(1, self.places, values.reshape(self.places.shape))
        return flat.reshape(self.by_row.shape).permute([self.order.index(d) for d in range(len(self.order))])
