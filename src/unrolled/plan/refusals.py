"""Why a call is left to the reference engine before anything is recorded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["why_not_recorded"]


def why_not_recorded(tensors: Iterable[Tensor]) -> str | None:
    """The reason why a call on these tensors can only be run by the reference; None if there is none.

    Args:
        tensors: all of inputs, state, context, parameters and buffers.
    """
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"a tensor is a {type(tensor).__name__}, which may compute in its own way"
        if torch.is_autocast_enabled(tensor.device.type):
            return "under autocast torch chooses the dtype of each operation as it runs"
        if not _has_memory(tensor):
            return "inside of a transform of torch.func"
        if forward_ad.unpack_dual(tensor).tangent is not None:
            return "forward-mode derivatives"
    return None


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor is one, and not a stand-in for many as in vmap: those have no memory of their own."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True
