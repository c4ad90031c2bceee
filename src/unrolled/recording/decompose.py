"""Decompositions: operations that are written down as simpler ones, so that engines need to know few.

The formulas are torch's own. They live in a module that torch does not promise to keep: where one is missing, its
operation is recorded as it is, and runs on torch operations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from unrolled.internals import decomposition_table

_NAMES = """
    native_layer_norm native_layer_norm_backward _log_softmax _log_softmax_backward_data
    silu silu_backward gelu gelu_backward mish mish_backward softplus softplus_backward elu elu_backward
    leaky_relu leaky_relu_backward hardtanh hardtanh_backward hardswish hardswish_backward
    log_sigmoid_forward log_sigmoid_backward addcmul addcdiv logsumexp xlogy celu selu linalg_vector_norm
    norm square rsub glu_backward _prelu_kernel _prelu_kernel_backward
    logit logit_backward logaddexp sinc native_group_norm native_group_norm_backward
""".split()


@cache
def _table() -> dict[Any, Callable[..., Any]]:
    formulas = decomposition_table()
    packets = [getattr(torch.ops.aten, name) for name in _NAMES if hasattr(torch.ops.aten, name)]
    overloads = [getattr(packet, overload) for packet in packets for overload in packet.overloads()]
    return {overload: formulas[overload] for overload in overloads if overload in formulas}


def decomposition(func: Any) -> Callable[..., Any] | None:
    """What computes the same as an operation by simpler ones; None where there is nothing simpler."""
    return _table().get(func)
