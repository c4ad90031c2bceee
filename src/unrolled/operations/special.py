"""Special functions: the C of one entry each; those that C has not are in `engine/native/special.c`."""

from __future__ import annotations

from unrolled.operations.elementwise import Arithmetic
from unrolled.operations.layout import UnsupportedError
from unrolled.operations.nodes import View
from unrolled.operations.operation import Operation, declare, lowers
from unrolled.operations.row_rules import Rows
from unrolled.recording.program import Op

_EXPRESSIONS = {
    "lgamma": "FN(lgamma)({0})",
    "digamma": "(real)digamma({0})",
    "erfinv": "(real)erf_inverse({0})",
    "i0": "(real)(exp(ABS((double){0})) * scaled_bessel(0, {0}))",
    "special_i0e": "(real)scaled_bessel(0, {0})",
    "special_i1": "(real)(exp(ABS((double){0})) * scaled_bessel(1, {0}))",
    "special_i1e": "(real)scaled_bessel(1, {0})",
    "special_entr": "({0} > 0 ? -{0} * ur_log({0}) : {0} == 0 ? 0 : {0} != {0} ? {0} : -INFINITY)",
    "special_xlog1py": "({1} != {1} ? {1} : {0} == 0 ? 0 : {0} * ur_log1p({1}))",
    "logaddexp2": "(real)log2_of_sum({0}, {1})",
}

declare(
    {
        **{name: Operation(Rows.pointwise, expression=expression) for name, expression in _EXPRESSIONS.items()},
        # An expression that only nodes have.
        "trigamma": Operation(expression="(real)trigamma({0})"),
    }
)


class Special(Arithmetic):
    """Special functions that an argument chooses."""

    @lowers("polygamma", Operation(Rows.pointwise))
    def _polygamma(self, op: Op) -> list[View]:
        names = {0: "digamma", 1: "trigamma"}
        if op.args[0] not in names:
            raise UnsupportedError(f"polygamma of order {op.args[0]}")
        return [self.compute(names[op.args[0]], self.argument(op, 1))]
