"""`plan_memory`: what a memory budget buys, before it is set."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from unrolled.bptt.costs import Costs
from unrolled.bptt.memory_plan import MemoryPlan
from unrolled.bptt.planning import Planner
from unrolled.bptt.schedules import Schedule, store_all
from unrolled.bptt.segments import SequenceRun
from unrolled.errors import InputError, OptionError
from unrolled.lengths import Lengths
from unrolled.networks.layout import given_as
from unrolled.networks.stack import Stack, refuse_to_cut
from unrolled.networks.unroll import Unrolled
from unrolled.trees import Tree, leaves
from unrolled.unseen import OwnDraws


def plan_memory(
    rnn: nn.Module,
    inputs: Tree,
    state: Tree = None,
    *,
    lengths: Lengths = None,
    resets: Tensor | None = None,
    context: Tree = None,
) -> MemoryPlan:
    """What each schedule takes in memory and time for a call with these arguments.

    Memory is measured on a copy of the network over a few steps; the whole sequence is not run.

    Args:
        rnn: what `unroll` or `stack` made, with a memory budget or without.
        inputs: as the call takes them.
        state: as the call takes it.
        lengths: as the call takes them.
        resets: as the call takes them.
        context: as the call takes it.

    Raises:
        OptionError: for another network, or a budget that is too small.
        InputError: as the call itself does.

    Example:
        >>> import torch, unrolled as ur
        >>> plan = ur.plan_memory(ur.unroll(ur.GRUCell(3, 4), memory=0.2), torch.randn(400, 2, 3))
        >>> plan.chosen.bytes < 0.2 * plan.options[0].bytes, plan.options[0].name
        (True, 'store_all')
    """
    if not isinstance(rnn, Unrolled | Stack):
        raise OptionError(f"plan_memory plans what ur.unroll and ur.stack make, got {type(rnn).__name__}")
    if isinstance(rnn, Stack):
        refuse_to_cut(list(rnn.layers), "memory budget")
    given = given_as(inputs, lengths, batch_first=rnn.batch_first)
    if not given.extent.rows:
        raise InputError(
            "plan_memory needs a row with at least one step, got lengths that are all 0; pass a longer row"
        )
    with OwnDraws():
        whole, again = rnn.runs(given, given.sequences(inputs), state, resets, context)
        costs, chosen = _chosen(rnn, whole, again)
    extent, planner = whole.extent, Planner(costs, whole.extent)
    mine, inputs = planner.option(chosen), sum(leaf.nbytes for leaf in leaves(whole.inputs))
    outputs = round(costs.outputs * extent.rows / extent.batch)
    options = tuple(sorted({*planner.frontier(), mine}, key=lambda o: (-o.bytes, o.ratio)))
    return MemoryPlan(rnn._get_name(), extent.steps, extent.batch, options, mine, inputs, outputs)


def _chosen(rnn: Unrolled | Stack, whole: SequenceRun, again: Callable[[], SequenceRun]) -> tuple[Costs, Schedule]:
    """What the network goes by, and its costs, measured as far as that asks for."""
    if rnn.checkpointing is None:
        return rnn.costs(whole, again, 1), store_all(whole.extent.steps)
    found = rnn.schedule(rnn.checkpointing, whole, again)
    return rnn.costs(whole, again, found.length), found
