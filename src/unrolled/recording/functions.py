"""`torch.autograd.Function`s on a tape: found, recorded with their own backward, and run again.

What such a Function computes is on the tape like everything else, but its gradient is not the one of those operations
(a spiking network's surrogate). So the operations between its inputs and its results become one operation, which
has the recorded backward with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from unrolled.recording.events import Event, RawCustom, RawProgram, UnrecordableError
from unrolled.recording.program import Draw, Ref, live_in
from unrolled.recording.tape import Tape, tangent_like


def fold_functions(tape: Tape) -> None:
    """Replace the events of each Function on the tape by one whose target is a `RawCustom`."""
    made: dict[Any, dict[int, int]] = {}
    for (node, number), value in tape.memory.edges.items():
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            made.setdefault(node, {})[number] = value
    for node, outputs in made.items():
        _fold(tape, node, [outputs[number] for number in sorted(outputs)])


def _fold(tape: Tape, node: Any, outputs: list[int]) -> None:
    inside = _events_inside(tape.events, outputs)
    made = {value for event in inside for value in event.outputs}
    leaves = [(value, get_gradient_edge(x)) for value, x in tape.leaves.items()]
    by_edge = {(edge.node, edge.output_nr): value for value, edge in leaves} | tape.memory.edges
    # Of those that need a gradient only: what is no tensor has no edge, but `backward` returns a None for it.
    sources = [by_edge.get(edge) for edge in node.next_functions if edge[0] is not None]
    backward, saved, tangents, grads = _record_backward(tape, node, outputs, sources)
    inputs = list(dict.fromkeys([*live_in(inside), *(source for source in sources if source is not None)]))
    kept = [value for value in saved if value in made and value not in outputs]
    inputs += [value for value in saved if value not in made and value not in inputs]
    forward = RawProgram(tape.tensors, inputs, inside, outputs + kept)
    by_input = [grads.get(value, -1) for value in inputs]
    if any(isinstance(event.target, Draw) for event in (*inside, *backward)):
        name = type(node).__name__.removesuffix("Backward")
        raise UnrecordableError(f"{name} draws random numbers backwards, or from a distribution that it computes")
    custom = RawCustom(
        type(node).__name__.removesuffix("Backward"),
        forward,
        RawProgram(tape.tensors, saved + tangents, backward, by_input),
        saved,
    )
    position = tape.events.index(inside[-1])
    arguments = tuple(Ref(value) for value in inputs)
    results, line = tuple(outputs + kept), inside[-1].line
    folded = Event(custom, arguments, (), results, differentiable=True, line=line)  # type: ignore[arg-type]
    tape.events[:] = [
        folded if index == position else event
        for index, event in enumerate(tape.events)
        if index == position or event not in inside
    ]


def _events_inside(events: list[Event], outputs: list[int]) -> list[Event]:
    """The run of events with autograd off that led to these outputs."""
    wanted, found = set(outputs), []
    for event in reversed(events):
        if wanted.intersection(event.outputs) and not event.differentiable:
            wanted.update(event.inputs)
            found.append(event)
    if not found:
        raise UnrecordableError("it has an autograd.Function whose result is one of its inputs")
    return list(reversed(found))


def _record_backward(
    tape: Tape, node: Any, outputs: list[int], sources: list[int | None]
) -> tuple[list[Event], list[int], list[int], dict[int, int]]:
    """Call the Function's backward with the tape running: its events, what it read, tangents, and gradients."""
    grads_of_outputs = [tangent_like(tape.tensors[value]) for value in outputs]
    start, tape.memory.in_backward = len(tape.events), True
    tangents = [tape.add(tensor) for tensor in grads_of_outputs]
    try:
        with torch.no_grad(), tape:
            returned = node.apply(*grads_of_outputs)
    except RuntimeError as error:
        raise UnrecordableError(f"the backward of {type(node).__name__} cannot be run by itself: {error}") from error
    finally:
        tape.memory.in_backward = False
    events = tape.events[start:]
    del tape.events[start:]
    returned = returned if isinstance(returned, tuple) else (returned,)
    wanted = [grad for grad, needed in zip(returned, node.needs_input_grad, strict=False) if needed]
    grads = {
        source: tape.number(grad)
        for source, grad in zip(sources, wanted, strict=True)
        if source is not None and grad is not None
    }
    saved = [value for value in live_in(events) if value not in tangents]
    return events, saved, tangents, grads
