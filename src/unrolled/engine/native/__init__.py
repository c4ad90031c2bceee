"""The native engine: loops emitted as C, built by the system's compiler, run in one call."""

from __future__ import annotations

from unrolled.bptt.walk import Request, Walk
from unrolled.engine.native.bind import NativeLoop
from unrolled.engine.native.build import BuildError
from unrolled.engine.native.nodes import UnsupportedError
from unrolled.engine.native.products import affine, worthwhile
from unrolled.plan.loops import LoopProgram

__all__ = ["BuildError", "NativeLoop", "UnsupportedError", "affine", "prepare", "run_loop", "worthwhile"]

_LOOPS: dict[LoopProgram, NativeLoop] = {}


def prepare(loop: LoopProgram) -> NativeLoop:
    """Emit and build a loop; one that was built in this process is not built again.

    Raises:
        UnsupportedError: for an operation that this engine does not emit.
        BuildError: if there is no compiler, or it fails.
    """
    if loop not in _LOOPS:
        _LOOPS[loop] = NativeLoop(loop)
    return _LOOPS[loop]


def run_loop(loop: LoopProgram, request: Request) -> Walk:
    """Walk through time in C; see `bptt.walk.LoopRunner`."""
    return prepare(loop)(request)
