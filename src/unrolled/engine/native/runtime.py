"""The runtime: the C that is the same for all loops, compiled once for each dtype and kept.

A loop's own code calls it by the pointers in its task (`loop_task` in kernels.c), so that a plan compiles no product.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from functools import cache

import torch

from unrolled.engine.native.build import c_text, library


@cache
def runtime(dtype: torch.dtype) -> ctypes.CDLL:
    """What runs loops, packs their matrices and multiplies large ones, over numbers of a dtype.

    Raises:
        BuildError: if there is no compiler, or it fails.
    """
    loaded = library(c_text(dtype, "kernels.c", "threads.c", "panels.c", "products.c", "loops.c"))
    loaded.ur_scratch.restype, loaded.ur_scratch.argtypes = c_int64, [c_int64]
    loaded.ur_pack.argtypes = [c_void_p] * 2 + [c_int64] * 4
    for function in (loaded.ur_multiply, loaded.ur_contract):
        function.argtypes = [c_void_p] * 5 + [c_int64] * 8 + [c_void_p]
    loaded.ur_loop.argtypes = [c_void_p] * 5 + [c_int64] * 3 + [c_void_p]
    return loaded
