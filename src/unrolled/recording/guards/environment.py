"""Environment: what steps of a cell can read outside of it, and whether that has changed since.

They are learnt by watching steps run (`watch`). What a step changes in them is put back at once, and such a step is not
recorded; what others change in them is seen at the next call, and another plan is made.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from unrolled.recording.events import IrreversibleError, UnrecordableError
from unrolled.recording.externals import OutsideTensor
from unrolled.recording.generators import held_generators
from unrolled.recording.guards.generators import set_state, state_of, whose
from unrolled.recording.guards.glance import Glance
from unrolled.recording.guards.kinds import is_common
from unrolled.recording.guards.places import KindOfTensor, Place, same
from unrolled.recording.guards.reach import Reachable
from unrolled.recording.guards.watch import WatchedStep
from unrolled.trees import Tree


class Environment:
    """The places that steps of a cell can read outside of it, and the values that were seen there.

    Attributes:
        open: what of them cannot be followed; empty if all can.
        modes: functions by which a step asks torch about its modes, by name.
        agreed: kinds of steps that were watched, and of which none changes anything.
        moved: the place that was last found changed, in words.
    """

    _known: ClassVar[WeakKeyDictionary[nn.Module, weakref.ref[Environment]]] = WeakKeyDictionary()
    _lock: ClassVar[Any] = threading.RLock()
    _most_versions: ClassVar[int] = 8

    def __init__(self) -> None:
        self.open = ""
        self.moved = ""
        self.modes: dict[str, Callable[[], Any]] = {}
        self.agreed: set[Any] = set()
        self._places: dict[Any, Place] = {}
        self._generators: dict[int, Any] = {}
        self._versions: list[tuple[int, list[Any]]] = []
        self._numbers = 0
        self._glance = Glance()

    @classmethod
    def of(cls, cell: nn.Module) -> Environment:
        """The environment of a cell, as far as the runs that were watched have shown it.

        It goes when nobody keeps it: what is around a cell may lead back to the cell, which must be able to go.
        """
        with cls._lock:
            environment = cls.known(cell)
            if environment is None:
                environment = cls()
                cls._known[cell] = weakref.ref(environment)
            return environment

    @classmethod
    def known(cls, cell: nn.Module) -> Environment | None:
        """The environment of a cell if there is one."""
        known = cls._known.get(cell)
        return known() if known is not None else None

    def version(self) -> int:
        """A number that stands for the values in all places; the same one when they are again what they were."""
        if not self._glance.stands():
            return self._find_version()
        return self._versions[-1][0] if self._versions else 0

    def tensors(self) -> list[OutsideTensor]:
        """The tensors outside of the cell that its steps were seen to be able to read."""
        kinds = [place for place in self._places.values() if isinstance(place, KindOfTensor)]
        return [OutsideTensor(place.label, id(place.owner), weakref.ref(place.owner)) for place in kinds]

    def _find_version(self) -> int:
        """The version of the values that stand in the places now: an earlier one that they are again, or a new one."""
        with self._lock:
            now = [place.now() for place in self._places.values()]
            latest = self._versions[-1][1]
            pairs = zip(self._places.values(), now, latest, strict=True)
            self.moved = next((place.label for place, one, other in pairs if not same(one, other)), self.moved)
            known = [n for n, (_, values) in enumerate(self._versions) if all(map(same, now, values))]
            if known:
                self._versions.append(self._versions.pop(known[0]))
            else:
                self._add_version(now)
            self._glance = Glance(zip(self._places.values(), self._versions[-1][1], strict=True))
            return self._versions[-1][0]

    def _add_version(self, values: list[Any]) -> None:
        self._numbers += 1
        self.agreed.clear()
        self._versions.append((self._numbers, values))
        del self._versions[: -self._most_versions]

    def watch(self, twin: nn.Module, own: Sequence[Any], step: Callable[[], Tree], by: Sequence[Tensor]) -> None:
        """Run a step on a twin of the cell, forward and backward, and learn from it.

        Args:
            twin: the twin.
            own: the objects that belong to it.
            step: runs it.
            by: the tensors whose gradients are computed.

        Raises:
            UnrecordableError: if the step changes something outside of the cell, draws random numbers of another
                library's, or runs modules with hooks. All is put back.
        """
        reach = Reachable(own)
        watched = WatchedStep(reach, twin)
        try:
            watched.run(step, by)
            changed = [place for place in reach.places.values() if place.changed()]
            if changed and all(is_common(place.reader) for place in changed):
                # What a library looks up once and remembers is no change that a second step makes again.
                reach.places = {key: place.anew() for key, place in reach.places.items()}
                watched.run(step, by)
        finally:
            why = _put_back(reach.places.values(), [(reach.generators[key], s) for key, s in watched.states.items()])
            lasting = reach.put_arrays_back()
            self._learn(reach)
        if reach.hidden:
            raise UnrecordableError(f"its step can read {reach.hidden[0]}, whose changes cannot be seen")
        if lasting:
            raise IrreversibleError(_changes(lasting[0]))
        why = why or watched.hooked
        if why:
            raise UnrecordableError(why)

    def _learn(self, reach: Reachable) -> None:
        with self._lock:
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
                    self._add_version(values)
                self._glance = Glance(zip(self._places.values(), self._versions[-1][1], strict=True))

    @property
    def generators(self) -> list[Any]:
        """The generators of random numbers that steps can reach."""
        return list(self._generators.values())

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


def generators_around(module: nn.Module) -> list[torch.Generator]:
    """The generators from which steps of a network's cells may draw, besides torch's default ones.

    They stand in attributes, or steps that were watched could reach them.
    """
    found = {id(generator): generator for _, generator in held_generators(module)}
    for cell in module.modules():
        reached = Environment.known(cell)
        own = [] if reached is None else reached.generators
        found |= {id(g): g for g in own if isinstance(g, torch.Generator) and g is not torch.default_generator}
    return list(found.values())


def _put_back(places: Iterable[Place], generators: Iterable[tuple[Any, Any]]) -> str:
    """Put back what is not what it was at first; why such a step cannot be recorded, or nothing."""
    changed = [place for place in places if place.changed()]
    for place in changed:
        place.put(place.first)
    drawn = [(generator, state) for generator, state in generators if state_of(generator) != state]
    for generator, state in drawn:
        set_state(generator, state)
    if drawn:
        return f"it draws random numbers of {whose(type(drawn[0][0]))}"
    return _changes(changed[0].label) if changed else ""


def _changes(label: str) -> str:
    return f"its step changes {label}, outside of the cell, for the next one"
