"""Products of large matrices by the native engine's own kernel: for what is hoisted out of loops.

torch's BLAS takes a third to a half of what some processors can give; the kernel that the loops need anyway takes most
of it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from unrolled.engine.native.build import BuildError
from unrolled.engine.native.runtime import runtime
from unrolled.engine.native.threads import team
from unrolled.execution.memory import allocate, materialized
from unrolled.operations.nodes import View, contiguous


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    try:
        return runtime(dtype)
    except BuildError:
        return None


@cache
def _panel(dtype: torch.dtype) -> int:
    """How many columns a panel has."""
    columns: int = runtime(dtype).ur_panel()
    return columns


def packed_bytes(K: int, N: int, dtype: torch.dtype) -> int:
    """How much memory a matrix `[K, N]` takes that is packed."""
    panel = _panel(dtype)
    return -(-N // panel) * panel * K * dtype.itemsize


@dataclass(frozen=True)
class PackedMatrix:
    """A tensor, viewed as a matrix, in panels of columns, as loops read it.

    Attributes:
        dims: its dimensions `[K..., N]`.
        strides: how far apart their entries are in a contiguous tensor; negative for a dimension in reverse.
        offset: where its first entry is.
    """

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: View) -> PackedMatrix:
        """That of a view of a fixed value."""
        return cls(view.dims, view.strides, view.offset)

    def lying(self, tensor: Tensor) -> tuple[int, int, int, int, int] | None:
        """Where the matrix lies in a tensor: its first entry, K, N, how far apart its rows and columns are.

        None if it cannot be read there: it would have to be copied first.
        """
        if min(self.strides) < 0 or not (tensor.is_contiguous() or self._is_all_of(tensor)):
            return None
        matrix = self._matrix(tensor)
        if matrix.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            return None
        K, N = matrix.shape
        return matrix.storage_offset() - tensor.storage_offset(), K, N, *matrix.stride()

    def __call__(self, tensor: Tensor) -> Tensor:
        """Pack a tensor.

        Raises:
            BuildError: if the kernel cannot be built.
        """
        matrix = self._matrix(tensor)
        K, N = matrix.shape
        packed = torch.empty(packed_bytes(K, N, matrix.dtype) // matrix.itemsize, dtype=matrix.dtype)
        runtime(matrix.dtype).ur_pack(packed.data_ptr(), matrix.data_ptr(), K, N, *matrix.stride())
        return packed

    def _matrix(self, tensor: Tensor) -> Tensor:
        matrix = tensor if self._is_all_of(tensor) else self._viewed(tensor.contiguous())
        return matrix if matrix.dim() == 2 else matrix.flatten(0, -2)

    def _is_all_of(self, tensor: Tensor) -> bool:
        return self._whole and self.dims == tensor.shape

    @cached_property
    def _whole(self) -> bool:
        """Whether it is all of a tensor, if that has the same shape."""
        return self.offset == 0 and self.strides == contiguous(self.dims)

    def _viewed(self, tensor: Tensor) -> Tensor:
        in_reverse = [dim for dim, stride in enumerate(self.strides) if stride < 0]
        first = self.offset + sum((self.dims[dim] - 1) * self.strides[dim] for dim in in_reverse)
        strides = [abs(stride) for stride in self.strides]
        viewed = tensor.as_strided(self.dims, strides, tensor.storage_offset() + first)
        return viewed.flip(in_reverse) if in_reverse else viewed  # flipping nothing copies


def worthwhile(x: Tensor, y: Tensor) -> bool:
    """Whether a product `[M, K] [K, N]` is one for this kernel."""
    if x.dim() != 2 or y.dim() != 2 or x.shape[0] * x.shape[1] * y.shape[1] < 200_000:
        return False  # with fewer a call costs more than it saves
    fits = x.dtype == y.dtype and x.dtype in (torch.float32, torch.float64) and x.is_cpu and y.is_cpu
    return fits and _library(x.dtype) is not None


def affine(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ y + bias`, under autograd.

    Args:
        x: `[M, K]`.
        y: `[K, N]`.
        bias: `[N]`, or None.
    """
    if not torch.is_grad_enabled():
        return _multiply(x, y, bias)
    product: Tensor = _Affine.apply(x, y, bias)
    return product


def _multiply(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    (M, K), N = x.shape, y.shape[1]
    if not worthwhile(x, y):
        return x @ y if bias is None else torch.addmm(bias, x, y)
    loaded = _library(x.dtype)
    assert loaded is not None
    x, y = materialized(x), materialized(y)
    threads = min(torch.get_num_threads(), max(1, M * K * N // 8_000_000))  # so many are worth starting a thread for
    out = allocate((M, N), x.dtype)
    scratch = torch.empty(threads * loaded.ur_scratch(N), dtype=x.dtype)
    sizes = (M, K, N, *x.stride(), *y.stride(), threads)
    if bias is None and K >= 4 * M:  # few rows to share: threads share K
        partial = torch.empty((threads - 1) * M * N, dtype=x.dtype)
        loaded.ur_contract(*map(_pointer, (out, x, y, partial, scratch)), *sizes, team())
    else:
        start = None if bias is None else materialized(bias).contiguous()
        loaded.ur_multiply(*map(_pointer, (out, x, y, start, scratch)), *sizes, team())
    return out


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, y)
        return _multiply(x, y, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, y = ctx.saved_tensors
        need_x, need_y, need_bias = ctx.needs_input_grad
        # Under create_graph these are ordinary operations, with a backward of their own.
        return (
            affine(grad, y.t()) if need_x else None,
            _contracted(x, grad) if need_y else None,
            grad.sum(0) if need_bias else None,
        )


def _contracted(x: Tensor, grad: Tensor) -> Tensor:
    """`x^T grad`, computed such that the side with more rows is the one that threads share."""
    if x.shape[1] >= grad.shape[1]:
        return affine(x.t(), grad)
    return affine(grad.t(), x).t()
