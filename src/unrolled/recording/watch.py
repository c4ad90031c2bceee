"""Watching a step run: what it can read outside of its cell, what it changes there, and whether it has changed since.

One step of a twin is run, forward and backward, under Python's own profiler hook, which tells of every function that
is entered. What these can reach is noted before they run, put back afterwards, and looked at again at every call.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from unrolled.internals import DispatchMode, has_memory
from unrolled.recording import places
from unrolled.recording.generators import set_state, state_of, whose
from unrolled.recording.kinds import HOOKS, is_common
from unrolled.recording.names import names_in
from unrolled.recording.places import MISSING, Place, same
from unrolled.recording.reach import Reach
from unrolled.recording.tape import IrreversibleError, UnrecordableError
from unrolled.trees import Tree, leaves
from unrolled.unseen import OwnDraws, silent

_MOST_VERSIONS = 8
_CALLS = frozenset([nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__])

_OUR_OWN = (__name__, "unrolled.recording.twin")

_watchers: WeakKeyDictionary[nn.Module, weakref.ref[Watcher]] = WeakKeyDictionary()
_lock = threading.RLock()


def watcher_of(cell: nn.Module) -> Watcher:
    """What is known of the surroundings of a cell, by all runs that were watched.

    It goes when nobody keeps it: what surrounds a cell may lead back to the cell, which must be able to go.
    """
    with _lock:
        known = _watchers.get(cell)
        watcher = known() if known is not None else None
        if watcher is None:
            watcher = Watcher()
            _watchers[cell] = weakref.ref(watcher)
        return watcher


class Watcher:
    """The places that steps of a cell can read outside of it.

    Attributes:
        open: what of them cannot be followed; empty if all can.
        modes: what torch is asked about itself, by name.
        agreed: kinds of steps that were watched, and of which none changes anything.
        moved: the place that was last found changed, in words.
    """

    def __init__(self) -> None:
        self.open = ""
        self.moved = ""
        self.modes: dict[str, Callable[[], Any]] = {}
        self.agreed: set[Any] = set()
        self._places: dict[Any, Place] = {}
        self._generators: dict[int, Any] = {}
        self._versions: list[tuple[int, list[Any]]] = []
        self._numbers = 0
        self._look: tuple[list[tuple[Any, Any, Any]], list[tuple[Any, Any, Any, Any]]] = ([], [])

    def version(self) -> int:
        """A number that stands for the values in all places; the same one when they are again what they were."""
        entries, others = self._look
        for get, name, value in entries:
            now = get(name, MISSING)
            if now is not value and not same(now, value):
                return self._moved_on()
        for fetch, owner, name, value in others:
            now = fetch(owner, name)
            if now is not value and not same(now, value):
                return self._moved_on()
        return self._versions[-1][0] if self._versions else 0

    def _moved_on(self) -> int:
        with _lock:
            now = [place.now() for place in self._places.values()]
            latest = self._versions[-1][1]
            pairs = zip(self._places.values(), now, latest, strict=True)
            self.moved = next((place.label for place, one, other in pairs if not same(one, other)), self.moved)
            known = [n for n, (_, values) in enumerate(self._versions) if all(map(same, now, values))]
            if known:
                self._versions.append(self._versions.pop(known[0]))
            else:
                self._add(now)
            self._look_again()
            return self._versions[-1][0]

    def _add(self, values: list[Any]) -> None:
        self._numbers += 1
        self.agreed.clear()
        self._versions.append((self._numbers, values))
        del self._versions[:-_MOST_VERSIONS]

    def _look_again(self) -> None:
        entries, others = [], []
        for place, value in zip(self._places.values(), self._versions[-1][1], strict=True):
            if place.fetch is places.held_in and type(place.owner) is dict:
                entries.append((place.owner.get, place.name, value))
            elif place.fetch is places.of_class:
                entries.append((vars(place.owner).get, place.name, value))
            else:
                others.append((place.fetch, place.owner, place.name, value))
        self._look = entries, others

    def watch(self, twin: nn.Module, own: Sequence[Any], step: Callable[[], Tree], by: Sequence[Tensor]) -> None:
        """Run a step on a twin of the cell, forward and backward, and learn from it.

        Args:
            twin: the twin.
            own: the objects that belong to it.
            step: runs it.
            by: what a gradient can be asked for.

        Raises:
            UnrecordableError: if the step changes something outside of the cell, draws random numbers of another
                library's, or runs modules with hooks. All is put back.
        """
        reach = Reach(own)
        watched = _Watched(reach, twin)
        try:
            watched.run(step, by)
            if _only_remembered(reach.places.values()):
                # What a library looks up once and remembers is no change that a second step makes again.
                reach.places = {key: place.anew() for key, place in reach.places.items()}
                watched.run(step, by)
        finally:
            why = _put_back(reach.places.values(), [(reach.generators[key], s) for key, s in watched.states.items()])
            lasting = _put_back_arrays(reach.large)
            self._learn(reach)
        if lasting:
            raise IrreversibleError(lasting)
        why = why or (f"{watched.hooked} has hooks, which must be called for every copy" if watched.hooked else "")
        if why:
            raise UnrecordableError(why)

    def _learn(self, reach: Reach) -> None:
        with _lock:
            self.version()
            self.open = reach.open
            new = {key: place for key, place in reach.places.items() if key not in self._places}
            self._generators |= reach.generators
            self.modes = {**self.modes, **reach.modes}
            if new or not self._versions:
                self._places |= new
                values = [place.now() for place in new.values()]
                # What was recorded before reads none of the new places: it holds whatever stood there.
                self._versions = [(number, [*before, *values]) for number, before in self._versions]
                if not self._versions:
                    self._add(values)
                self._look_again()

    def snapshot(self) -> Callable[[], str]:
        """What sets all places and generators to what they are now, and says what was changed meanwhile, if anything.

        A step that is tried out changes nothing for anybody; one that is tried again finds and draws the same.
        """
        # What libraries keep for themselves, planning fills as well, and nobody else reads.
        known = [place.anew() for place in self._places.values() if not is_common(place.reader)]
        generators = [(generator, state_of(generator)) for generator in self._generators.values()]
        return lambda: _put_back(known, generators)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A context in which the cell is tried out, and which leaves everything as it was.

        Raises:
            UnrecordableError: if a step changed something.
        """
        put_back = self.snapshot()
        try:
            yield
        except BaseException:
            put_back()
            raise
        why = put_back()
        if why:
            raise UnrecordableError(why)


