"""A network of several parts run portion by portion, so that all its parts are cut at one place."""

from __future__ import annotations

from torch import Tensor, nn

from unrolled._given import Given, Portion, Through
from unrolled.bptt.pieces import Whole
from unrolled.lengths import Extent
from unrolled.trees import Tree

__all__ = ["in_portions"]


def in_portions(
    through: Through,
    given: Given,
    steps: Tree,
    state: Tree,
    resets: Tensor | None,
    context: Tree,
    module: nn.Module,
) -> Whole:
    """A network's run, all parts of which are taken piece by piece together.

    Args:
        through: how the network is run.
        given: how the caller gave the batch.
        steps: the inputs as engines take them.
        state: the first state, of the caller's rows.
        resets: as the caller gave them, or None.
        context: what is the same at every step, or None.
        module: the network, whose parameters get gradients.
    """

    def run(steps: Tree, state: Tree, context: Tree, extent: Extent, start: int) -> tuple[Tree, Tree]:
        inputs, mask = steps
        return through(Portion(extent), inputs, state, mask, context)

    mask = None if resets is None else given.sequences(given.resets(resets, reverse=False))
    parts = (steps, mask), given.rows(state), given.rows(context), given.extent
    return Whole(run, *parts, reverse=False, module=module)
