"""Resampling: padding, averages over windows and interpolation, which are one fixed linear map along each dimension.

An output place is a weighted sum of a few input places of each dimension, one dimension after the other, and the
derivative is the transposed map. Which places and weights these are is not computed by a formula of ours: torch's own
operation is asked, along one dimension, for the images of all unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unrolled.internals import unmoded
from unrolled.operations.operation import Operation, declare
from unrolled.operations.spatial import in_front

Map = Callable[[Tensor], Tensor]
"""What torch does along one dimension: `[N, 1, n]` to `[N, 1, m]`."""

_ATEN = torch.ops.aten


def _forward(maps: Callable[..., list[Map]]) -> Callable[..., Tensor]:
    """An operation whose arguments, but for the input, say the map of each dimension, the last one first."""

    def formula(x: Tensor, *args: Any) -> Tensor:
        for back, resample in enumerate(maps(*args)):
            dim = x.dim() - 1 - back
            x = _along(x, dim, _matrix(resample, x.shape[dim], x.dtype))
        return x

    return formula


def _backward(maps: Callable[..., list[Map]]) -> Callable[..., Tensor]:
    """Its derivative, whose arguments are the gradient, the input, and what says the maps."""

    def formula(grad: Tensor, x: Tensor, *args: Any) -> Tensor:
        return _transposed(grad, x.shape, maps(*args))

    return formula


def _transposed(grad: Tensor, sizes: Sequence[int], maps: Sequence[Map]) -> Tensor:
    for back, resample in enumerate(maps):
        dim = grad.dim() - 1 - back
        grad = _along(grad, dim, _matrix(resample, sizes[dim], grad.dtype).t())
    return grad


def _matrix(resample: Map, size: int, dtype: torch.dtype) -> Tensor:
    """The images of all unit vectors of a dimension, `[n, m]`."""
    with unmoded(), torch.no_grad():
        return resample(torch.eye(size, dtype=dtype).unsqueeze(1)).squeeze(1)


def _along(x: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """`x` times a matrix `[n, m]` along a dimension: of each column only the entries that are not zero."""
    with unmoded():
        columns = [[(i, w) for i, w in enumerate(column) if w != 0] or [(0, 0.0)] for column in matrix.t().tolist()]
    if columns == [[(i, 1.0)] for i in range(x.shape[dim])]:
        return x
    count = max(map(len, columns))
    terms = [term for column in columns for term in _shared(column, count)]
    places, weights = table([i for i, _ in terms], x, torch.int64), [w for _, w in terms]
    taken = x.index_select(dim, places)
    if set(weights) != {1.0}:
        taken = taken * table(weights, x, x.dtype).view([-1, *[1] * (x.dim() - 1 - dim)])
    return taken if count == 1 else taken.view([*x.shape[:dim], -1, count, *x.shape[dim + 1 :]]).sum(dim + 1)


def _shared(column: list[tuple[int, float]], count: int) -> list[tuple[int, float]]:
    """So many terms: the last one is told several times, by shares of its weight; zero times infinity is not zero."""
    (place, weight), times = column[-1], count - len(column) + 1
    return [*column[:-1], *[(place, weight / times)] * times]


def table(numbers: Sequence[float], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers as a tensor that is made of them by operations, as a recording needs it.

    Args:
        numbers: the numbers.
        like: a tensor on the same device.
        dtype: of the table.
    """
    runs = [(number, len(list(run))) for number, run in groupby(numbers)]
    return torch.cat([like.new_full((count,), number, dtype=dtype) for number, count in runs])


def _pads(name: str) -> Callable[..., list[Map]]:
    def maps(padding: Sequence[int]) -> list[Map]:
        pad = getattr(_ATEN, name)
        return [lambda x, p=pair: pad(x, p) for pair in zip(padding[::2], padding[1::2], strict=True)]  # type: ignore[misc]

    return maps


