"""One run of an unrolled network by the reference engine, every copy of it kept."""

from __future__ import annotations

import torch
from torch import Tensor

from unrolled.cells.contract import CheckedStep, name_of
from unrolled.engine import reference
from unrolled.errors import CellError
from unrolled.introspection.copies import Copies
from unrolled.introspection.recorded_run import ReceivedState, RecordedRun
from unrolled.introspection.single_copy import Copy, CopyTaps
from unrolled.introspection.taps import GradientTap, ways_past
from unrolled.networks.base import first_state
from unrolled.networks.layout import Call
from unrolled.networks.unroll import Unrolled, empty_outputs, fresh_state
from unrolled.sequence import rows_where
from unrolled.trees import Tree, map_leaves


def record(rnn: Unrolled, call: Call, tap: GradientTap) -> Copies:
    """The copies of one network in a call; the tap remembers the gradients."""
    first, fresh, inputs = first_state(rnn, call), None, call.steps
    if call.resets is not None and call.extent.rows:
        fresh = fresh_state(rnn, call, first)
        inputs = call.steps, call.layout.restarts(call.resets, reverse=rnn.reverse)
    run = RecordedRun(rnn, call, tap, first, fresh)
    if not call.extent.rows:
        run.no_outputs = empty_outputs(rnn.cell, call, first)
        return Copies(run, (), ())
    step = _RecordingStep(run)
    reference.run(step, inputs, run.first, call.extent, reverse=rnn.reverse)
    made = sorted(step.made, key=lambda copy: copy.t)
    return Copies(run, made, made)


class _RecordingStep(CheckedStep):
    """A step for the reference engine that makes a copy of every call.

    The cell's parameters are replaced by aliases that the copy alone reads.
    """

    def __init__(self, run: RecordedRun) -> None:
        super().__init__(run.cell, None if run.context is None else run.context.tree, run.layout.extent)
        self.recorded = run
        self.made: list[Copy] = []
        self._aliases: dict[str, Tensor] = {}

    def __call__(self, t: int, input: Tree, state: Tree) -> tuple[Tree, Tree]:
        run = self.recorded
        if run.fresh is not None:
            input, resets = input
            state = rows_where(resets, map_leaves(lambda leaf: leaf[: len(resets)], run.fresh.tree), state)
        entered = run.tap.insert(input, state, list(run.weights.values()))
        self._aliases = dict(zip(run.paths.values(), entered[2].passed, strict=True))
        # A node of its own for each leaf: the gradient of the state alone then does not compute that of the weights.
        seen = map_leaves(lambda leaf: leaf.view_as(leaf), entered[1].tree)
        returned = super().__call__(t, entered[0].tree, seen)
        taps = CopyTaps(*entered, *run.tap.insert(*returned))
        self._refuse_other_ways(t, taps)
        self.made.append(Copy(run, t, taps, self._received(t), input, state, seen))
        return taps.output.tree, taps.next_state.tree

    def run(self, t: int, input: Tree, state: Tree) -> tuple[Tree, Tree]:
        return torch.func.functional_call(self.cell, self._aliases, (input, state, *self.rest(t)))

    def _received(self, t: int) -> ReceivedState:
        run, sizes = self.recorded, self.recorded.layout.extent.sizes
        before = self.made[-1] if self.made else None
        if not run.layout.extent.ragged:
            return ReceivedState((before.taps.next_state if before else run.initial, None))
        running = min(sizes[before.t], sizes[t]) if before else 0
        passed_on = [(before.taps.next_state, slice(running))] if before and running else []
        begin = [(run.initial, run.order[running : sizes[t]])] if running < sizes[t] else []
        return ReceivedState(*passed_on, *begin)

    def _refuse_other_ways(self, t: int, taps: CopyTaps) -> None:
        """What reaches a copy by a way that is not tapped would be missing from its share, or be in another's."""
        run, entered = self.recorded, [taps.input, taps.state, taps.weights]
        known = entered if run.context is None else [*entered, run.context]
        leaves, others = ways_past(known, taps.output.raw + taps.next_state.raw)
        names = {path: name for name, path in run.paths.items()}
        hidden = [names.get(path, path) for path, weight in run.trained.items() if id(weight) in leaves]
        if hidden:
            raise CellError(
                f"copy {t} of {name_of(run.cell)} reads {', '.join(hidden)} by another way than its registered name, "
                "so its share cannot be told; read the parameter as an attribute of its module in every step"
            )
        if others:
            raise CellError(
                f"copy {t} of {name_of(run.cell)} uses something that an earlier copy computed and did not hand on in "
                "its state (a cached weight?), so their shares cannot be told apart; compute it in every step"
            )
