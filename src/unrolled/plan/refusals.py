"""Why a call is left to the reference engine before anything is recorded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from unrolled.internals import has_memory, watching


def why_not_recorded(tensors: Iterable[Tensor]) -> str | None:
    """The reason why a call on these tensors can only be run by the reference; None if there is none.

    Args:
        tensors: all of inputs, state, context, parameters and buffers.
    """
    looking_on = watching()
    if looking_on is not None:
        return looking_on
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"a tensor is a {type(tensor).__name__}, which may compute in its own way"
        if torch.is_autocast_enabled(tensor.device.type):
            return "under autocast torch chooses the dtype of each operation as it runs"
        if not has_memory(tensor):
            return "inside of a transform of torch.func"
        if forward_ad.unpack_dual(tensor).tangent is not None:
            return "forward-mode derivatives"
    return None
