"""Operations over the places of an image, a volume or a signal: convolution, pooling, resampling, normalisation.

torch has the rows of these in front, `[B, channels, places...]`, and works on each by itself. The gradient of a
convolution is two operations here: that of the input is a convolution again, row by row; that of the weights adds up
over the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.operations.operation import Operation, declare
from unrolled.operations.row_rules import Place, Rows
from unrolled.recording.program import Size


def in_front(rows: Rows) -> list[Place]:
    """What is done for each row by itself, the rows in front of all that has any."""
    for value in rows.op.inputs:
        if rows.places.get(value) not in (None, 0):
            raise rows.refusal("works along the rows")
    if not all(v < 0 or isinstance(rows.program.values[v].shape[0], Size) for v in rows.op.outputs):
        raise rows.refusal("sums over the rows")
    return rows.all_at(0)


def convolution_rows(rows: Rows) -> list[Place]:
    """Row by row, by weights that are the same for all rows."""
    if any(rows.place(ref) is not None for ref in rows.op.args[1:3]):
        raise rows.refusal("has weights with rows")
    return in_front(rows)


def _batch_norm(grads: int, training: int) -> Callable[[Rows], list[Place]]:
    """A rule for batch norm, whose arguments begin with so many gradients and have a bool for `training` there.

    By running statistics each row is normalised by itself; else each channel, which is a row's if the rows are in it.
    """

    def rule(rows: Rows) -> list[Place]:
        read, weights = rows.op.args[: grads + 1], rows.op.args[grads + 1 : training]
        places = {rows.place(ref) for ref in read}
        weighed = {rows.place(ref) for ref in weights} - {None}
        others = len(rows.op.outputs) - 1
        if (
            places == {0}
            and not rows.arg(training)
            and not weighed
            and not (grads and any(v >= 0 for v in rows.op.outputs[1:]))
        ):
            return [0, *[None] * others]
        if places == {1} and rows.arg(training) and weighed <= {0}:
            return [1, *[0] * others]
        raise rows.refusal("normalises over the rows, or sums over them")

    return rule


def _dimensions(name: str, *counts: int) -> list[str]:
    """The names of an operation for so many dimensions of places, and those of its derivatives."""
    return [f"{name.format(n)}{end}" for n in counts for end in ("", "_backward")]


_BY_ROW = [
    *_dimensions("_upsample_bilinear{}d_aa", 2),
    *_dimensions("_upsample_bicubic{}d_aa", 2),
    *_dimensions("grid_sampler_{}d", 2, 3),
    *("affine_grid_generator", "avg_pool1d", "max_pool1d"),
]

# By torch's own formulas.
_BY_FORMULA = ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")


def convolution_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> Any:
    """`aten.convolution_backward` as one operation for each gradient, if more than that of the weights is wanted."""
    if list(wanted) == [False, True, False]:
        return NotImplemented
    options = stride, padding, dilation
    of_input = of_weight = of_bias = None
    if wanted[0]:
        sizes = zip(input.shape[2:], grad.shape[2:], weight.shape[2:], *options, strict=True)
        # What a stride skips at the end is not reached again by going the other way.
        rest = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in sizes]
        more = [0] * len(rest) if transposed else rest
        of_input = torch.ops.aten.convolution.default(grad, weight, None, *options, not transposed, more, groups)
    if wanted[1]:
        rule = torch.ops.aten.convolution_backward.default
        given = grad, input, weight, None, *options, transposed, output_padding, groups
        of_weight = rule(*given, [False, True, False])[1]
    if wanted[2]:
        of_bias = grad.sum([0, *range(2, grad.dim())])
    return of_input, of_weight, of_bias


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """`aten.native_batch_norm` by running statistics: a scale and a shift for each channel."""
    if training or running_mean is None or running_var is None:
        return NotImplemented
    by_channel = [1, -1, *[1] * (input.dim() - 2)]
    normal = (input - running_mean.view(by_channel)) * (running_var + eps).rsqrt().view(by_channel)
    result = normal if weight is None else normal * weight.view(by_channel)
    result = result if bias is None else result + bias.view(by_channel)
    return result, input.new_zeros(0), input.new_zeros(0)


def batch_norm_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    deviation: Tensor | None,
    training: bool,
    eps: float,
    wanted: Sequence[bool],
) -> Any:
    """`aten.native_batch_norm_backward` by running statistics."""
    if training or running_mean is None or running_var is None:
        return NotImplemented
    over, by_channel = [0, *range(2, grad.dim())], [1, -1, *[1] * (grad.dim() - 2)]
    factor = (running_var + eps).rsqrt().view(by_channel)
    of_weight = (grad * ((input - running_mean.view(by_channel)) * factor)).sum(over) if wanted[1] else None
    of_normal = grad if weight is None else grad * weight.view(by_channel)
    return of_normal * factor, of_weight, grad.sum(over) if wanted[2] else None


def group_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, N: int, C: int, places: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`aten.native_group_norm`: torch's own formula sets strides, which tells nobody where the rows are."""
    grouped, by_channel = input.reshape([N, groups, C // groups * places]), [1, C, *[1] * (input.dim() - 2)]
    variance, mean = torch.var_mean(grouped, [2], unbiased=False, keepdim=True)
    factor = (variance + eps).rsqrt()
    result = ((grouped - mean) * factor).reshape(input.shape)
    result = result if weight is None else result * weight.view(by_channel)
    result = result if bias is None else result + bias.view(by_channel)
    return result, mean.view([N, groups]), factor.view([N, groups])


declare(
    {
        **dict.fromkeys(_BY_ROW, Operation(in_front)),
        **dict.fromkeys(_BY_FORMULA, Operation(in_front, decomposed=True)),
        "convolution_backward": Operation(convolution_rows, contracts=(0, 0, None), formula=convolution_backward),
        "native_batch_norm": Operation(_batch_norm(0, 5), formula=batch_norm),
        "native_batch_norm_backward": Operation(_batch_norm(1, 7), formula=batch_norm_backward),
        "native_group_norm": Operation(Rows.group_norm, formula=group_norm),
    }
)
