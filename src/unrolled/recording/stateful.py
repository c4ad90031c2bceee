"""The state of stateful modules: in which attributes it is, and what a fresh module has there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from unrolled.cells.adapted import AdaptedCell
from unrolled.cells.stateful import NOTHING, AttributeStep, get_attribute, read_state, set_attribute
from unrolled.errors import CellError, StateError
from unrolled.recording.events import UnrecordableError
from unrolled.recording.externals import External
from unrolled.recording.guards.environment import Environment
from unrolled.recording.guards.fingerprint import fingerprint
from unrolled.recording.guards.scratch import Twin, record_cell, same_numbers
from unrolled.recording.guards.twin import twin_of, watch_step
from unrolled.recording.record import Recording, samples_of
from unrolled.trees import Tree, TreeSpec, describe, flatten, leaves, map_leaves, unflatten
from unrolled.unseen import OwnDraws, silent, unseen

_proved: WeakKeyDictionary[nn.Module, tuple[Any, TreeSpec, dict[str, Tree]]] = WeakKeyDictionary()
"""For a cell what was proved last: its guards, the kind of input, and its state after a step."""


def state_of_fresh(cell: AdaptedCell, input: Tree) -> Tree:
    """The state that the first copy of a stateful module receives: what the module has after its own reset.

    Its numbers are read anew at every call; in which attributes it is, and in what shapes, as guards say.

    Args:
        cell: the module, adapted; if nobody has said in which attributes its state is, they are found and kept in it.
        input: of the first copy, `[B, ...]`, whose shape that of the state depends on.

    Raises:
        StateError: if it cannot be proved which attributes are the state, or what a fresh module has in them.
    """
    with unseen():
        guards, known = _guards(cell), _proved.get(cell)
        moved = known is None or guards is None or known[0] != guards
        step = cell.step
        if not isinstance(step, AttributeStep) or (step.found and moved and guards is not None):
            step = AttributeStep(_found(cell, input), found=True)
        at_first = _at_first(cell.module, step.names, cell.display_name)
        if known is None or moved or known[1] != TreeSpec.of(input) or step is not cell.step:
            after = _state_after(cell.module, step.names, at_first, cell.display_name, input)
            cell.step = step
            known = _proved[cell] = _guards(cell), TreeSpec.of(input), after
    return {name: _filled(at_first[name], value) for name, value in known[2].items()}


def _guards(cell: nn.Module) -> Any:
    try:
        return fingerprint(cell)
    except UnrecordableError:
        return None


# -- which attributes -------------------------------------------------------------------------------------------------


def _found(cell: AdaptedCell, input: Tree) -> Sequence[str]:
    """The attributes in which a module's calls leave what later calls read, proved on recordings."""
    lacking = (
        f"{cell.display_name} has no initial_state and none was given; pass a state to the call, "
        "or make the cell with as_cell(module, state=(batch_size, device=None, dtype=None) -> state)"
    )
    after = Twin(_fresh_twin(cell.module))
    try:
        with silent(), torch.no_grad():
            output = after.module(input)
        leaves(output)
    except Exception:  # it is not called with an input alone
        raise StateError(lacking) from None
    try:
        names = _read_before_written(cell.module, after, input)
    except Exception as error:
        raise StateError(
            f"{lacking}. If its attributes keep the state, name them: as_cell(module, state_attributes=(...)); "
            f"which they are could not be proved: {error}"
        ) from error
    if not names:
        raise StateError(lacking)
    if isinstance(output, tuple) and len(output) == 2:
        raise StateError(f"{lacking}. Or, as it keeps what it reads later: as_cell(module, state_attributes={names})")
    return names


def _read_before_written(module: nn.Module, after: Twin, input: Tree) -> tuple[str, ...]:
    """Of the attributes in which a call has left something those that the next one reads.

    Args:
        module: the module.
        after: a twin of it after a call.
        input: what it was called with.
    """
    places = [*after.replaced(), *after.overwritten()]
    names = sorted({_attribute_of(place, after.module) for place in places})
    state = {name: map_leaves(Tensor.detach, get_attribute(after.module, name)) for name in names}
    found = _recorded_with(module, state, input)
    read = {value for op in found.program.ops for value in op.inputs}.union(found.outputs)
    read.update(value for value, own in zip(found.next_state, found.state, strict=True) if value != own)
    own = iter(found.state)
    many = {name: [next(own) for _ in leaves(state[name])] for name in names}
    needed = {name: state[name] for name in names if not read.isdisjoint(many[name])}
    if len(needed) < len(names):  # others are scratch, if that can be proved
        _recorded_with(module, needed, input)
    return tuple(needed)


