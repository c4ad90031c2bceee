"""Recording: running a step on real tensors while a tape notes every ATen operation below autograd.

The tape knows a value by where it lies in memory (`memory`), and keeps all of them alive so that no memory is used
twice. In-place operations are written down as their functional counterparts (`functional`). What ran inside an
`autograd.Function` is seen because autograd was off meanwhile and its result has a Python node for its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode

from unrolled.internals import DispatchMode
from unrolled.recording.checks import WRITTEN_OUT, Asked, asks
from unrolled.recording.draws import fills, formula
from unrolled.recording.events import Events, UnrecordableError, depends_on_numbers
from unrolled.recording.functional import as_full, counterpart, note_written, refuse_if_more_is_written
from unrolled.recording.lines import after
from unrolled.recording.memory import Memory, Region
from unrolled.recording.program import Draw, Ref, refs_of
from unrolled.recording.view_writes import ViewStep, within
from unrolled.unseen import draws


class GivenGenerators(TorchFunctionMode):
    """Tells a tape which generator is passed by hand: below autograd torch shows another object for it.

    Args:
        tape: the tape.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before, self._tape.given = self._tape.given, (kwargs or {}).get("generator", self._tape.given)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._tape.given = before


class Tape(DispatchMode):
    """Notes every operation that runs while it is active.

    Args:
        decomposition: for an operation what computes the same by simpler ones, to be written down in its place; that
            may return NotImplemented for arguments that it leaves as they are. Only under autograd that has seen the
            operation itself: its derivative is not everywhere that of the formula.
        line: tells which line of the user's code runs.

    Attributes:
        events: the operations, in order.
        tensors: for each value a tensor like it.
        externals: values that came from nowhere: parameters, buffers, attributes, constants.
        constants: externals that the step made itself out of Python numbers.
        leaves: the inputs and externals that have a gradient.
        memory: which value lies where.
        given: the generator that is passed by hand to what runs now.
        asked: what it asked of its numbers, in order.
    """

    def __init__(
        self,
        decomposition: Callable[[Any], Callable[..., Any] | None] = lambda func: None,
        line: Callable[[], str] = str,
    ) -> None:
        super().__init__()
        self.decomposition, self.line = decomposition, line
        self.externals: list[int] = []
        self.constants: set[int] = set()
        self.leaves: dict[int, Tensor] = {}
        self._events = Events()
        self.events, self.tensors = self._events.noted, self._events.tensors
        self.memory = Memory(self._events)
        self.asked: list[Asked] = []
        self.given: Generator | None = None
        self._formula: Any = None  # what is being written down in the place of an operation

    def add(self, tensor: Tensor) -> int:
        """Give a tensor that the step did not make a number of its own: an input."""
        value = self._events.value(tensor)
        self.memory.put(tensor, value, own=False)
        if tensor.requires_grad and tensor.is_leaf:
            self.leaves[value] = tensor
        return value

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor that was seen; one that never was is an external."""
        value = self.memory.read(tensor)
        if value is None:
            value = self.add(tensor)
            self.externals.append(value)
        return value

    def note(self, target: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[int, ...]:
        """Note down an operation that did not run; the numbers of its results, which are like these tensors."""
        return self._events.note(target, args, results, differentiable=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._events.line = self.line()
        if asks(func, args):
            return self._answer(func, args, kwargs)
        self._refuse_unrecordable(func, args)
        by_chance = draws(func, args, kwargs)
        simpler = formula(func, args) if by_chance else self.decomposition(func)
        if simpler is not None and simpler is not self._formula:
            before, self._formula = self._formula, simpler
            try:
                with self:
                    result = simpler(*args, **kwargs)
            finally:
                self._formula = before
            if result is not NotImplemented:
                in_place = by_chance and func._schema.is_mutable
                return self._become(func, args[0], result) if in_place else result
        if by_chance:
            return self._draw(func, args, kwargs)
        if torch.Tag.inplace_view in func.tags:
            return self._view_in_place(func, args)
        if func._schema.is_mutable:
            return self._write_in_place(func, args, kwargs)
        if func is _ATEN.lift_fresh.default and self.memory.read(args[0]) is None:
            return self._constant(args[0])
        recorded, named = self._numbered(args), {name: self._numbered(arg) for name, arg in kwargs.items()}
        result = func(*args, **kwargs)
        self._write(func, recorded, named, args, result)
        return result

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operation answers that asks for True or False; the recording rests on it."""
        if self.memory.in_backward:
            raise UnrecordableError(after("the backward of an autograd.Function asks for numbers", self._events.line))
        answer = func(*args, **kwargs)
        asked = args[0]
        if func in WRITTEN_OUT:
            with self:
                asked = WRITTEN_OUT[func](*args, **kwargs)
        if asked is not None:
            self.asked.append(Asked(self.number(asked), answer is not False, self._events.line))
        return answer

    def _draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note an operation that draws; of a tensor that it only fills, how that lies in memory."""
        by_hand, place = kwargs.get("generator") is not None, args[0] if fills(func) else None
        if by_hand and self.given is None:
            raise UnrecordableError(f"it draws from a generator that cannot be told from others ({func})")
        draw = Draw(func, None, self.given if by_hand else None)
        if func._schema.is_mutable:
            if place is None:
                raise UnrecordableError(f"how much it draws at random depends on the numbers in its tensors ({func})")
            self._refuse_others_tensor(func, place)
        if place is None:
            recorded = self._numbered(args)
        else:
            draw = replace(draw, filled=(place.dtype, place.device))
            recorded = (tuple(place.shape), place.stride(), *self._numbered(args[1:]))
        named = {name: self._numbered(arg) for name, arg in kwargs.items() if name != "generator"}
        result = func(*args, **kwargs)
        if place is not None and func._schema.is_mutable:
            (value,) = self._note(draw, recorded, (place,), named)
            self.memory.write(place, value, seen=torch.is_grad_enabled() and place.requires_grad)
        else:
            self._write(draw, recorded, named, args, result)
        return result

    def _numbered(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return Ref(self.number(tree))
        if isinstance(tree, list | tuple):
            return tuple(self._numbered(child) for child in tree)
        return tree

    def _write(self, func: Any, recorded: Any, named: dict[str, Any], args: tuple[Any, ...], result: Any) -> None:
        results = result if isinstance(result, list | tuple) else (result,)
        target = _ANY_LAYOUT.get(func, func)
        if func is _ATEN.slice_scatter.default:
            recorded = within(recorded, result)
        call = as_full(func, recorded, result) or (target, recorded, named)
        outputs = self._note(call[0], call[1], results, call[2])
        source = Region.of(args[0]) if args and isinstance(args[0], Tensor) else None
        for index, (tensor, value) in enumerate(zip(results, outputs, strict=True)):
            if value >= 0 and source is not None and source.storage == Region.of(tensor).storage != 0:
                step = ViewStep(target, recorded[1:], index, len(results))
                self.memory.show(tensor, value, source, step, carries=_carries(func, args[0]))
            elif value >= 0:
                self.memory.put(tensor, value, own=True)

    def _note(self, target: Any, args: Any, results: Any, kwargs: dict[str, Any]) -> tuple[int, ...]:
        # A draw that reads nothing is no part of what an `autograd.Function` computes, or of what has no gradients.
        apart = isinstance(target, Draw) and not any(refs_of((args, tuple(kwargs.values()))))
        on = torch.is_grad_enabled() or apart
        return self._events.note(target, args, results, differentiable=on, kwargs=kwargs)

    def _become(self, func: Any, tensor: Tensor, result: Tensor) -> Tensor:
        """A tensor becomes what was written down in place of an operation that writes into it."""
        self._refuse_others_tensor(func, tensor)
        value, seen = self.number(result), torch.is_grad_enabled() and tensor.requires_grad
        tensor.copy_(result)
        self.memory.write(tensor, value, seen=seen)
        return tensor

    def _constant(self, tensor: Tensor) -> Tensor:
        """A tensor made of Python numbers: the one that there is becomes a number of the program."""
        if tensor.dim() == 0:
            recorded: tuple[Any, ...] = ((), tensor.item())
            kwargs = {"dtype": tensor.dtype, "device": tensor.device}
            outputs = self._events.note(_ATEN.full.default, recorded, (tensor,), differentiable=True, kwargs=kwargs)
        else:
            value = self._events.value(tensor)
            self.externals.append(value)
            self.constants.add(value)
            outputs = self._events.note(_ATEN.clone.default, (Ref(value),), (tensor,), differentiable=True)
        self.memory.put(tensor, outputs[0], own=True)
        return tensor

    def _write_in_place(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is _ATEN.copy_.default and Region.of(args[0]) == Region.of(args[1]):  # as Python's `x[i] += y` ends
            return func(*args, **kwargs)
        refuse_if_more_is_written(func, args)
        self._refuse_others_tensor(func, args[0])
        recorded, named = self._numbered(args), {name: self._numbered(arg) for name, arg in kwargs.items()}
        seen = torch.is_grad_enabled() and any(x.requires_grad for x in _tensors_of((args, tuple(kwargs.values()))))
        value = note_written(self._events, func, recorded, named, args, kwargs)
        result = func(*args, **kwargs)
        self.memory.write(args[0], value, seen=seen)
        return result

    def _view_in_place(self, func: Any, args: tuple[Any, ...]) -> Any:
        """A tensor becomes a view of what it was."""
        tensor, recorded, target = args[0], self._numbered(args), _ANY_LAYOUT.get(counterpart(func), counterpart(func))
        source, carries, like = Region.of(tensor), _carries(func, tensor), tensor.detach()
        self.memory.stands_for(like, tensor)
        self.tensors[:] = [like if known is tensor else known for known in self.tensors]
        result = func(*args)
        (value,) = self._events.note(target, recorded, (result,), differentiable=torch.is_grad_enabled())
        self.memory.show(result, value, source, ViewStep(target, recorded[1:]), carries=carries)
        return result

    def _refuse_others_tensor(self, func: Any, tensor: Tensor) -> None:
        """Before it is run: what the step did not make is not the recording's to change."""
        if not self.memory.owns(tensor):
            raise UnrecordableError(
                f"{func} writes in place into a tensor that the step did not make; write into a copy: x = x.clone()"
            )

    @staticmethod
    def _refuse_unrecordable(func: Any, args: tuple[Any, ...]) -> None:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise depends_on_numbers(
                "it takes one of them out, by item(), int() or float(); leave it in the tensor, which may be compared"
            )
        dynamic = torch.Tag.dynamic_output_shape in func.tags and not _by_index(func, args)
        if torch.Tag.data_dependent_output in func.tags or dynamic:
            raise depends_on_numbers(str(func))


_ATEN = torch.ops.aten

# Where another engine ran the operation before, its result may lie in memory in another way.
_ANY_LAYOUT = dict.fromkeys((_ATEN.view.default, _ATEN._unsafe_view.default), _ATEN.reshape.default)


def _by_index(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation picks entries by indices: only by a mask their number depends on what is in it."""
    masks = (torch.bool, torch.uint8)
    by_index = func in (_ATEN.index.Tensor, _ATEN._unsafe_index.Tensor)
    return by_index and not any(index is not None and index.dtype in masks for index in args[1])


def _carries(func: Any, source: Tensor) -> bool:
    """Whether a view of a tensor has its gradient."""
    return source.requires_grad and torch.is_grad_enabled() and func is not _ATEN.detach.default


def _tensors_of(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for child in tree:
            yield from _tensors_of(child)


def tangent_like(tensor: Tensor) -> Tensor:
    """A gradient for a recording; it uses up no random numbers of the user's."""
    return torch.linspace(0.5, 1.5, tensor.numel(), dtype=tensor.dtype, device=tensor.device).view(tensor.shape)
