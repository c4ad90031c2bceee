"""Losses of every entry, which a step may compute on the way: only one that adds up nothing has rows.

The formulas are torch's own, but for one that is written without composite operations. C declines a probability outside
of [0, 1], for which torch raises an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from unrolled.operations.elementwise import Arithmetic
from unrolled.operations.layout import RowLayout
from unrolled.operations.nodes import View
from unrolled.operations.operation import Operation, declare, lowers
from unrolled.operations.row_rules import Place, Rows
from unrolled.recording.program import Op


def _unreduced(reduction: int) -> Callable[[Rows], list[Place]]:
    """A rule for a loss, by the position of the argument that says how it is reduced."""

    def rule(rows: Rows) -> list[Place]:
        if rows.arg(reduction, 1) != 0:
            raise rows.refusal("adds up over the rows")
        return rows.pointwise()

    return rule


def _of_classes(read: int, reduction: int) -> Callable[[Rows], list[Place]]:
    """Likewise for one by the number of a class: it reads so many tensors with rows, and returns a total."""

    def rule(rows: Rows) -> list[Place]:
        if rows.arg(reduction, 1) != 0:
            raise rows.refusal("adds up over the rows")
        if any(rows.place(ref) != 0 for ref in rows.op.args[:read]) or len(rows.shape(rows.arg(read - 2))) < 2:
            raise rows.refusal("looks rows up in rows")
        return [0, *[None] * (len(rows.op.outputs) - 1)]

    return rule


def _loss(reduction: int) -> Operation:
    return Operation(_unreduced(reduction), decomposed=True)


def cross_entropy_of_logits(
    x: Tensor, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: int = 1
) -> Any:
    """`aten.binary_cross_entropy_with_logits` of every entry."""
    if reduction != 0:
        return NotImplemented
    of_no = x.clamp_min(0.0) + x.abs().neg().exp().log1p()  # the logarithm of 1 + exp(x)
    factor = 1 if pos_weight is None else (pos_weight - 1) * target + 1
    loss = (1 - target) * x + factor * (of_no - x)
    return loss if weight is None else loss * weight


declare(
    {
        **dict.fromkeys(("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"), _loss(2)),
        **dict.fromkeys(
            ("mse_loss_backward", "smooth_l1_loss_backward", "huber_loss_backward", "soft_margin_loss_backward"),
            _loss(3),
        ),
        "binary_cross_entropy_with_logits": Operation(_unreduced(4), formula=cross_entropy_of_logits),
        "binary_cross_entropy_backward": _loss(4),
        **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), Operation(_of_classes(2, 3), decomposed=True)),
        **dict.fromkeys(("nll_loss_backward", "nll_loss2d_backward"), Operation(_of_classes(3, 4), decomposed=True)),
        # An expression that only nodes have: minus the logarithms, no less than -100, of a probability and its rest.
        "surprise": Operation(
            expression="probable({0}, {declined}) + ({1} - 1) * ur_clamp(ur_log1p(-{0}), -100, NAN) "
            "- {1} * ur_clamp(ur_log({0}), -100, NAN)"
        ),
    }
)


class Losses(Arithmetic):
    """Losses that are no formula of torch's operations."""

    @lowers("binary_cross_entropy", Operation(_unreduced(3)))
    def _binary_cross_entropy(self, op: Op) -> list[View]:
        out: RowLayout = self.layout_of(op)
        chance, target, weight = (self.aligned(arg, out) for arg in (*op.args[:2], self._weight(op)))
        loss = self.compute("surprise", chance, target, dims=out.dims)
        return [loss if weight is None else self.compute("mul", loss, weight)]

    @staticmethod
    def _weight(op: Op) -> object:
        return op.args[2] if len(op.args) > 2 else None