def _recorded_with(module: nn.Module, state: dict[str, Tree], input: Tree) -> Recording:
    trial = AdaptedCell(_fresh_twin(module), AttributeStep(tuple(state)), None)
    watch_step(trial, input, state, None)
    with Environment.of(trial).kept():
        return record_cell(trial, samples_of((input, state, None), len(leaves(input)[0])))


def _attribute_of(external: External, module: nn.Module) -> str:
    """The attribute, as a module's own code names it, in which a tensor is found."""
    part, name = module.get_submodule(external.module), external.way[0]
    if len(external.way) == 2 and isinstance(external.way[1], tuple):
        # A library's own dict of states, of which the module makes attributes.
        key = external.way[1][0]
        if isinstance(key, str) and getattr(part, key, None) is External("", external.way).fetch(part):
            name = key
    return f"{external.module}.{name}".lstrip(".")


# -- what a fresh module has in them ----------------------------------------------------------------------------------


def _fresh_twin(module: nn.Module) -> nn.Module:
    """A copy of a module after its own reset, if it has one; `reset_mem` is snntorch's."""
    twin = twin_of(module)
    for part in twin.modules():
        for reset in _resets_of(part)[:1]:
            reset()
    return twin


def _resets_of(part: nn.Module) -> list[Callable[[], Any]]:
    return [way for name in ("reset", "reset_mem") if callable(way := getattr(part, name, None))]


def _at_first(module: nn.Module, names: Sequence[str], called: str) -> dict[str, Any]:
    """What stands in a module's attributes after its own reset, as numbers."""
    with torch.enable_grad():
        fresh = _fresh_twin(module) if any(map(_resets_of, module.modules())) else module
    found = {name: get_attribute(fresh, name) for name in names}
    computed = [x for value in found.values() for x in _tensors_of(value) if x.requires_grad and not x.is_leaf]
    if fresh is not module and computed:
        raise _unknown(called, names, "its reset computes it from parameters, to which no gradient would flow")
    return found


def _tensors_of(value: Any) -> list[Tensor]:
    try:
        return leaves(value)
    except TypeError:  # a number, say
        return []


def _state_after(
    module: nn.Module, names: Sequence[str], at_first: dict[str, Any], called: str, input: Tree
) -> dict[str, Tree]:
    """The state after a first step; from what stands there at first, in these shapes, that step must be the same."""
    twin, other = _fresh_twin(module), _fresh_twin(module)
    try:
        by_itself = _outcome(twin, names, lambda: twin(input))
        for name in names:
            set_attribute(other, name, _filled(at_first[name], by_itself[1][name]))
        same = _alike(by_itself, _outcome(other, names, lambda: other(input)))
    except CellError:
        raise
    except Exception as error:
        raise _unknown(called, names, f"{type(error).__name__}: {error}") from error
    if not same:
        raise _unknown(called, names, "its first step is another one from zeros of that shape")
    return map_leaves(Tensor.detach, by_itself[1])


def _outcome(module: nn.Module, names: Sequence[str], call: Callable[[], Tree]) -> tuple[Tree, dict[str, Tree]]:
    with silent(), torch.no_grad(), OwnDraws():
        output = call()
    return output, {name: read_state(module, name) for name in names}


def _filled(value: Any, after: Tree) -> Tree:
    """What stood in an attribute, a number say, in the shape of what stands there after a step."""
    tensors, structure = flatten(after)
    values = [value] * len(tensors)
    if value is not NOTHING and value is not None and not isinstance(value, int | float):
        values, own = flatten(value)
        if own != structure:
            raise StateError(f"it holds {value!r:.80} at first and {after!r:.80} after a step")
    return unflatten(structure, [_like(one, other) for one, other in zip(values, tensors, strict=True)])


def _like(value: Any, after: Tensor) -> Tensor:
    if value is NOTHING or value is None or (isinstance(value, Tensor) and not value.numel()):
        return torch.zeros_like(after)
    if not isinstance(value, Tensor):
        return torch.full_like(after, value)
    value = value.detach().to(after)
    if value.shape != after.shape and bool((value == value.flatten()[0]).all()):
        value = value.flatten()[0]  # of another batch
    if value.dim() and value.shape != after.shape:
        raise StateError(f"it holds {describe(value)} there, and {describe(after)} after a step; reset it")
    return value.expand(after.shape).clone()


def _alike(one: Tree, other: Tree) -> bool:
    (tensors, structure), (others, same) = flatten(one), flatten(other)
    return structure == same and all(map(same_numbers, tensors, others))


def _unknown(called: str, names: Sequence[str], why: str) -> StateError:
    return StateError(
        f"what {called} starts from in {', '.join(names)} is not known: {why}; pass a state to the call, a dict of "
        "these, or make the cell with as_cell(module, state_attributes=..., state=(batch_size, device=None, "
        "dtype=None) -> state)"
    )
