"""Decompositions: operations that a step backward has written down as simpler ones, so that engines need to know few.

The formulas are torch's own where an operation does not have one in its record. Torch's live in a module that it does
not promise to keep: where one is missing, its operation is recorded as it is, and runs on torch operations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from unrolled.internals import decomposition_table
from unrolled.operations.operation import OPERATIONS, Cost, Operation, declare
from unrolled.operations.row_rules import Rows, along

_FORMULA_ONLY = """
    silu silu_backward gelu gelu_backward mish mish_backward softplus softplus_backward elu elu_backward leaky_relu
    leaky_relu_backward hardtanh hardtanh_backward hardswish_backward log_sigmoid_backward addcmul addcdiv xlogy celu
    selu _prelu_kernel_backward logit logit_backward logaddexp sinc glu_backward native_group_norm_backward
"""


declare(
    {
        **dict.fromkeys(_FORMULA_ONLY.split(), Operation(decomposed=True)),
        # Torch forgets to tag these as pointwise.
        **dict.fromkeys(
            ("hardswish", "log_sigmoid_forward", "_prelu_kernel"), Operation(Rows.pointwise, decomposed=True)
        ),
        "square": Operation(cost=Cost.LIGHT, decomposed=True),
        "logsumexp": Operation(along(1, 2), decomposed=True),
        **dict.fromkeys(("linalg_vector_norm", "norm"), Operation(along(2, 3), decomposed=True)),
        "aminmax": Operation(along(1, 2), decomposed=True),
        "_log_softmax": Operation(along(1, default=-1), decomposed=True),
        "_log_softmax_backward_data": Operation(along(2), decomposed=True),
        "native_layer_norm": Operation(Rows.layer_norm, cost=Cost.FUSED, decomposed=True),
        "native_layer_norm_backward": Operation(Rows.layer_norm_backward, decomposed=True),
    }
)


@cache
def _formulas() -> dict[Any, Callable[..., Any]]:
    known = decomposition_table()
    names = [name for name, operation in OPERATIONS.items() if operation.decomposed or operation.formula]
    packets = [getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name)]
    overloads = [getattr(packet, overload) for packet in packets for overload in packet.overloads()]
    own = {name: operation.formula for name, operation in OPERATIONS.items() if operation.formula is not None}
    return {overload: known[overload] for overload in overloads if overload in known} | {
        getattr(torch.ops.aten, name).default: formula for name, formula in own.items()
    }


def decomposition(func: Any) -> Callable[..., Any] | None:
    """What computes the same as an operation by simpler ones; None where there is nothing simpler."""
    return _formulas().get(func)
