"""One run of an unrolled network by the reference engine, every copy of it kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unrolled.cells.contract import CheckedStep, make_state, name_of
from unrolled.engine import reference
from unrolled.errors import CellError
from unrolled.introspection.copies import Copies, Copy
from unrolled.introspection.recorded import Received, RecordedRun
from unrolled.introspection.taps import GradientTap, TappedTree, ways_past
from unrolled.networks.layout import BatchLayout
from unrolled.networks.unroll import Unrolled
from unrolled.trees import Tree, map_leaves
from unrolled.wrappers.resetting import afresh


def recorded(
    rnn: Unrolled,
    given: BatchLayout,
    steps: Tree,
    state: Tree,
    resets: Tensor | None,
    context: Tree,
    listener: GradientTap,
) -> Copies:
    """The copies of a run over sequences that are laid out as engines take them; see `Unrolled.through`.

    Args:
        rnn: the network.
        given: how the caller gave the batch.
        steps: the inputs.
        state: `[B, ...]` with the caller's rows, or None.
        resets: as the caller gave them, or None.
        context: `[B, ...]` with the caller's rows, or None.
        listener: what remembers the gradients.
    """
    first, fresh, inputs = rnn.checked(given, steps, state, context), None, steps
    if resets is not None and given.extent.rows:
        fresh = first if state is None else make_state(rnn.cell, steps, given.batch)
        inputs = steps, rnn.checked_resets(given, resets, fresh)
    network = RecordedRun(
        rnn.cell, given, listener, first, fresh, context, reverse=rnn.reverse, own_state=state is None
    )
    network.truncation = rnn.truncation
    if not given.extent.rows:
        network.no_outputs = rnn.no_outputs(given, steps, first, context)
        return Copies(network, (), ())
    recording = _Recording(network)
    reference.run(recording, inputs, network.first, given.extent, reverse=rnn.reverse)
    run = sorted(recording.made, key=lambda copy: copy.t)
    return Copies(network, run, run)


class _AliasedStep(CheckedStep):
    """A checked step of a cell whose parameters are replaced by one copy's own aliases of them."""

    def __init__(self, network: RecordedRun, aliases: Sequence[Tensor]) -> None:
        context = None if network.context is None else network.context.tree
        super().__init__(network.cell, context, network.given.extent)
        self._aliases = dict(zip(network.paths.values(), aliases, strict=True))

    def run(self, t: int, input: Tree, state: Tree) -> tuple[Tree, Tree]:
        return torch.func.functional_call(self.cell, self._aliases, (input, state, *self.rest(t)))


class _Recording:
    """A step for the reference engine that makes a copy of every call."""

    def __init__(self, network: RecordedRun) -> None:
        self.network = network
        self.made: list[Copy] = []

    def __call__(self, t: int, input: Tree, state: Tree) -> tuple[Tree, Tree]:
        network = self.network
        if network.fresh is not None:
            input, resets = input
            state = afresh(resets, map_leaves(lambda leaf: leaf[: len(resets)], network.fresh.tree), state)
        entered = network.through_door(input, state, list(network.weights.values()))
        # By nodes of its own, not the door's: what asks for the state's gradient alone shall not pay for the weights'.
        seen = map_leaves(lambda leaf: leaf.view_as(leaf), entered[1].tree)
        returned = _AliasedStep(network, entered[2].passed)(t, entered[0].tree, seen)
        left = network.through_door(*returned)
        _refuse_other_ways(network, t, entered, left)
        self.made.append(Copy(network, t, self._received(t), entered, left, input, state, seen))
        return left[0].tree, left[1].tree

    def _received(self, t: int) -> Received:
        """Where the rows of the state come from that copy t is handed."""
        network, sizes = self.network, self.network.given.extent.sizes
        if not network.given.extent.ragged:
            return Received((self.made[-1].handed_on if self.made else network.initial, None))
        have = min(sizes[self.made[-1].t], sizes[t]) if self.made else 0
        handed = [(self.made[-1].handed_on, slice(have))] if have else []
        begin = [(network.initial, network.order[have : sizes[t]])] if have < sizes[t] else []
        return Received(*handed, *begin)


def _refuse_other_ways(network: RecordedRun, t: int, entered: Sequence[TappedTree], left: Sequence[TappedTree]) -> None:
    """What reaches a copy by another way than through its door would be missing from its share, or be in another's."""
    doors = [*entered, network.context] if network.context is not None else entered
    beside, others = ways_past(doors, [tensor for passage in left for tensor in passage.raw])
    names = {path: name for name, path in network.paths.items()}
    hidden = [names.get(path, path) for path, weight in network.trained.items() if id(weight) in beside]
    if hidden:
        raise CellError(
            f"copy {t} of {name_of(network.cell)} reads {', '.join(hidden)} by another way than its registered name, "
            "so its share cannot be told; read the parameter as an attribute of its module in every step"
        )
    if others:
        raise CellError(
            f"copy {t} of {name_of(network.cell)} uses something that an earlier copy computed and did not hand on in "
            "its state (a cached weight?), so their shares cannot be told apart; compute it in every step"
        )
