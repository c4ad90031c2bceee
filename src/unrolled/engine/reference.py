"""The reference engine: a loop over the cell under ordinary autograd. It defines the right answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unrolled import sequence
from unrolled.lengths import Extent
from unrolled.trees import Tree, leaves, map_leaves


def run(
    step: Callable[[int, Tree, Tree], tuple[Tree, Tree]],
    inputs: Tree,
    state: Tree,
    extent: Extent,
    *,
    reverse: bool = False,
) -> tuple[Tree, Tree]:
    """Run one copy of a cell after another, each passing its state on to the next.

    Args:
        step: `(t, input, state) -> (output, state)`, what copy t does.
        inputs: a pytree of `[T, B, ...]`; of `[N, ...]` where rows end at different times.
        state: the state that each row's first copy receives.
        extent: how far the sequence reaches. A copy is run on the rows that are alive.
        reverse: whether the last copy comes first.

    Returns:
        The outputs, laid out as the inputs, and the state that each row's last copy passes on. Time and memory are
        linear in T.
    """
    outputs: list[Tree] = [None] * extent.steps
    first, ended = state, list[Tree]()
    if reverse and extent.ragged:
        state = map_leaves(lambda leaf: leaf[: extent.sizes[-1]], first)
    steps = list(enumerate(sequence.each_step(inputs, extent)))
    for t, input in reversed(steps) if reverse else steps:
        state = _with_rows(state, first, extent.sizes[t], ended)
        outputs[t], state = step(t, input, state)
    # A state of its own, as every engine returns it: what the caller hangs on it concerns the outputs in no way.
    return sequence.joined(outputs, extent), map_leaves(_last, state, *reversed(ended))


def _last(leaf: Tensor, *ended: Tensor) -> Tensor:
    """A leaf of the last state, with the rows that had ended before; one without rows is as the last copy left it."""
    return torch.cat([leaf, *ended]) if ended and leaf.dim() else leaf.clone()


def _with_rows(state: Tree, first: Tree, alive: int, ended: list[Tree]) -> Tree:
    """The states of so many rows: rows that have ended leave for `ended`, others begin."""
    have = next((len(leaf) for leaf in leaves(state) if leaf.dim()), alive)
    if have > alive:
        ended.append(map_leaves(lambda leaf: leaf[alive:], state))
        return map_leaves(lambda leaf: leaf[:alive], state)
    if have < alive:
        return map_leaves(lambda now, start: torch.cat([now, start[have:alive]]), state, first)
    return state
