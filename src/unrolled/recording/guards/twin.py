"""Twins: copies of a cell to try its step out on, since nothing may happen to the cell itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from unrolled.autograd_graph import new_leaf
from unrolled.internals import modules_are_patched
from unrolled.recording.events import UnrecordableError
from unrolled.recording.externals import held_tensors
from unrolled.recording.guards.environment import Environment
from unrolled.recording.guards.fingerprint import contents_of, hidden_in
from unrolled.recording.record import arguments_of
from unrolled.trees import Tree, TreeSpec, leaves, map_leaves


def twin_of(cell: nn.Module, made: list[Any] | None = None) -> nn.Module:
    """A deep copy of a cell.

    Args:
        cell: the cell.
        made: a list to which all objects are added that were made for the copy.

    Raises:
        UnrecordableError: if it cannot be copied.
    """
    # Tensors with a graph, as a step before may have left in an attribute, do not copy themselves.
    held = [tensor for tensor in held_tensors(cell).values() if not tensor.is_leaf]
    try:
        copies: dict[int, Any] = {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in held}
        twin = copy.deepcopy(cell, copies)
    except Exception as error:
        # torch's own words are about something else here.
        graph = "deepcopy protocol" in str(error)
        why = "it holds a tensor with a graph where it cannot be found; detach it" if graph else error
        raise UnrecordableError(f"it cannot be copied to be recorded: {why}") from error
    if made is not None:
        copies.pop(id(copies), None)  # where what was copied is kept alive
        made.extend(copies.values())
    return twin


def watch_step(cell: nn.Module, input: Tree, state: Tree, context: Tree) -> None:
    """Run one step of a twin, forward and backward, and learn what it can read outside of the cell.

    Raises:
        UnrecordableError: if the cell cannot be copied, or changes something outside of itself.
    """
    if modules_are_patched():  # a plan for the time of a trace: what is reached now is the tracer's, and goes with it
        hidden = hidden_in(cell)
        if hidden:
            raise UnrecordableError(f"it holds {hidden[0]}, whose changes cannot be seen")
        return
    environment = Environment.of(cell)

    def kind_of_step() -> Any:
        return contents_of(cell), environment.version(), TreeSpec.of((input, state, context))

    if not environment.open and kind_of_step() in environment.agreed:  # tried for another reason in the same call
        return
    own: list[Any] = []
    twin = twin_of(cell, own)
    arguments = map_leaves(new_leaf, arguments_of(input, state, context))
    by = [x for x in (*leaves(arguments), *twin.parameters()) if x.requires_grad]
    with torch.enable_grad():
        environment.watch(twin, own, lambda: twin(*arguments), by)
    environment.agreed.add(kind_of_step())
