"""Windows: the derivative of a view of them, and images cut into patches; what several windows read is added up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unrolled.operations.operation import Operation, declare
from unrolled.operations.row_rules import Place, Rows
from unrolled.operations.spatial import in_front


def _rows(rows: Rows) -> list[Place]:
    place, rank = rows.place(rows.arg(0)), len(rows.out())
    if place is None or place in (rank, rows.arg(2) % rank):
        raise rows.refusal("works along the rows")
    return [place]


def unfold_backward(grad: Tensor, sizes: Sequence[int], dim: int, size: int, step: int) -> Tensor:
    """`aten.unfold_backward`: of windows `[..., n, ..., size]` along `dim`."""
    return _added_up(grad, -1, dim % len(sizes), sizes[dim], 1, step)


def im2col(
    x: Tensor, kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """`aten.im2col`: the patches of `[..., C, height, width]`, `[..., C * patch, number of patches]`."""
    (down, across), rank = padding, x.dim()
    x = torch.ops.aten.constant_pad_nd(x, [across, across, down, down])
    for dim, k, d, s in zip((rank - 2, rank - 1), kernel, dilation, stride, strict=True):
        x = torch.ops.aten.slice(x.unfold(dim, d * (k - 1) + 1, s), -1, 0, None, d)
    *channels, m, n, _, _ = x.shape
    patches = x.permute([*range(rank - 2), rank, rank + 1, rank - 2, rank - 1])
    return patches.reshape([*channels[:-1], channels[-1] * kernel[0] * kernel[1], m * n])


def col2im(
    patches: Tensor,
    sizes: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    """`aten.col2im`: the other way, patches that overlap added up."""
    options = list(zip(sizes, kernel, dilation, padding, stride, strict=True))
    counts = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in options]
    *batch, entries, _ = patches.shape
    x = patches.reshape([*batch, entries // (kernel[0] * kernel[1]), *kernel, *counts])
    rank = len(batch) + 3
    # Dimensions of places in a patch stand before those of patches: `[..., kh, kw, m, n]`, then `[..., kw, height, n]`.
    for within, along, (n, _, d, p, s) in zip((rank - 2, rank - 2), (rank - 1, rank - 1), options, strict=True):
        x = _added_up(x, within, along, n + 2 * p, d, s)
    for dim, (n, _, _, p, _) in zip((rank - 2, rank - 1), options, strict=True):
        x = torch.ops.aten.slice(x, dim, p, p + n)
    return x


def _added_up(x: Tensor, within: int, along: int, size: int, dilation: int, step: int) -> Tensor:
    """Windows as one dimension of so many places: `within` a window goes, and `along` the windows is what is left."""
    parts = []
    for place in range(x.shape[within]):
        part, start = x.select(within, place), place * dilation
        sizes = [*part.shape[:along], size, *part.shape[along + 1 :]]
        end = start + (part.shape[along] - 1) * step + 1
        parts.append(torch.ops.aten.slice_backward(part, sizes, along, start, end, step))
    return sum(parts[1:], parts[0])


declare(
    {
        "unfold_backward": Operation(_rows, formula=unfold_backward),
        "im2col": Operation(in_front, formula=im2col),
        "col2im": Operation(in_front, formula=col2im),
    }
)
