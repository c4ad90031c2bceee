"""Element-wise operations: the C of one entry each, and what it costs.

`{0}`, `{1}`, ... are the entries of the arguments. Conditions are written such that NaN comes out where torch has it: a
condition on NaN is false. Functions that are not C's own are in `engine/native/kernels.c`.
"""

from __future__ import annotations

import torch

from unrolled.operations.lowering import Lowering
from unrolled.operations.nodes import View
from unrolled.operations.operation import Cost, Linear, Operation, declare, lowers
from unrolled.operations.row_rules import Rows
from unrolled.recording.program import Op


def _c(expression: str, cost: Cost = Cost.HEAVY, linear: Linear | None = None) -> Operation:
    """An operation that is this C for each entry."""
    return Operation(expression=expression, cost=cost, linear=linear)


_ONE_ARGUMENT = "tan sinh cosh asin acos atan asinh acosh atanh exp2 log2 log10 erfc floor ceil trunc"
_TWO_ARGUMENTS = "atan2 hypot copysign fmod fmin fmax"
_SHRINK = (("lambd", 0.5),)

# Expressions that only nodes have: no operation of torch bears these names.
declare(
    {
        "literal": _c("{0}", Cost.REGISTER),
        "same": _c("{0}", Cost.REGISTER),
        "cast": _c("({type})({0})", Cost.REGISTER),
        "cut_off": _c("({type})(sizeof({type}) < 8 ? int32_of({0}) : int64_of({0}))", Cost.REGISTER),
        "trunc_divide": _c("FN(trunc)({0} / {1})"),
    }
)

declare(
    {
        "sub": _c("({0} - {1})", Cost.REGISTER, Linear.JOINTLY),
        "rsub": Operation(expression="({1} - {0})", cost=Cost.REGISTER, decomposed=True),
        "mul": _c("({0} * {1})", Cost.REGISTER, Linear.EACH),
        "neg": _c("(-{0})", Cost.REGISTER, Linear.JOINTLY),
        "reciprocal": _c("(1 / {0})", Cost.LIGHT),
        "floor_divide": Operation(Rows.pointwise, expression="ur_floor_divide({0}, {1})"),
        "remainder": _c("ur_remainder({0}, {1})"),
        "abs": _c("ABS({0})", Cost.LIGHT),
        "sign": _c("(({0} > 0) - ({0} < 0))"),
        "sgn": _c("(({0} > 0) - ({0} < 0))"),
        "frac": _c("({0} - FN(trunc)({0}))"),
        "sqrt": _c("SQRT({0})", Cost.FUSED),
        "rsqrt": _c("(1 / SQRT({0}))", Cost.FUSED),
        "pow": _c("ur_pow({0}, {1})", Cost.FUSED),
        "exp": _c("ur_exp({0})", Cost.LIGHT),
        "expm1": _c("EXPM1({0})", Cost.FUSED),
        "log": _c("ur_log({0})", Cost.FUSED),
        "log1p": _c("ur_log1p({0})", Cost.FUSED),
        "sin": _c("FN(sin)({0})", Cost.FUSED),
        "cos": _c("FN(cos)({0})", Cost.FUSED),
        "erf": _c("FN(erf)({0})", Cost.FUSED),
        **{name: _c(f"FN({name})({{0}})") for name in _ONE_ARGUMENT.split()},
        **{name: _c(f"FN({name})({{0}}, {{1}})") for name in _TWO_ARGUMENTS.split()},
        "lerp": _c("(ABS({2}) < (real)0.5 ? {0} + {2} * ({1} - {0}) : {1} - ({1} - {0}) * (1 - {2}))", Cost.FUSED),
    }
)

# Activations, and what their derivatives are made of.
declare(
    {
        "tanh": _c("ur_tanh({0})", Cost.LIGHT),
        "tanh_backward": _c("({0} * (1 - {1} * {1}))", Cost.FUSED),
        "sigmoid": _c("ur_sigmoid({0})", Cost.LIGHT),
        "sigmoid_backward": _c("({0} * ({1} * (1 - {1})))", Cost.FUSED),
        "relu": _c("({0} < 0 ? 0 : {0})", Cost.LIGHT),
        "threshold": _c("({0} <= {1} ? {2} : {0})"),
        "threshold_backward": _c("({1} <= {2} ? 0 : {0})", Cost.FUSED),
        "hardsigmoid": _c("(ur_clamp({0} + 3, 0, 6) / 6)"),
        # torch's own factor is a float, whatever the dtype.
        "hardsigmoid_backward": Operation(
            Rows.pointwise, expression="(({1} > -3) & ({1} < 3) ? {0} * (real)(1.0f / 6.0f) : 0)"
        ),
        "hardshrink": Operation(expression="(({0} >= -{1}) & ({0} <= {1}) ? 0 : {0})", keywords=_SHRINK),
        "softshrink": Operation(
            expression="({0} > {1} ? {0} - {1} : {0} < -{1} ? {0} + {1} : 0 * {0})", keywords=_SHRINK
        ),
        **dict.fromkeys(
            ("hardshrink_backward", "softshrink_backward"),
            Operation(Rows.pointwise, expression="(({1} >= -{2}) & ({1} <= {2}) ? 0 : {0})", keywords=_SHRINK),
        ),
    }
)

