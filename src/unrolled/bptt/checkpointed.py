"""Checkpointed BPTT: a schedule carried out on a network, with its gradients.

The forward pass is all of a schedule that comes before the first *reverse*. The backward pass is the rest of it, inside
of one autograd Function, so that all gradients are there at its end, or none if it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from unrolled.autograd_graph import differentiable
from unrolled.bptt.actions import Action, Advance, Restore, Reverse, StoreState, StoreTape
from unrolled.bptt.own_backward import DifferentiableRun, Expiry
from unrolled.bptt.parameter_aliases import ParameterAliases, detached_leaf
from unrolled.bptt.replay import AmbientState, Checksum, Slots, VersionCheck
from unrolled.bptt.schedules import Schedule
from unrolled.bptt.segments import Segment, SequenceRun
from unrolled.bptt.taped import GradientSums, TapedSegment, unlisted_leaves
from unrolled.errors import GradientError
from unrolled.execution.memory import allocate
from unrolled.execution.unchanged import unchanged
from unrolled.internals import has_memory
from unrolled.recording.guards.environment import generators_around
from unrolled.trees import Tree, TreeSpec, leaves, map_leaves


def run_checkpointed(run: SequenceRun, schedule: Schedule) -> tuple[Tree, Tree]:
    """Run a sequence by a schedule.

    Args:
        run: the run.
        schedule: which states and tapes are kept, for as many steps as the run has.

    Returns:
        The outputs, laid out as the inputs, and the last state.

    Raises:
        CellError: if the outputs of a segment are of another kind than those before it.
        GradientError: in the backward pass, if steps that are run again give other numbers than before.
    """
    checkpointed = _CheckpointedRun(run, schedule)
    outputs, last = checkpointed.forward()
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in checkpointed.protected):
        return outputs, last
    return checkpointed.attach(outputs, last, checkpointed.protected)


class _CheckpointedRun(DifferentiableRun):
    """Carries out the actions of a schedule on the current state, slots for states, and one tape.

    Args:
        run: the run.
        schedule: the schedule.

    Attributes:
        unlisted: leaves that get gradients besides the inputs, the state, the context and the parameters; known after
            the forward pass.
        again: whether steps are being run again, so that what they write into buffers is thrown away.
        reversed: whether a backward pass has begun.
    """

    NO_GRAPH = (
        "gradients under a memory budget have no graph of their own; leave create_graph out, or leave memory= "
        "and checkpoint= out"
    )

    def __init__(self, run: SequenceRun, schedule: Schedule) -> None:
        self.run, self.schedule, self.expiry = run, schedule, Expiry()
        self.aliases = ParameterAliases(run.module)
        self.constants = VersionCheck(self.aliases.constants)
        self.unlisted: list[Tensor] = []
        self.segments = run.segments([*range(0, schedule.T, schedule.length), schedule.T])
        self.ambient = AmbientState([*leaves(run.inputs), *leaves(run.state)], generators_around(run.module))
        self.checksums: list[Checksum | None] = [None] * len(self.segments)
        self._restart()

    @property
    def protected(self) -> list[Tensor]:
        """All that gets gradients."""
        run = self.run
        given = [*leaves(run.inputs), *leaves(run.state), *leaves(run.context)]
        return [*given, *self.aliases.weights, *self.unlisted]

    @property
    def differentiable(self) -> list[bool]:
        """For each leaf of the results whether a gradient flows back from it; of all segments as of the last."""
        return self._differentiable

    def _restart(self) -> None:
        """Begin with the first action, with nothing stored."""
        self.actions: Iterator[Action] = iter(self.schedule)
        self.current = self.segments[0].rows_of(self.run.state)
        self.slots = Slots(max(self.schedule.slots_needed, 1))
        self.tape: TapedSegment | None = None
        self.again, self.reversed = False, False

    def forward(self) -> tuple[Tree, Tree]:
        """Run all steps; return the outputs and the last state, without a graph."""
        results = _Results(self.run, self.segments)
        with unchanged(self.aliases.weights):
            if not torch.is_grad_enabled():
                for segment in self.segments:
                    self._advance(segment, results)
                return results.outputs, results.last
            self.first_random = self.ambient.random()
            self._until_reverse(results)
        assert self.tape is not None  # every schedule tapes its last segment before it reverses it
        self.unlisted = unlisted_leaves([self.tape], self.aliases.aliases)
        self._differentiable = [x.requires_grad for x in self.tape.results]
        self.again = True
        return results.outputs, results.last

    def backward(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Carry out the rest of the schedule: the gradients of what was given and of the weights."""
        if not all(grad is None or has_memory(grad) for grad in grads):
            raise GradientError(
                "gradients under a memory budget are taken one at a time; leave is_grads_batched and vectorize out, or "
                "leave memory= and checkpoint= out"
            )
        run = self.run
        if run.pure:  # of any other step the results are compared
            self.constants.check()
        with self.ambient.restored(), unchanged(self.aliases.weights):
            if self.reversed:  # by an earlier backward pass, to its end or until it was interrupted
                self._restart()
                self.again = True
                self.ambient.seed(self.first_random)
                self._until_reverse()
            self.reversed = True
            weights = [*self.aliases.aliases, *self.unlisted]
            others = len(leaves(run.context)) + len(weights)
            sums = GradientSums(self.segments, leaves(run.inputs), leaves(run.state), others)
            following: list[Tensor | None] = []
            for action in chain([self.next], self.actions):
                if isinstance(action, Reverse):
                    following = self._reverse(grads, following, weights, sums)
                else:
                    self._carry_out(action)
            return sums.totals()

    def _reverse(
        self,
        grads: Sequence[Tensor | None],
        following: Sequence[Tensor | None],
        weights: Sequence[Tensor],
        sums: GradientSums,
    ) -> list[Tensor | None]:
        """Go back through the tape and drop it; return the gradients of the state that it received."""
        tape, self.tape = self.tape, None
        assert tape is not None  # as in `forward`
        found = tape.vjp(grads, following, weights)
        sums.add(tape.segment, found)
        return found.entry

    def _until_reverse(self, results: _Results | None = None) -> None:
        for action in self.actions:
            if isinstance(action, Reverse):
                self.next: Action = action
                return
            self._carry_out(action, results)

    def _carry_out(self, action: Action, results: _Results | None = None) -> None:
        match action:
            case Advance(start, stop):
                for segment in self.segments[self._number(start) : self._number(stop)]:
                    self._advance(segment, results)
            case StoreState(_, slot):
                self.slots.store(slot, self.current, self.ambient.random())
            case Restore(_, slot):
                self.current, random = self.slots.restore(slot)
                self.ambient.seed(random)
            case StoreTape(start, _):
                self._store_tape(self.segments[self._number(start)], results)

    def _number(self, step: int) -> int:
        return -(-step // self.schedule.length)

    def _inputs(self, segment: Segment) -> Tree:
        return map_leaves(lambda x: segment.steps_of(x.detach()).requires_grad_(x.requires_grad), self.run.inputs)

    def _advance(self, segment: Segment, results: _Results | None) -> None:
        context = segment.rows_of(self.run.context)
        args = self._inputs(segment), self.current, context, segment.extent, segment.start
        with torch.no_grad():
            outputs, last = self.aliases(self.run.run, *args, again=True) if self.again else self.run.run(*args)
            self._pass_on(segment, outputs, last)
        if results is not None:
            results.write(segment, outputs, last)

    def _store_tape(self, segment: Segment, results: _Results | None) -> None:
        inputs, context = self._inputs(segment), map_leaves(detached_leaf, self.run.context)
        if segment.begin:  # what came before is not known to need no gradient
            entry = map_leaves(lambda x: x.detach().requires_grad_(differentiable(x)), self.current)
        else:
            entry = map_leaves(detached_leaf, segment.rows_of(self.run.state))
        with torch.enable_grad():
            tape = TapedSegment(self._run_on_aliases, segment, inputs, entry, context)
        with torch.no_grad():
            self._pass_on(segment, tape.outputs, tape.last)
        if results is not None:
            results.write(segment, tape.outputs, tape.last)
        elif not self.run.pure:
            self._refuse_unlisted(tape)
        self.tape = tape

    def _run_on_aliases(self, *args: Any) -> Any:
        return self.aliases(self.run.run, *args, again=self.again)

    def _refuse_unlisted(self, tape: TapedSegment) -> None:
        """Refuse leaves that the last segment did not read: what gets a gradient was decided when it was taped."""
        found = unlisted_leaves([tape], [*self.aliases.aliases, *self.unlisted])
        if found:
            raise GradientError(
                f"{tape.segment} read a tensor of shape {list(found[0].shape)} that requires a gradient and that "
                "the last steps do not read; make it a parameter of the cell, or leave memory= and checkpoint= out"
            )

    def _pass_on(self, segment: Segment, outputs: Tree, last: Tree) -> None:
        """Make the current state what the next segment receives."""
        number = self._number(segment.begin)
        if not (self.run.pure or self.run.measured):
            self._refuse_others(segment, number, (outputs, last))
        if number + 1 < len(self.segments):
            last = map_leaves(Tensor.detach, last)
            self.current = self.segments[number + 1].received(self.run.state, last)

    def _refuse_others(self, segment: Segment, number: int, made: Tree) -> None:
        """Refuse outputs and a state that differ from those of the first time."""
        checksum, before = Checksum.of(made), self.checksums[number]
        if before is None:
            self.checksums[number] = checksum
        elif not checksum.matches(before):
            raise GradientError(
                f"{segment} gave other outputs, or handed on another state, when they were "
                "run again for the backward pass; a cell must compute from what it reads and from torch's default "
                "generator alone, and stay in the same mode: leave memory= and checkpoint= out, or mend the cell"
            )


class _Results:
    """Outputs and last states of a run in segments, in memory of their own that is made once.

    Args:
        run: the run.
        segments: its segments, in the order in which they run.

    Attributes:
        outputs: `[T, B, ...]`; `[N, ...]` where rows end at different times.
        last: the state that each row's last copy passes on.
    """

    def __init__(self, run: SequenceRun, segments: Sequence[Segment]) -> None:
        self.extent, self.segments = run.extent, segments
        self.outputs: Tree = None
        self.last: Tree = None
        self._spec: TreeSpec | None = None

    @torch.no_grad()
    def write(self, segment: Segment, outputs: Tree, last: Tree) -> None:
        """Put the results of a segment where they belong.

        Raises:
            CellError: if its outputs are of another kind than those before it.
        """
        spec, extent = TreeSpec.of(outputs, leading=1), self.extent
        if self._spec is None:
            many, self._spec = extent.rows if extent.ragged else extent.steps, spec
            self.outputs = map_leaves(lambda x: allocate((many, *x.shape[1:]), x.dtype, x.device), outputs)
        segment.refuse_other_outputs(spec, self._spec)
        map_leaves(lambda memory, x: segment.steps_of(memory).copy_(x), self.outputs, outputs)
        if not extent.ragged:
            self.last = map_leaves(Tensor.clone, last) if segment is self.segments[-1] else None
            return
        if self.last is None:
            self.last = map_leaves(lambda leaf: leaf.new_empty((extent.batch, *leaf.shape[1:])), last)
        map_leaves(lambda memory, leaf: memory[segment.ending].copy_(leaf[segment.ending]), self.last, last)
