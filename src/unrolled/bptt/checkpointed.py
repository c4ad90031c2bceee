"""Checkpointed BPTT: a schedule carried out on a network, with its gradients.

The forward pass is all of a schedule that comes before the first *reverse*. The backward pass is the rest of it, inside
of one autograd Function, so that what was given gets its gradients at the end, all at once or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unrolled.autograd_graph import leaves_behind
from unrolled.bptt.actions import Action, Advance, Restore, Reverse, StoreState, StoreTape
from unrolled.bptt.gathered import GradientSums, Results
from unrolled.bptt.marks import Mark, mark_of, same
from unrolled.bptt.parameter_aliases import ParameterAliases, VersionCheck, held_by, own
from unrolled.bptt.replay import Surroundings
from unrolled.bptt.schedules import Schedule
from unrolled.bptt.segments import Segment, SequenceRun, handed_back, received, rows_of, spans, starts_at
from unrolled.bptt.slots import Slots
from unrolled.errors import GradientError
from unrolled.execution.unchanged import unchanged
from unrolled.internals import has_memory
from unrolled.trees import Tree, flatten, leaves, map_leaves, unflatten


def run_checkpointed(whole: SequenceRun, schedule: Schedule) -> tuple[Tree, Tree]:
    """Run a sequence by a schedule.

    Args:
        whole: the run.
        schedule: which states and tapes are kept, for as many steps as the run has.

    Returns:
        The outputs, laid out as the inputs, and the last state.

    Raises:
        CellError: if the outputs of a piece are of another kind than those before it.
        GradientError: in the backward pass, if steps that are run again give other numbers than before.
    """
    machine = _Machine(whole, schedule)
    outputs, last = machine.forward()
    given = [*leaves(whole.inputs), *leaves(whole.state), *leaves(whole.context), *machine.weights]
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in given):
        return outputs, last
    (shown, structure), (ends, kind) = flatten(outputs), flatten(last)
    found = _Checkpointed.apply(_Handed(machine, [*shown, *ends]), *given)
    return unflatten(structure, found[: len(shown)]), unflatten(kind, found[len(shown) :])


class _Tape(NamedTuple):
    """A piece that has run with a graph of its own: what it read, and what came out of it."""

    span: Segment
    inputs: list[Tensor]
    entry: list[Tensor]
    context: list[Tensor]
    outputs: list[Tensor]
    last: list[Tensor]


class _Machine:
    """What actions work on: the state at hand, slots for states, and one tape.

    Attributes:
        weights: tensors beside what is given that get gradients; known once the forward pass has been.
        differentiable: for each leaf of the results whether a gradient flows back from it.
    """

    def __init__(self, whole: SequenceRun, schedule: Schedule) -> None:
        self.run, self.schedule, self.extent = whole.run, schedule, whole.extent
        self.inputs, self.state, self.context = whole.inputs, whole.state, whole.context
        self.aside = ParameterAliases(whole.module)
        self.beside: list[Tensor] = []
        self.walk = spans(self.extent, [*range(0, schedule.T, schedule.length), schedule.T], reverse=whole.reverse)
        self.surroundings = Surroundings([*leaves(self.inputs), *leaves(self.state)])
        self.marks: list[Mark | None] = [None] * len(self.walk)
        self.pure, self.measured = whole.pure, whole.measured
        self.differentiable: list[bool] = []
        self.constants = VersionCheck(self.aside.constants)
        self._begin()

    @property
    def weights(self) -> list[Tensor]:
        return [*self.aside.weights, *self.beside]

    def _begin(self) -> None:
        """Back to the first action, with nothing stored."""
        self.actions: Iterator[Action] = iter(self.schedule)
        self.hand = rows_of(self.state, self.walk[0].extent)
        self.slots = Slots(max(self.schedule.slots_needed, 1))
        self.tape: _Tape | None = None
        self.again, self.walked = False, False

    def forward(self) -> tuple[Tree, Tree]:
        """Run all steps; return the outputs and the last state, without a graph."""
        with unchanged(self.aside.weights):
            return self._forward()

    def _forward(self) -> tuple[Tree, Tree]:
        results = Results(self.walk, self.extent)
        if not torch.is_grad_enabled():
            for span in self.walk:
                self._advance(span, results)
            return results.outputs, results.last
        self.first = self.surroundings.random()
        self._until_reverse(results)
        assert self.tape is not None  # every schedule tapes its last segment before it reverses it
        self.beside = leaves_behind([*self.tape.outputs, *self.tape.last], known=self._known(self.tape))
        self.differentiable = [x.requires_grad for x in (*self.tape.outputs, *self.tape.last)]
        self.again = True
        return results.outputs, results.last

    def backward(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Carry out the rest of the schedule: the gradients of what was given and of the weights."""
        if self.pure:  # of any other step the results are compared
            self.constants.check()
        with self.surroundings.restored(), unchanged(self.aside.weights):
            if self.walked:  # by an earlier backward pass, to its end or until it was interrupted
                self._begin()
                self.again = True
                self.surroundings.seed(self.first)
                self._until_reverse()
            self.walked = True
            given = leaves(self.inputs), leaves(self.state), leaves(self.context)
            sums = GradientSums(self.extent, *given, self.weights)
            above: list[Tensor | None] = []
            for action in chain([self.next], self.actions):
                if isinstance(action, Reverse):
                    above = self._reverse(grads, above, sums)
                else:
                    self._carry_out(action)
            return sums.found()

    def _until_reverse(self, results: Results | None = None) -> None:
        for action in self.actions:
            if isinstance(action, Reverse):
                self.next: Action = action
                return
            self._carry_out(action, results)

    def _carry_out(self, action: Action, results: Results | None = None) -> None:
        match action:
            case Advance(start, stop):
                for span in self.walk[self._segment(start) : self._segment(stop)]:
                    self._advance(span, results)
            case StoreState(_, slot):
                self.slots.store(slot, self.hand, self.surroundings.random())
            case Restore(_, slot):
                self.hand, random = self.slots.restore(slot)
                self.surroundings.seed(random)
            case StoreTape(start, _):
                self._store_tape(self.walk[self._segment(start)], results)

    def _segment(self, step: int) -> int:
        return -(-step // self.schedule.length)

    def _advance(self, span: Segment, results: Results | None) -> None:
        steps, context = self._steps(span), rows_of(self.context, span.extent)
        given = steps, self.hand, context, span.extent, span.start
        with torch.no_grad():
            outputs, last = self.aside(self.run, *given, again=True) if self.again else self.run(*given)
            self._handed(span, outputs, last)
        if results is not None:
            results.write(span, outputs, last)

    def _store_tape(self, span: Segment, results: Results | None) -> None:
        steps, context = self._steps(span), map_leaves(own, self.context)
        entry = map_leaves(_needing, self.hand) if span.begin else map_leaves(own, rows_of(self.state, span.extent))
        with torch.enable_grad():  # which the narrowing of the context is part of
            given = steps, entry, rows_of(context, span.extent), span.extent, span.start
            outputs, last = self.aside(self.run, *given, again=self.again)
        tape = _Tape(span, *(leaves(x) for x in (steps, entry, context, outputs, last)))
        with torch.no_grad():
            self._handed(span, outputs, last)
        if results is not None:
            results.write(span, outputs, last)
        elif not self.pure:
            self._refuse_strangers(tape)
        self.tape = tape

    def _refuse_strangers(self, tape: _Tape) -> None:
        """What gets a gradient was decided when the last segment was taped."""
        found = leaves_behind([*tape.outputs, *tape.last], known=[*self._known(tape), *self.beside])
        if found:
            raise GradientError(
                f"{_steps(tape.span)} read a tensor of shape {list(found[0].shape)} that requires a gradient and that "
                "the last steps do not read; make it a parameter of the cell, or leave memory= and checkpoint= out"
            )

    def _known(self, tape: _Tape) -> list[Tensor]:
        return [*tape.inputs, *tape.entry, *tape.context, *self.aside.aliases]

    def _steps(self, span: Segment) -> Tree:
        place = starts_at(self.extent, span)
        return map_leaves(
            lambda x: x.detach().narrow(0, place, span.count).requires_grad_(x.requires_grad), self.inputs
        )

    def _handed(self, span: Segment, outputs: Tree, last: Tree) -> None:
        """The state at hand is what the next segment receives."""
        number = self._segment(span.begin)
        if not (self.pure or self.measured):
            self._refuse_others(span, number, (outputs, last))
        if number + 1 < len(self.walk):
            self.hand = received(self.state, map_leaves(Tensor.detach, last), self.walk[number + 1])

    def _refuse_others(self, span: Segment, number: int, made: Tree) -> None:
        """Outputs and a state that were there before must be the same again."""
        mark, before = mark_of(made), self.marks[number]
        if before is None:
            self.marks[number] = mark
        elif not same(mark, before):
            raise GradientError(
                f"{_steps(span)} gave other outputs, or handed on another state, when they were "
                "run again for the backward pass; a cell must compute from what it reads and from torch's default "
                "generator alone, and stay in the same mode: leave memory= and checkpoint= out, or mend the cell"
            )

    def _reverse(
        self, grads: Sequence[Tensor | None], above: Sequence[Tensor | None], sums: GradientSums
    ) -> list[Tensor | None]:
        """Go back through the tape and drop it; return the gradients of the state that it received."""
        tape, self.tape = self.tape, None
        assert tape is not None  # as in `forward`
        span, shown = tape.span, len(tape.outputs)
        place = starts_at(self.extent, span)
        flowing = [None if grad is None else grad.narrow(0, place, span.count) for grad in grads[:shown]]
        flowing += [
            handed_back(span, tensor, above[n] if above else None, grads[shown + n])
            for n, tensor in enumerate(tape.last)
        ]
        results = zip((*tape.outputs, *tape.last), flowing, strict=True)
        pairs = [(x, grad) for x, grad in results if grad is not None and x.requires_grad]
        asked = [*tape.entry, *tape.inputs, *tape.context, *self.aside.aliases, *self.beside]
        wanted = [x for x in asked if x.requires_grad]
        if not pairs or not wanted:
            return [None] * len(tape.entry)
        found = torch.autograd.grad(
            [x for x, _ in pairs], wanted, [grad for _, grad in pairs], retain_graph=True, allow_unused=True
        )
        by = {id(x): grad for x, grad in zip(wanted, found, strict=True)}
        entry = [by.get(id(x)) for x in tape.entry]
        sums.add(
            span,
            [by.get(id(x)) for x in tape.inputs],
            entry,
            [by.get(id(x)) for x in (*tape.context, *self.aside.aliases, *self.beside)],
        )
        return entry


def _steps(span: Segment) -> str:
    return f"steps {span.start} to {span.start + span.extent.steps - 1}"


def _needing(tensor: Tensor) -> Tensor:
    """A leaf that asks for a gradient if its kind can have one: what came before is not known to need none."""
    return tensor.detach().requires_grad_(tensor.is_floating_point() or tensor.is_complex())


@dataclass(frozen=True)
class _Handed:
    machine: _Machine
    results: list[Tensor]


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handed: _Handed, *given: Tensor) -> tuple[Tensor, ...]:
        machine, shown = handed.machine, handed.results
        ctx.set_materialize_grads(False)
        # The machine hangs on a saved tensor: it goes when autograd lets go of what was saved.
        token = torch.empty(0)
        token.machine = machine
        ctx.save_for_backward(token, *given)
        ctx.mark_non_differentiable(*(x for x, flows in zip(shown, machine.differentiable, strict=True) if not flows))
        return tuple(shown)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise GradientError(
                "gradients under a memory budget have no graph of their own; leave create_graph out, or leave memory= "
                "and checkpoint= out"
            )
        if not all(grad is None or has_memory(grad) for grad in grads):
            raise GradientError(
                "gradients under a memory budget are taken one at a time; leave is_grads_batched and vectorize out, or "
                "leave memory= and checkpoint= out"
            )
        token, *_ = ctx.saved_tensors  # asking for them refuses what was changed in place since
        return (None, *held_by(token, "machine").backward(grads))