# Comparisons, choices, and logic on bools.
declare(
    {
        "gt": _c("({0} > {1})", Cost.LIGHT),
        "ge": _c("({0} >= {1})", Cost.LIGHT),
        "lt": _c("({0} < {1})", Cost.LIGHT),
        "le": _c("({0} <= {1})", Cost.LIGHT),
        "eq": _c("({0} == {1})", Cost.LIGHT),
        "ne": _c("({0} != {1})", Cost.LIGHT),
        "isnan": _c("({0} != {0})"),
        "isinf": _c("(ABS({0}) == INFINITY)"),
        "isfinite": _c("(ABS({0}) < INFINITY)"),
        "signbit": _c("(signbit({0}) != 0)"),
        "heaviside": _c("({0} == 0 ? {1} : (real)({0} > 0))"),
        "maximum": _c("(({0} > {1}) | ({0} != {0}) ? {0} : {1})", Cost.LIGHT),
        "minimum": _c("(({0} < {1}) | ({0} != {0}) ? {0} : {1})", Cost.LIGHT),
        "clamp_min": _c("({0} < {1} ? {1} : {0})", Cost.LIGHT),
        "clamp_max": _c("({0} > {1} ? {1} : {0})", Cost.LIGHT),
        "where": Operation(Rows.pointwise, expression="({0} ? {1} : {2})", cost=Cost.LIGHT, condition=0),
        "masked_fill": Operation(expression="({1} ? {2} : {0})", cost=Cost.FUSED, condition=1),
        "logical_not": _c("(!{0})", Cost.LIGHT),
        "logical_and": _c("(({0} != 0) & ({1} != 0))", Cost.LIGHT),
        "logical_or": _c("(({0} != 0) | ({1} != 0))", Cost.LIGHT),
        "logical_xor": _c("(({0} != 0) ^ ({1} != 0))"),
        "bitwise_not": _c("(!{0})", Cost.LIGHT),
        "bitwise_and": _c("({0} & {1})", Cost.LIGHT),
        "bitwise_or": _c("({0} | {1})"),
        "bitwise_xor": _c("({0} ^ {1})"),
        "__and__": Operation(Rows.pointwise, expression="({0} & {1})"),
        "__or__": Operation(Rows.pointwise, expression="({0} | {1})"),
        "__xor__": Operation(Rows.pointwise, expression="({0} ^ {1})"),
    }
)

_DIVISIONS = {None: "div", "floor": "floor_divide", "trunc": "trunc_divide"}


class Arithmetic(Lowering):
    """Element-wise operations whose expression depends on an argument, or that are several expressions."""

    @lowers("add", _c("({0} + {1})", Cost.REGISTER, Linear.JOINTLY))
    def _add(self, op: Op) -> list[View]:
        return [self.elementwise(op, "logical_or" if self.values[op.outputs[0]].dtype == torch.bool else "add")]

    @lowers(
        "clamp",
        Operation(expression="ur_clamp({0}, {1}, {2})", cost=Cost.LIGHT, keywords=(("min", None), ("max", None))),
    )
    def _clamp(self, op: Op) -> list[View]:
        """Bounds that are not there are NaN, which integers have not."""
        keywords, dtype = dict(op.kwargs), self.values[op.outputs[0]].dtype
        if dtype == self.real:
            return [self.elementwise(op, "clamp")]
        view, out = self.argument(op, 0), self.layout_of(op)
        for number, bound in ((1, "min"), (2, "max")):
            limit = self.aligned(op.args[number] if len(op.args) > number else keywords.get(bound), out)
            if limit is not None:
                view = self.compute(f"clamp_{bound}", view, limit, dims=out.dims, dtype=self.checked(dtype))
        return [view]

    @lowers("div", _c("({0} / {1})", Cost.LIGHT))
    @lowers("true_divide", Operation())
    def _div(self, op: Op) -> list[View]:
        return [self.elementwise(op, _DIVISIONS[dict(op.kwargs).get("rounding_mode")], ["rounding_mode"])]

    @lowers("round", _c("RINT({0})"))
    def _round(self, op: Op) -> list[View]:
        decimals = dict(op.kwargs).get("decimals", 0)
        if not decimals:
            return [self.elementwise(op, "round", ["decimals"])]
        view, power = self.aligned(op.args[0], self.layout_of(op)), 10.0 ** abs(decimals)
        there, back = ("mul", "div") if decimals > 0 else ("div", "mul")
        return [self.compute(back, self.compute("round", self.compute(there, view, power)), power)]

    @lowers("nan_to_num", _c("({0} != {0} ? {1} : {0} == INFINITY ? {2} : {0} == -INFINITY ? {3} : {0})"))
    def _nan_to_num(self, op: Op) -> list[View]:
        view, limits = self.aligned(op.args[0], self.layout_of(op)), torch.finfo(self.real)
        numbers = [self.argument(op, index) for index in (1, 2, 3)]
        instead = [
            number if number is not None else limit
            for number, limit in zip(numbers, (0.0, limits.max, limits.min), strict=True)
        ]
        return [self.compute("nan_to_num", view, *instead)]
