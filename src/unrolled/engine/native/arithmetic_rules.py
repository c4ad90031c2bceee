"""Lowering arithmetic whose expression an argument chooses, or that is several expressions."""

from __future__ import annotations

import torch

from unrolled.engine.native.nodes import View
from unrolled.engine.native.rules import Rules
from unrolled.recording.program import Op

_DIVISIONS = {None: "div", "floor": "floor_divide", "trunc": "trunc_divide"}


class ArithmeticRules(Rules):
    """Element-wise operations that are not one expression each."""

    def do_add(self, op: Op) -> list[View]:
        return [self.elementwise(op, "logical_or" if self.values[op.outputs[0]].dtype == torch.bool else "add")]

    def do_div(self, op: Op) -> list[View]:
        return [self.elementwise(op, _DIVISIONS[dict(op.kwargs).get("rounding_mode")], ["rounding_mode"])]

    do_true_divide = do_div

    def do_round(self, op: Op) -> list[View]:
        decimals = dict(op.kwargs).get("decimals", 0)
        if not decimals:
            return [self.elementwise(op, "round", ["decimals"])]
        view, power = self.aligned(op.args[0], self.layout_of(op)), 10.0 ** abs(decimals)
        there, back = ("mul", "div") if decimals > 0 else ("div", "mul")
        return [self.compute(back, self.compute("round", self.compute(there, view, power)), power)]

    def do_nan_to_num(self, op: Op) -> list[View]:
        view, limits = self.aligned(op.args[0], self.layout_of(op)), torch.finfo(self.real)
        numbers = [self.given(op, index) for index in (1, 2, 3)]
        instead = [
            number if number is not None else limit
            for number, limit in zip(numbers, (0.0, limits.max, limits.min), strict=True)
        ]
        return [self.compute("nan_to_num", view, *instead)]
