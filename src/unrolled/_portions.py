"""A network of several parts run portion by portion, so that all its parts are cut at one place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from unrolled._given import Given, Portion, Through
from unrolled.bptt.truncated import run_by_blocks
from unrolled.bptt.truncation import Truncation
from unrolled.lengths import Extent
from unrolled.trees import Tree

__all__ = ["run_portions"]


def run_portions(
    truncation: Truncation,
    through: Through,
    given: Given,
    steps: Tree,
    state: Tree,
    resets: Tensor | None,
    context: Tree,
    weights: Iterable[Tensor],
) -> tuple[Tree, Tree]:
    """Truncated BPTT through a network whose parts are cut together; takes and returns what `through` does.

    Args:
        truncation: its horizon and stride.
        through: how the network is run without them.
        given: how the caller gave the batch.
        steps: the inputs as engines take them.
        state: the first state, of the caller's rows.
        resets: as the caller gave them, or None.
        context: what is the same at every step, or None.
        weights: the network's parameters.
    """
    T = given.extent.steps
    if truncation.horizon >= T or not torch.is_grad_enabled():
        return through(given, steps, state, resets, context)

    def run(steps: Tree, state: Tree, context: Tree, extent: Extent, start: int) -> tuple[Tree, Tree]:
        inputs, mask = steps
        return through(Portion(extent), inputs, state, mask, context)

    mask = None if resets is None else given.sequences(given.resets(resets, reverse=False))
    parts = (steps, mask), given.rows(state), given.rows(context), given.extent
    outputs, last = run_by_blocks(truncation, run, *parts, reverse=False, weights=weights)
    return outputs, given.last(last, state)
