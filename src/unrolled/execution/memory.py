"""Memory of long sequences: torch's, with large pages asked for where it is large.

A tensor of a hundred megabytes is new memory at every call, and the system hands it out page by page at the first
write: with small pages that takes longer than the arithmetic.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_PAGE = 2 << 20  # bytes of a large page


@cache
def _madvise() -> ctypes._NamedFuncPointer | None:
    """The system's function for advice on memory, where it knows of large pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        return ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Uninitialised memory of torch's.

    Args:
        shape: of the tensor.
        dtype: of its numbers.
        device: where; by default torch's own default.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if tensor.nbytes >= 2 * _PAGE and tensor.device.type == "cpu":
        madvise = _madvise()
        begin = -(-tensor.data_ptr() // _PAGE) * _PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
        if madvise is not None:  # advice only: where it is not taken, nothing else changes
            madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)
    return tensor


def materialized(tensor: Tensor) -> Tensor:
    """The tensor such that its numbers are where its pointer says.

    Autograd passes on zeros that have no memory, and a view may be negated only when torch reads it.
    """
    return tensor.clone() if tensor.is_neg() or not tensor.data_ptr() else tensor