def _changed(known: Iterable[Place]) -> list[Place]:
    return [place for place in known if not same(place.now(), place.first)]


def _only_remembered(known: Iterable[Place]) -> bool:
    """Whether something has changed, and nothing but what libraries keep for themselves."""
    changed = _changed(known)
    return bool(changed) and all(is_common(place.reader) for place in changed)


class _Watched:
    """A context under the profiler hook."""

    def __init__(self, reach: Reach, twin: nn.Module) -> None:
        self.reach, self.states = reach, dict[int, Any]()
        self.hooked = ""
        self._others: set[types.CodeType] = set()
        self._ours = _codes_of_autograd()
        self._dispatch = _codes_of_dispatch() | {_Unwritten.__torch_dispatch__.__code__}
        self._names = {id(module): name for name, module in twin.named_modules()}
        self._apart: types.FrameType | None = None
        self._refusal: UnrecordableError | None = None

    def __enter__(self) -> None:
        # Who asks to be called at collections would be called in the middle of the step.
        self._collecting = gc.isenabled()
        gc.disable()
        self._before = sys.getprofile()
        sys.setprofile(self._event)

    def __exit__(self, *exc: object) -> None:
        _set_profile(self._before)
        if self._collecting:
            gc.enable()
        if self._refusal is not None:
            raise self._refusal

    def run(self, step: Callable[[], Tree], by: Sequence[Tensor]) -> None:
        """A step, forward and backward."""
        unwritten = _Unwritten(self.reach.memory)
        with silent(), unwritten, self:
            results = step()
        ends = [x for x in leaves(results) if x.requires_grad]
        if ends and by:
            with unwritten, self:
                _go_back(ends, by)

    def _event(self, frame: types.FrameType, event: str, argument: Any) -> None:
        if self._apart is not None:
            self._apart = None if event == "return" and frame is self._apart else self._apart
            return
        if event == "call" and frame.f_code in self._dispatch:
            self._apart = frame
            return
        if frame.f_globals.get("__name__") in _OUR_OWN:
            return
        try:
            if event == "call":
                self._called(frame)
            elif event == "return" and frame.f_back is not None and argument is not None:
                self.reach.pass_on(argument, names_in(frame.f_back.f_code))
            elif event == "c_call":
                self.reach.call(argument)
        except UnrecordableError as refusal:
            self._refusal = self._refusal or refusal
            raise
        known = self.reach.generators
        if len(known) > len(self.states):
            self.states |= {key: state_of(known[key]) for key in known.keys() - self.states.keys()}

    def _called(self, frame: types.FrameType) -> None:
        code = frame.f_code
        if code in self._ours and frame.f_back is not None and frame.f_back.f_code not in self._others:
            return
        self._others.add(code)
        self.reach.enter(code, frame)
        if code in _CALLS:
            module = frame.f_locals.get("self")
            if any(getattr(module, hooks, None) for hooks in HOOKS):
                self.hooked = self.hooked or self._names.get(id(module), "") or "it"


