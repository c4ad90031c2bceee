"""A twin of a cell to record on, and what running it has changed: nothing may happen to the cell itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.internals import modules_are_patched
from unrolled.recording.guards import held_by
from unrolled.recording.tape import UnrecordableError
from unrolled.recording.watch import watcher_of
from unrolled.trees import Tree, leaves, map_leaves


def twin_of(cell: nn.Module) -> nn.Module:
    """A deep copy of a cell.

    Raises:
        UnrecordableError: if it cannot be copied.
    """
    return _twin_and_copies(cell)[0]


def _twin_and_copies(cell: nn.Module) -> tuple[nn.Module, list[Any]]:
    """A deep copy, and all the objects that were made for it."""
    # Tensors with a graph, as a step before may have left in an attribute, do not copy themselves.
    held = [t for module in cell.modules() for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf]
    try:
        copies: dict[int, Any] = {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in held}
        twin = copy.deepcopy(cell, copies)
    except Exception as error:
        raise UnrecordableError(f"it cannot be copied to be recorded: {error}") from error
    copies.pop(id(copies), None)  # where what was copied is kept alive
    return twin, list(copies.values())


def observe(cell: nn.Module, input: Tree, state: Tree, context: Tree) -> None:
    """Run one step of a twin, forward and backward, and learn what it can read outside of the cell.

    Raises:
        UnrecordableError: if the cell cannot be copied, or changes something outside of itself.
    """
    if modules_are_patched():  # a plan for the time of a trace: what is reached now is the tracer's, and goes with it
        return
    watcher = watcher_of(cell)

    def kind() -> Any:
        kinds = [(x.shape, x.dtype, x.device) for tree in (input, state, context) for x in leaves(tree)]
        return held_by(cell), watcher.version(), tuple(kinds)

    if not watcher.open and kind() in watcher.agreed:  # tried for another reason in the same call
        return
    twin, own = _twin_and_copies(cell)
    given = [tree if tree is None else map_leaves(_leaf, tree) for tree in (input, state, context)]
    arguments = given[: 2 + (context is not None)]

    by = [x for x in (*leaves(given), *twin.parameters()) if x.requires_grad]
    with torch.enable_grad():
        watcher.watch(twin, own, lambda: twin(*arguments), by)
    watcher.agreed.add(kind())


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point() or tensor.is_complex())


def scratch_of(cell: nn.Module, twin: nn.Module) -> list[str]:
    """Tensor attributes that running the twin has written: they may be no more than scratch.

    Raises:
        UnrecordableError: if it has changed anything else: that is state which one step leaves for the next.
    """
    written = []
    for (name, before), (_, after) in zip(cell.named_modules(), twin.named_modules(), strict=True):
        for kind in ("_parameters", "_buffers"):
            _refuse_changed(name, getattr(before, kind), getattr(after, kind))
        for key in dict.fromkeys([*vars(before), *vars(after)]):
            old, new = vars(before).get(key), vars(after).get(key)
            if isinstance(new, Tensor) and not (isinstance(old, Tensor) and _same(old, new)):
                written.append(key)
                vars(after).pop(key)
                if key in vars(before):
                    vars(after)[key] = old
    if held_by(cell) != held_by(twin):
        raise UnrecordableError("its step leaves something in an attribute for the next one")
    return written


def _refuse_changed(module: str, before: dict[str, Tensor | None], after: dict[str, Tensor | None]) -> None:
    for key, old in before.items():
        new = after.get(key)
        if (old is None) != (new is None) or (old is not None and new is not None and not _same(old, new)):
            raise UnrecordableError(f"its step changes {f'{module}.{key}'.lstrip('.')}")


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.equal(one.detach().nan_to_num(), other.detach().nan_to_num())
