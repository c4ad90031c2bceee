"""Watching a step run: what it can read outside of its cell, and whether it writes there.

One step of a twin of the cell is run, forward and backward, under Python's own profiler hook, which reports every
function that is entered. What these functions can reach is noted before they run.
"""

from __future__ import annotations

import functools
import gc
import importlib
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.autograd_graph import with_gradients
from unrolled.internals import DispatchMode, has_memory
from unrolled.recording.events import IrreversibleError, UnrecordableError
from unrolled.recording.guards.generators import state_of
from unrolled.recording.guards.kinds import what_hooks_ask
from unrolled.recording.guards.names import names_in
from unrolled.recording.guards.reach import Reachable
from unrolled.recording.lines import named_in_refusals
from unrolled.trees import Tree, leaves
from unrolled.unseen import OwnDraws, silent


class _Profiled:
    """A context in which Python reports what runs to `_event`; whoever it reported to before is put back."""

    def _event(self, frame: types.FrameType, event: str, argument: Any) -> None:
        raise NotImplementedError

    def __enter__(self) -> None:
        self._before: Any = sys.getprofile()
        sys.setprofile(self._event)

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(None)
        if hasattr(self._before, "enable") and not callable(self._before):  # a profiler written in C
            self._before.enable()
        else:
            sys.setprofile(self._before)


class WatchedStep(_Profiled):
    """A context in which a step runs and what it can read is noted; collections of garbage wait.

    Args:
        reach: what is found.
        twin: the module whose step it is.

    Attributes:
        states: of generators of random numbers, by the generator's id, before anything was drawn.
        hooked: a module whose hooks must be called, by its name, and why; empty if none of those that ran has any.
    """

    def __init__(self, reach: Reachable, twin: nn.Module) -> None:
        self.states: dict[int, Any] = {}
        self.hooked = ""
        self._reach = reach
        self._others: set[types.CodeType] = set()
        self._names = {id(module): name for name, module in twin.named_modules()}
        self._own_modules = (__name__, "unrolled.recording.guards.twin")
        self._calls = {nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__}
        self._autograd = _codes_of_autograd()
        self._dispatch = _codes_of_dispatch() | {_NoWrites.__torch_dispatch__.__code__, *_CODES_OF_IMPORT}
        self._dispatching: types.FrameType | None = None
        self._refusal: UnrecordableError | None = None
        self._backwards = False

    def __enter__(self) -> None:
        # Who asks to be called at collections would be called in the middle of the step.
        self._collecting = gc.isenabled()
        gc.disable()
        super().__enter__()

    def __exit__(self, *exc: object) -> None:
        super().__exit__()
        if self._collecting:
            gc.enable()
        if self._refusal is not None:
            raise self._refusal

    def run(self, step: Callable[[], Tree], by: Sequence[Tensor]) -> None:
        """Run a step, forward and backward.

        Args:
            step: runs it.
            by: the tensors whose gradients are computed.
        """
        no_writes = _NoWrites(self._reach.memory)
        with named_in_refusals(), silent(), no_writes, self:
            results = step()
        ends = [x for x in leaves(results) if x.requires_grad]
        if ends and by:
            self._backwards = True  # checkpoints set a generator back, and in the end forward again
            with no_writes, self:
                _go_back(ends, by)
            self._backwards = False

    def _event(self, frame: types.FrameType, event: str, argument: Any) -> None:
        if self._dispatching is not None:
            if event == "return" and frame is self._dispatching:
                self._dispatching = None
            return
        if event == "call" and frame.f_code in self._dispatch:
            self._dispatching = frame
            return
        if frame.f_globals.get("__name__") in self._own_modules:
            return
        try:
            if event == "call":
                self._called(frame)
            elif event == "return" and frame.f_back is not None and argument is not None:
                self._reach.pass_on(argument, names_in(frame.f_back.f_code))
            elif event == "c_call" and frame.f_globals.get("__name__") != torch.enable_grad.__module__:
                # What turns gradients on asks how they were only to put them back.
                if not self._backwards and _sets_generator(argument):
                    raise UnrecordableError("its step sets a torch.Generator, from which others draw as well")
                self._reach.call(argument)
        except UnrecordableError as refusal:
            self._refusal = self._refusal or refusal
            raise
        known = self._reach.generators
        if len(known) > len(self.states):
            self.states |= {key: state_of(known[key]) for key in known.keys() - self.states.keys()}

    def _called(self, frame: types.FrameType) -> None:
        code = frame.f_code
        if code in self._autograd and frame.f_back is not None and frame.f_back.f_code not in self._others:
            return
        self._others.add(code)
        self._reach.enter(code, frame)
        if code in self._calls:
            module = frame.f_locals.get("self")
            asked = what_hooks_ask(module)
            if asked:
                self.hooked = self.hooked or f"{self._names.get(id(module), '') or 'it'} {asked}"