class _Unwritten(DispatchMode):
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


@functools.lru_cache(maxsize=1)
def _codes_of_dispatch() -> frozenset[types.CodeType]:
    """What torch enters for every operation under a mode, as a step is tried out: nothing of the step's."""
    found = set[types.CodeType]()

    def probe() -> None:
        torch.rand(1) + 1

    def note(frame: types.FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_back is not None and frame.f_back.f_code is probe.__code__:
            found.add(frame.f_code)

    with OwnDraws():
        _profiled(note, probe)
    return frozenset(found)


def _go_back(ends: Sequence[Tensor], by: Sequence[Tensor]) -> None:
    torch.autograd.grad(ends, by, [torch.ones_like(x) for x in ends], allow_unused=True)


@functools.lru_cache(maxsize=1)
def _codes_of_autograd() -> frozenset[types.CodeType]:
    """What runs whenever a gradient is asked for, which is nothing of the step's."""
    found = set[types.CodeType]()
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    _profiled(lambda frame, *_: found.add(frame.f_code), lambda: _go_back([y], [x]))
    return frozenset(found)


def _profiled(note: Callable[..., None], run: Callable[[], None]) -> None:
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        _set_profile(before)


def _set_profile(before: Any) -> None:
    """What looked on before; a profiler written in C is turned on again by its own means."""
    sys.setprofile(None)
    if before is not None and hasattr(before, "enable") and not callable(before):
        before.enable()
    else:
        sys.setprofile(before)


def _put_back(known: Iterable[Place], generators: Iterable[tuple[Any, Any]]) -> str:
    """Put back what is not what it was at first; why such a step cannot be recorded, or nothing."""
    changed = _changed(known)
    for place in changed:
        place.put(place.first)
    drawn = [(generator, state) for generator, state in generators if state_of(generator) != state]
    for generator, state in drawn:
        set_state(generator, state)
    if drawn:
        return f"it draws random numbers of {whose(type(drawn[0][0]))}"
    return f"its step changes {changed[0].label}, outside of the cell, for the next one" if changed else ""


def _put_back_arrays(arrays: Iterable[tuple[np.ndarray, np.ndarray, str]]) -> str:
    changed = [(now, before, label) for now, before, label in arrays if now.tobytes() != before.tobytes()]
    for now, before, _ in changed:
        now[...] = before
    return f"its step changes {changed[0][2]}, outside of the cell, for the next one" if changed else ""
