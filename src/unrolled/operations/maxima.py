"""Maxima over windows of places: which places a window has is fixed, and which one is the largest is found.

The first of equal ones is taken, as torch does it. The places are those of torch: numbers in the flattened image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from unrolled.operations.operation import Operation, declare
from unrolled.operations.resampling import spread, table
from unrolled.operations.spatial import in_front

Windows = list[list[int]]
"""For each window along one dimension the places that it has; all have as many."""


def _max_pool(rank: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def formula(
        x: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        ceil_mode: bool = False,
    ) -> tuple[Tensor, Tensor]:
        options = (spread(sizes, rank) for sizes in (kernel, stride or kernel, padding, dilation))
        dims = zip(x.shape[-rank:], *options, strict=True)
        windows = [_windows(n, k, s, p, d, ceil_mode) for n, k, s, p, d in dims]
        return _largest(x, windows)

    return formula


def _windows(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> Windows:
    """Windows that begin a stride apart, the first one in the padding, which is left out of them."""
    span = dilation * (kernel - 1)
    count = (size + 2 * padding - span - 1 + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    starts = [number * stride - padding for number in range(count)]
    return _filled([[p for p in range(s, s + span + 1, dilation) if 0 <= p < size] for s in starts])


def _filled(windows: Windows) -> Windows:
    """Windows of as many places each: the last one of a window once more, which changes no maximum."""
    count = max(map(len, windows))
    return [[*window, *window[-1:] * (count - len(window))] for window in windows]


def _adaptive(rank: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def formula(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        dims = zip(x.shape[-rank:], spread(sizes, rank), strict=True)
        ends = [[(i * n // m, -((-(i + 1) * n) // m)) for i in range(m)] for n, m in dims]
        return _largest(x, [_filled([list(range(*end)) for end in of_dim]) for of_dim in ends])

    return formula


def _largest(x: Tensor, windows: Sequence[Windows]) -> tuple[Tensor, Tensor]:
    """The largest number of each window, and its place."""
    rank, places = len(windows), None
    for dim, of_dim in enumerate(windows):
        index = table([p for window in of_dim for p in window], x, torch.int64)
        shape = [1] * (2 * rank)
        shape[dim], shape[rank + dim] = len(of_dim), len(of_dim[0])
        index = index.view(shape)
        places = index if places is None else places * x.shape[dim - rank] + index
    assert places is not None
    counts, inner = [len(of_dim) for of_dim in windows], prod(len(of_dim[0]) for of_dim in windows)
    outer, channels = prod(counts), x.shape[:-rank]
    flat, places = x.reshape([*channels, -1]), places.reshape([outer, inner])
    seen = flat.index_select(-1, places.reshape([-1])).view([*channels, outer, inner])
    first = seen.argmax(-1, True)
    found = places.expand([*channels, outer, inner]).gather(-1, first)
    return seen.gather(-1, first).view([*channels, *counts]), found.view([*channels, *counts])


def _backward(rank: int) -> Callable[..., Tensor]:
    """The gradient goes to the places of the largest ones, the last argument."""

    def formula(grad: Tensor, x: Tensor, *args: Any) -> Tensor:
        channels, places = x.shape[:-rank], args[-1].reshape([*x.shape[:-rank], -1])
        zeros = grad.new_zeros([*channels, prod(x.shape[-rank:])])
        return zeros.scatter_add(-1, places, grad.reshape([*channels, -1])).view(x.shape)

    return formula


_NAMED: dict[str, Callable[..., Any]] = {
    **{f"max_pool{n}d_with_indices": _max_pool(n) for n in (2, 3)},
    **{f"max_pool{n}d_with_indices_backward": _backward(n) for n in (2, 3)},
    **{f"adaptive_max_pool{n}d": _adaptive(n) for n in (2, 3)},
    **{f"adaptive_max_pool{n}d_backward": _backward(n) for n in (2, 3)},
}

declare({name: Operation(in_front, formula=formula) for name, formula in _NAMED.items()})