class _NoWrites(DispatchMode):
    """A context in which nothing is written into tensors that are not the step's: their numbers are not kept.

    Args:
        memory: what they lie in, by address, and what they are called.
    """

    def __init__(self, memory: dict[int, str]) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            given = [*zip(func._schema.arguments, args, strict=False)]
            given += [(argument, (kwargs or {}).get(argument.name)) for argument in func._schema.arguments[len(args) :]]
            for argument, tensor in given:
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(tensor, Tensor) and has_memory(tensor):
                    self._refuse(tensor)
        return func(*args, **(kwargs or {}))

    def _refuse(self, tensor: Tensor) -> None:
        label = self._memory.get(tensor.untyped_storage().data_ptr())
        if label is not None:
            raise IrreversibleError(f"its step changes {label}, outside of the cell, for the next one")


def _sets_generator(function: Any) -> bool:
    """Whether a function written in C is one by which a generator comes to draw other numbers."""
    setting = ("manual_seed", "seed", "set_state", "graphsafe_set_state", "set_offset")
    owner = getattr(function, "__self__", None)
    return isinstance(owner, torch.Generator) and getattr(function, "__name__", "") in setting


def _go_back(ends: Sequence[Tensor], by: Sequence[Tensor]) -> None:
    torch.autograd.grad(with_gradients(ends, [torch.ones_like(x) for x in ends]), by, allow_unused=True)


_CODES_OF_IMPORT = tuple(
    function.__code__
    for name in ("_find_and_load", "_handle_fromlist")
    if isinstance(function := getattr(importlib._bootstrap, name, None), types.FunctionType)
)
"""What finds a module that is imported: which one that is, the code that imports it names."""


class _EnteredCode(_Profiled):
    """A context that notes the code of functions that are entered: of all, or of those that one code object calls."""

    def __init__(self, caller: types.CodeType | None = None) -> None:
        self.found: set[types.CodeType] = set()
        self._caller = caller

    def _event(self, frame: types.FrameType, event: str, argument: Any) -> None:
        called_by = frame.f_back.f_code if event == "call" and frame.f_back is not None else None
        if self._caller is None or called_by is self._caller:
            self.found.add(frame.f_code)


@functools.lru_cache(maxsize=1)
def _codes_of_autograd() -> frozenset[types.CodeType]:
    """What runs whenever a gradient is computed, which is nothing of the step's."""
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    entered = _EnteredCode()
    with entered:
        _go_back([y], [x])
    return frozenset(entered.found)


@functools.lru_cache(maxsize=1)
def _codes_of_dispatch() -> frozenset[types.CodeType]:
    """What torch enters for every operation under a mode, as a step is tried out: nothing of the step's."""

    def probe() -> None:
        torch.rand(1) + 1

    entered = _EnteredCode(probe.__code__)
    with OwnDraws(), entered:
        probe()
    return frozenset(entered.found) | _codes_of_lookup()


def _codes_of_lookup() -> frozenset[types.CodeType]:
    """What torch enters when it looks up an operation for the first time in a process."""
    namespace = type(torch.ops.aten)
    entered = _EnteredCode(namespace.__getattr__.__code__)
    with entered:
        _ = namespace("aten").add
    return frozenset(entered.found)
