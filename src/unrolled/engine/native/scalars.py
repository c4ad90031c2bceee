"""Element-wise operations in C: one expression each, for a row's entries `{0}`, `{1}`, ..."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Scalar: TypeAlias = int | float | bool | None


@dataclass(frozen=True)
class Elementwise:
    """An operation on entries.

    Attributes:
        expression: C, with `{0}`, `{1}`, ... for the arguments.
        cheap: whether to compute it twice costs less than to store it.
        named: keyword arguments that follow the positional ones, with their defaults.
    """

    expression: str
    cheap: bool = False
    named: tuple[tuple[str, Any], ...] = ()

    def keywords(self, given: Mapping[str, Any]) -> list[Any]:
        """The values of the keyword arguments, in order."""
        return [given.get(name, default) for name, default in self.named]


def _cheap(expression: str) -> Elementwise:
    return Elementwise(expression, cheap=True)


_ONE_ARGUMENT = (
    "sin cos tan sinh cosh asin acos atan asinh acosh atanh exp2 log2 log10 erf erfc floor ceil trunc".split()
)

_SHRINK = (("lambd", 0.5),)

# Comparisons are written such that NaN comes out where torch has it: a condition on NaN is false.
ELEMENTWISE: dict[str, Elementwise] = {
    "literal": _cheap("{0}"),
    "copy": _cheap("{0}"),
    "cast": _cheap("({type})({0})"),
    "add": _cheap("({0} + {1})"),
    "sub": _cheap("({0} - {1})"),
    "rsub": _cheap("({1} - {0})"),
    "mul": _cheap("({0} * {1})"),
    "neg": _cheap("(-{0})"),
    "div": Elementwise("({0} / {1})"),
    "reciprocal": Elementwise("(1 / {0})"),
    "abs": Elementwise("ABS({0})"),
    "sqrt": Elementwise("SQRT({0})"),
    "rsqrt": Elementwise("(1 / SQRT({0}))"),
    "exp": Elementwise("ur_exp({0})"),
    "log": Elementwise("ur_log({0})"),
    "log1p": Elementwise("ur_log1p({0})"),
    "expm1": Elementwise("EXPM1({0})"),
    "tanh": Elementwise("ur_tanh({0})"),
    "sigmoid": Elementwise("ur_sigmoid({0})"),
    **{name: Elementwise(f"FN({name})({{0}})") for name in _ONE_ARGUMENT},
    "round": Elementwise("RINT({0})"),
    "frac": Elementwise("({0} - FN(trunc)({0}))"),
    "signbit": Elementwise("(signbit({0}) != 0)"),
    "isnan": Elementwise("({0} != {0})"),
    "isinf": Elementwise("(ABS({0}) == INFINITY)"),
    "isfinite": Elementwise("(ABS({0}) < INFINITY)"),
    "nan_to_num": Elementwise("({0} != {0} ? {1} : {0} == INFINITY ? {2} : {0} == -INFINITY ? {3} : {0})"),
    "relu": Elementwise("({0} < 0 ? 0 : {0})"),
    "sign": Elementwise("(({0} > 0) - ({0} < 0))"),
    "sgn": Elementwise("(({0} > 0) - ({0} < 0))"),
    "heaviside": Elementwise("({0} == 0 ? {1} : (real)({0} > 0))"),
    "threshold": Elementwise("({0} <= {1} ? {2} : {0})"),
    **{
        name: Elementwise(f"FN({name})({{0}}, {{1}})")
        for name in ("atan2", "hypot", "copysign", "fmod", "fmin", "fmax")
    },
    "remainder": Elementwise("ur_remainder({0}, {1})"),
    "floor_divide": Elementwise("ur_floor_divide({0}, {1})"),
    "trunc_divide": Elementwise("FN(trunc)({0} / {1})"),
    "pow": Elementwise("ur_pow({0}, {1})"),
    "maximum": Elementwise("(({0} > {1}) | ({0} != {0}) ? {0} : {1})"),
    "minimum": Elementwise("(({0} < {1}) | ({0} != {0}) ? {0} : {1})"),
    "where": Elementwise("({0} ? {1} : {2})"),
    "masked_fill": Elementwise("({1} ? {2} : {0})"),
    "lerp": Elementwise("(ABS({2}) < (real)0.5 ? {0} + {2} * ({1} - {0}) : {1} - ({1} - {0}) * (1 - {2}))"),
    "gt": Elementwise("({0} > {1})"),
    "ge": Elementwise("({0} >= {1})"),
    "lt": Elementwise("({0} < {1})"),
    "le": Elementwise("({0} <= {1})"),
    "eq": Elementwise("({0} == {1})"),
    "ne": Elementwise("({0} != {1})"),
    "logical_not": Elementwise("(!{0})"),
    "logical_and": Elementwise("(({0} != 0) & ({1} != 0))"),
    "logical_or": Elementwise("(({0} != 0) | ({1} != 0))"),
    "bitwise_not": Elementwise("(!{0})"),
    "bitwise_and": Elementwise("({0} & {1})"),
    "logical_xor": Elementwise("(({0} != 0) ^ ({1} != 0))"),
    "bitwise_xor": Elementwise("({0} ^ {1})"),
    "bitwise_or": Elementwise("({0} | {1})"),
    "__xor__": Elementwise("({0} ^ {1})"),
    "__and__": Elementwise("({0} & {1})"),
    "__or__": Elementwise("({0} | {1})"),
    "clamp": Elementwise("ur_clamp({0}, {1}, {2})", named=(("min", None), ("max", None))),
    "clamp_min": Elementwise("({0} < {1} ? {1} : {0})"),
    "clamp_max": Elementwise("({0} > {1} ? {1} : {0})"),
    "hardsigmoid": Elementwise("(ur_clamp({0} + 3, 0, 6) / 6)"),
    # torch's own factor is a float, whatever the dtype.
    "hardsigmoid_backward": Elementwise("(({1} > -3) & ({1} < 3) ? {0} * (real)(1.0f / 6.0f) : 0)"),
    "hardshrink": Elementwise("(({0} >= -{1}) & ({0} <= {1}) ? 0 : {0})", named=_SHRINK),
    "softshrink": Elementwise("({0} > {1} ? {0} - {1} : {0} < -{1} ? {0} + {1} : 0 * {0})", named=_SHRINK),
    **{
        name: Elementwise("(({1} >= -{2}) & ({1} <= {2}) ? 0 : {0})", named=_SHRINK)
        for name in ("hardshrink_backward", "softshrink_backward")
    },
    "sigmoid_backward": Elementwise("({0} * ({1} * (1 - {1})))"),
    "tanh_backward": Elementwise("({0} * (1 - {1} * {1}))"),
    "threshold_backward": Elementwise("({1} <= {2} ? 0 : {0})"),
}


def literal(number: Scalar) -> str:
    """A number as C, exactly; None as an endless bound is written by who knows which."""
    if number is None:
        return "NAN"
    if isinstance(number, bool | int):
        return f"((real){int(number)})"
    if math.isnan(number):
        return "((real)NAN)"
    if math.isinf(number):
        return f"((real){'-' if number < 0 else ''}INFINITY)"
    return f"((real){number.hex()})"
