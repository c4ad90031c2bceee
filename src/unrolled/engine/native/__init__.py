"""The native engine: loops emitted as C, built by the system's compiler, run in one call.

A loop's program is lowered to nodes (`lower`), these are put into kernels (`schedule`) and written as C (`emit`); the C
is compiled or found in a cache on disk (`build`), and torch's tensors are bound to the compiled function (`bind`); what
that needs to know of so many steps and rows is worked out once (`frame`). What each operation becomes is said in
`unrolled.operations`; what runs all loops is compiled once (`runtime`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from unrolled.engine.native.bind import NativeLoop, built
from unrolled.engine.native.bound import DeclinedError
from unrolled.engine.native.build import BuildError
from unrolled.engine.native.emit import Source, emit
from unrolled.engine.native.products import affine, worthwhile
from unrolled.execution.protocol import LoopInputs, LoopResult
from unrolled.operations.layout import UnsupportedError
from unrolled.plan.loops import LoopProgram

__all__ = ["BuildError", "DeclinedError", "affine", "prepare", "run_compiled", "worthwhile"]

_LOOPS: dict[LoopProgram, NativeLoop] = {}


def prepare(loops: Iterable[LoopProgram]) -> dict[LoopProgram, str]:
    """Emit loops and build them, those over numbers of one dtype in one run of the compiler; none is built twice.

    Args:
        loops: the loops that will be run.

    Returns:
        The loops that this engine does not emit, and what in them.

    Raises:
        BuildError: if there is no compiler, or it fails.
    """
    sources: dict[torch.dtype, dict[LoopProgram, Source]] = {}
    refused: dict[LoopProgram, str] = {}
    for loop in loops:
        if loop in _LOOPS:
            continue
        try:
            source = emit(loop)
        except UnsupportedError as error:
            refused[loop] = str(error)
        else:
            sources.setdefault(source.real, {})[loop] = source
    for group in sources.values():
        _LOOPS.update(built(group))
    return refused


def run_compiled(loop: LoopProgram, inputs: LoopInputs) -> LoopResult:
    """Run all steps in C; see `execution.protocol.LoopRunner`. The loop was prepared before.

    Raises:
        DeclinedError: if torch has to run them, on these numbers.
    """
    return _LOOPS[loop](inputs)
