"""The reference engine: a loop over the cell under ordinary autograd. It defines the right answer."""

from __future__ import annotations

from collections.abc import Callable

from unrolled import sequence
from unrolled.trees import Tree

__all__ = ["run"]


def run(step: Callable[[int, Tree, Tree], tuple[Tree, Tree]], inputs: Tree, state: Tree) -> tuple[Tree, Tree]:
    """Run one copy of a cell after another, each handing its state to the next.

    Args:
        step: `(t, input, state) -> (output, state)`, what copy t does.
        inputs: a pytree of `[T, B, ...]`.
        state: the state copy 0 receives.

    Returns:
        The outputs, a pytree of `[T, B, ...]`, and the last copy's state. Time and memory are linear in T.
    """
    outputs = []
    for t, input in enumerate(sequence.each_step(inputs)):
        output, state = step(t, input, state)
        outputs.append(output)
    return sequence.stacked(outputs), state
