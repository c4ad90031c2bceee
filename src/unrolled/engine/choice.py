"""Which engine runs a loop: the fastest that can, and why no faster one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from unrolled.engine import eager, native
from unrolled.execution.protocol import LoopInputs, LoopResult
from unrolled.plan.loops import LoopProgram


class Runner:
    """Runs loops by the native engine where it can, else by the eager one.

    Args:
        use_native: False to run all loops by the eager engine.

    Attributes:
        declined: whether the eager engine ran a loop since this was last set to False, as C has no answer for its
            numbers.
    """

    def __init__(self, use_native: bool) -> None:
        self.use_native = use_native
        self.declined = False
        self.no_compiler = ""  # why loops cannot be compiled here at all
        self._refused: dict[LoopProgram, str] = {}

    def why_not_native(self, loops: Iterable[LoopProgram], device: torch.device) -> list[str]:
        """Prepare some loops; for those that the native engine cannot run, why (each reason once)."""
        if not self.use_native:
            return ["the eager engine was asked for"]
        if device.type != "cpu":
            return [f"the native engine runs on the CPU, and this is on {device}"]
        loops = list(loops)
        self._prepare(loops)
        return list(dict.fromkeys(self._refused[loop] for loop in loops if self._refused[loop]))

    def _prepare(self, loops: Iterable[LoopProgram]) -> None:
        new = [loop for loop in loops if loop not in self._refused]
        try:
            refused = native.prepare(new)
        except native.BuildError as error:
            self.no_compiler = str(error)
            self._refused |= dict.fromkeys(new, self.no_compiler)
        else:
            self._refused |= dict.fromkeys(new, "")
            self._refused |= {loop: f"the native engine does not emit {what}" for loop, what in refused.items()}

    def _emits(self, loop: LoopProgram) -> bool:
        if loop not in self._refused:
            self._prepare([loop])
        return not self._refused[loop]

    def affine(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor | None:
        """`x @ y + bias` by the native kernel; None where torch is left to do it."""
        return native.affine(x, y, bias) if self.use_native and native.worthwhile(x, y) else None

    def __call__(self, loop: LoopProgram, inputs: LoopInputs) -> LoopResult:
        """Run all steps; see `execution.protocol.LoopRunner`."""
        on_cpu = inputs.states[0].device.type == "cpu"
        if self.use_native and on_cpu and self._emits(loop):
            try:
                return native.run_compiled(loop, inputs)
            except native.DeclinedError:  # torch raises its own error for these numbers, or breaks ties as it does
                self.declined = True
        return eager.run_loop(loop, inputs)
