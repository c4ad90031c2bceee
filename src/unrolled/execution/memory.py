"""Memory of long sequences: torch's, with large pages asked for where it is large.

A tensor of a hundred megabytes is new memory at every call, and the system hands it out page by page at the first
write: with small pages that takes longer than the arithmetic.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGE = 4 << 20  # bytes
_PAGE = 2 << 20


def _madvise() -> ctypes._NamedFuncPointer | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        return ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None


_MADVISE = _madvise()


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Uninitialised memory of torch's.

    Args:
        shape: of the tensor.
        dtype: of its numbers.
        device: where; by default torch's own default.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if tensor.nbytes >= _LARGE and _MADVISE is not None and tensor.device.type == "cpu":
        begin = -(-tensor.data_ptr() // _PAGE) * _PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
        # Advice only: where it is not taken, nothing else changes.
        _MADVISE(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)
    return tensor


def materialized(tensor: Tensor) -> Tensor:
    """The tensor such that its numbers are where its pointer says.

    Autograd hands on zeros that have no memory, and a view may be negated only when torch reads it.
    """
    return tensor.clone() if tensor.is_neg() or not tensor.data_ptr() else tensor
