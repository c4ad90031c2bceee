"""Twins: copies of a cell to record on, and what running one has changed. Nothing may happen to the cell itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.autograd_graph import differentiable
from unrolled.internals import modules_are_patched
from unrolled.recording.events import UnrecordableError
from unrolled.recording.guards.environment import Environment
from unrolled.recording.guards.fingerprint import contents_of
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
    held = [t for module in cell.modules() for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf]
    try:
        copies: dict[int, Any] = {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in held}
        twin = copy.deepcopy(cell, copies)
    except Exception as error:
        raise UnrecordableError(f"it cannot be copied to be recorded: {error}") from error
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
        return
    environment = Environment.of(cell)

    def kind_of_step() -> Any:
        return contents_of(cell), environment.version(), TreeSpec.of((input, state, context))

    if not environment.open and kind_of_step() in environment.agreed:  # tried for another reason in the same call
        return
    own: list[Any] = []
    twin = twin_of(cell, own)
    arguments = map_leaves(_with_gradient, arguments_of(input, state, context))
    by = [x for x in (*leaves(arguments), *twin.parameters()) if x.requires_grad]
    with torch.enable_grad():
        environment.watch(twin, own, lambda: twin(*arguments), by)
    environment.agreed.add(kind_of_step())


def _with_gradient(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(differentiable(tensor))


def scratch_of(cell: nn.Module, twin: nn.Module) -> list[str]:
    """Tensor attributes that running the twin has written: they may be no more than scratch.

    Raises:
        UnrecordableError: if it has changed anything else: that is state which one step leaves for the next.
    """
    written = []
    for (name, before), (_, after) in zip(cell.named_modules(), twin.named_modules(), strict=True):
        tensors = {**after._parameters, **after._buffers}
        for key, tensor in (*before._parameters.items(), *before._buffers.items()):
            if not _equal(tensor, tensors.get(key)):
                raise UnrecordableError(f"its step changes {f'{name}.{key}'.lstrip('.')}")
        for key in dict.fromkeys([*vars(before), *vars(after)]):
            old, new = vars(before).get(key), vars(after).get(key)
            if isinstance(new, Tensor) and not (isinstance(old, Tensor) and _equal(old, new)):
                written.append(key)
                vars(after).pop(key)
                if key in vars(before):
                    vars(after)[key] = old
    if contents_of(cell) != contents_of(twin):
        raise UnrecordableError("its step leaves something in an attribute for the next one")
    return written


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.equal(one.detach().nan_to_num(), other.detach().nan_to_num())