def _averages(
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> list[Map]:
    rank = max(len(kernel), len(stride), len(padding))
    windows = zip(*(spread(sizes, rank) for sizes in (kernel, stride or kernel, padding)), strict=True)

    def average(x: Tensor, window: Sequence[int], divisor: int | None) -> Tensor:
        k, s, p = window
        options = (1, k), (1, s), (0, p), ceil_mode, count_include_pad, divisor
        return F.avg_pool2d(x.unsqueeze(2), *options).squeeze(2)

    divisors = [divisor_override, *[divisor_override and 1] * (rank - 1)]
    return [
        lambda x, w=window, d=divisor: average(x, w, d)  # type: ignore[misc]
        for window, divisor in zip(reversed(list(windows)), divisors, strict=True)
    ]


def spread(sizes: Sequence[int], rank: int) -> list[int]:
    """A size for each dimension, of which one may stand for all."""
    return list(sizes) * rank if len(sizes) == 1 else list(sizes)


def _adaptive(sizes: Sequence[int]) -> list[Map]:
    return [lambda x, m=m: F.adaptive_avg_pool1d(x, m) for m in reversed(sizes)]  # type: ignore[misc]


def _adaptive_backward(rank: int) -> Callable[..., Tensor]:
    return lambda grad, x: _transposed(grad, x.shape, _adaptive(grad.shape[-rank:]))


def _interpolations(name: str, aligns: bool) -> Callable[..., list[Map]]:
    """The maps of an interpolation by its output's size, whether corners are aligned, and scales."""

    def maps(sizes: Sequence[int], *options: Any) -> list[Map]:
        corners, scales = options[: int(aligns)], options[int(aligns) :]
        scales = (*scales, *[None] * (len(sizes) - len(scales)))
        one = getattr(_ATEN, name)
        return [
            lambda x, m=m, scale=scale: one(x, [m], *corners, scale)  # type: ignore[misc]
            for m, scale in reversed(list(zip(sizes, scales, strict=True)))
        ]

    return maps


def _cubic(sizes: Sequence[int], corners: bool, *scales: float | None) -> list[Map]:
    """As along the last dimension of images of one line."""
    scales = (*scales, *[None] * (2 - len(scales)))
    return [
        lambda x, m=m, scale=scale: _ATEN.upsample_bicubic2d(x.unsqueeze(2), [1, m], corners, None, scale).squeeze(2)  # type: ignore[misc]
        for m, scale in reversed(list(zip(sizes, scales, strict=True)))
    ]


def _interpolation_backward(maps: Callable[..., list[Map]]) -> Callable[..., Tensor]:
    def formula(grad: Tensor, sizes: Sequence[int], input_sizes: Sequence[int], *options: Any) -> Tensor:
        return _transposed(grad, input_sizes, maps(sizes, *options))

    return formula


_INTERPOLATIONS = {
    **{f"upsample_nearest{n}d": _interpolations("upsample_nearest1d", False) for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": _interpolations("_upsample_nearest_exact1d", False) for n in (1, 2, 3)},
    "upsample_linear1d": _interpolations("upsample_linear1d", True),
    "upsample_bilinear2d": _interpolations("upsample_linear1d", True),
    "upsample_trilinear3d": _interpolations("upsample_linear1d", True),
    "upsample_bicubic2d": _cubic,
}
_WINDOWS = {
    **{f"reflection_pad{n}d": _pads("reflection_pad1d") for n in (1, 2, 3)},
    **{f"replication_pad{n}d": _pads("replication_pad1d") for n in (1, 2, 3)},
    **{f"avg_pool{n}d": _averages for n in (2, 3)},
}
_NAMED: dict[str, Callable[..., Any]] = {
    **{name: _forward(maps) for name, maps in (_INTERPOLATIONS | _WINDOWS).items()},
    **{f"{name}_backward": _backward(maps) for name, maps in _WINDOWS.items()},
    **{f"{name}_backward": _interpolation_backward(maps) for name, maps in _INTERPOLATIONS.items()},
    **{f"_adaptive_avg_pool{n}d": _forward(_adaptive) for n in (2, 3)},
    **{f"_adaptive_avg_pool{n}d_backward": _adaptive_backward(n) for n in (2, 3)},
}

declare({name: Operation(in_front, formula=formula) for name, formula in _NAMED.items()})
