"""Integers: the C of one entry where all that an operation reads are whole numbers, and what else they need.

Their arithmetic is done in 64 bits and wraps around, as torch's does; what is stored in fewer bits is cut off there.
A division by zero is an error that torch is left to raise (see `places.c`, `decline`).
"""

from __future__ import annotations

from dataclasses import replace

from unrolled.operations.operation import OPERATIONS, Operation, declare
from unrolled.operations.row_rules import Rows

# Expressions that hold for whole numbers as they stand, and give the same.
_AS_IT_STANDS = """
    literal same cast eq ne lt le gt ge maximum minimum where masked_fill clamp_min clamp_max sign sgn relu
    logical_not logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__ threshold
"""

_OF_INTEGERS = {
    "add": "int_add({0}, {1})",
    "sub": "int_sub({0}, {1})",
    "rsub": "int_sub({1}, {0})",
    "mul": "int_mul({0}, {1})",
    "neg": "int_sub(0, {0})",
    "abs": "({0} < 0 ? int_sub(0, {0}) : {0})",
    "bitwise_not": "(~{0})",
    "floor_divide": "int_floor_divide({0}, {1}, {declined})",
    "trunc_divide": "int_trunc_divide({0}, {1}, {declined})",
    "remainder": "int_remainder({0}, {1}, {declined})",
    "fmod": "int_fmod({0}, {1}, {declined})",
    "pow": "int_power({0}, {1})",
}

declare(
    {
        **dict.fromkeys(
            ("__lshift__", "bitwise_left_shift"),
            Operation(integers="int_shift_left({0}, {1}, 8 * (int64_t)sizeof({type}))", rows=Rows.pointwise),
        ),
        **dict.fromkeys(
            ("__rshift__", "bitwise_right_shift"),
            Operation(integers="int_shift_right({0}, {1}, 8 * (int64_t)sizeof({type}))", rows=Rows.pointwise),
        ),
    }
)
for _name in _AS_IT_STANDS.split():
    OPERATIONS[_name] = replace(OPERATIONS[_name], integers=OPERATIONS[_name].expression)
for _name, _expression in _OF_INTEGERS.items():
    OPERATIONS[_name] = replace(OPERATIONS[_name], integers=_expression)
