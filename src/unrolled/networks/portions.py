"""A network of several parts run portion by portion, so that all its parts are cut at one place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from unrolled.bptt.segments import SequenceRun
from unrolled.lengths import Extent
from unrolled.networks.layout import BatchLayout, SegmentLayout, Through
from unrolled.trees import Tree


def in_portions(
    through: Through,
    given: BatchLayout,
    steps: Tree,
    state: Tree,
    fresh: Mapping[nn.Module, Tree],
    resets: Tensor | None,
    context: Tree,
    module: nn.Module,
) -> SequenceRun:
    """A network's run, all parts of which are taken piece by piece together.

    Args:
        through: how the network is run.
        given: how the caller gave the batch.
        steps: the inputs as engines take them.
        state: the first state, of the caller's rows.
        fresh: for each part the state that rows start afresh from; empty without resets.
        resets: as the caller gave them, or None.
        context: what is the same at every step, or None.
        module: the network, whose parameters get gradients.
    """

    def run(steps: Tree, state: Tree, context: Tree, extent: Extent, start: int) -> tuple[Tree, Tree]:
        (inputs, mask), (context, states) = steps, context
        return through(SegmentLayout(extent, dict(zip(fresh, states, strict=True))), inputs, state, mask, context)

    mask = None if resets is None else given.sequences(given.resets(resets, reverse=False))
    same = given.rows(context), [given.rows(state) for state in fresh.values()]
    return SequenceRun(run, (steps, mask), given.rows(state), same, given.extent, reverse=False, module=module)
