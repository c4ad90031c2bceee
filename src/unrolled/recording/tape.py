"""Recording: running a step on real tensors while a tape notes every ATen operation below autograd.

The tape knows a value by where it lies in memory, and keeps all of them alive so that no memory is used twice. In-place
operations are written down as their functional counterparts. What ran inside an `autograd.Function` is seen because
autograd was off meanwhile and its result has a Python node for its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode

from unrolled.internals import DispatchMode
from unrolled.recording.draws import draws, fills, formula
from unrolled.recording.program import Draw, Op, Ref, refs_of


class UnrecordableError(Exception):
    """A step that cannot be recorded; the message says why, and ends up in the plan."""


class IrreversibleError(UnrecordableError):
    """A step that does something which cannot be put back: it is not even tried."""


@dataclass(frozen=True)
class Event(Op):
    """One operation as it ran, its tensors replaced by the numbers of values.

    Attributes:
        differentiable: whether autograd was on.
    """

    differentiable: bool


class _Region(NamedTuple):
    """Where a tensor lies in memory, and how it is read: as conjugates or negatives, where torch puts that off."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    turned: tuple[bool, bool]

    @classmethod
    def of(cls, tensor: Tensor) -> _Region:
        storage, turned = tensor.untyped_storage().data_ptr(), (tensor.is_conj(), tensor.is_neg())
        return cls(storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, turned)

    def elements(self) -> set[int]:
        """Its bytes, by their places in the storage: a complex number and its parts share some."""
        found = torch.tensor([self.offset])
        for size, stride in zip(self.shape, self.strides, strict=True):
            found = (found.unsqueeze(1) + torch.arange(size) * stride).flatten()
        width = self.dtype.itemsize
        return set((found.unsqueeze(1) * width + torch.arange(width)).flatten().tolist())


class NumbersStayUnread(TorchFunctionMode):
    """Refuses what gives a tensor's numbers to Python, where the tape cannot see what becomes of them."""

    _readers = frozenset(["tolist", "numpy", "item", "__array__", "__repr__", "__format__", "__bool__", "data_ptr"])

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in self._readers:
            raise UnrecordableError(f"what it does may depend on the numbers in its tensors ({func.__name__})")
        return func(*args, **(kwargs or {}))


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
            may return NotImplemented for arguments that it leaves as they are. Only
            under autograd that has seen the operation itself: its derivative is not everywhere that of the formula.

    Attributes:
        events: the operations, in order.
        tensors: for each value the tensor that it was, seen last.
        externals: values that came from nowhere: parameters, buffers, attributes, constants.
        nodes: values that an `autograd.Function` made, each with that Function's node.
        fresh: externals that the step made itself out of Python numbers.
        given: the generator that is passed by hand to what runs now.
    """

    def __init__(self, decomposition: Callable[[Any], Callable[..., Any] | None] = lambda func: None) -> None:
        super().__init__()
        self.decomposition = decomposition
        self.events: list[Event] = []
        self.tensors: list[Tensor] = []
        self.externals: list[int] = []
        self.nodes: dict[int, Any] = {}
        self.fresh: set[int] = set()
        self.in_backward = False
        self._keep: list[Any] = []
        self._at: dict[_Region, int] = {}
        self._detached_at: dict[_Region, int] = {}
        self._stale: set[_Region] = set()
        self._tracked: set[int] = set()
        self.given: Generator | None = None
        self._formula: Any = None  # what is being written down in the place of an operation

    def add(self, tensor: Tensor) -> int:
        """Give a tensor a number of its own: an input."""
        value = self._new(tensor)
        self._at[_Region.of(tensor)] = value
        return value

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor that was seen; one that never was is an external."""
        region = _Region.of(tensor)
        if region in self._stale:
            raise UnrecordableError("it changes a tensor in place and then reads it through another view")
        value = self._at.get(region)
        if value is None:
            value = self.add(tensor)
            self.externals.append(value)
            return value
        if tensor.requires_grad:
            self._note_node(value, tensor)
        elif not self.in_backward and value in self._tracked and region in self._detached_at:
            return self._detached_at[region]
        return value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
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
        recorded, named = self._numbered(args), {name: self._numbered(arg) for name, arg in kwargs.items()}
        if func._schema.is_mutable:
            self._refuse_foreign_write(func, recorded)
        result = func(*args, **kwargs)
        if func in _FILLED:
            # Only the shapes of its arguments count: nothing is read, and nothing need be kept.
            recorded = (tuple(result.shape), args[-1] if _FILLED[func] is None else _FILLED[func])
            named = {"dtype": result.dtype, "device": result.device}
            func = torch.ops.aten.full.default
        func = _ANY_LAYOUT.get(func, func)
        if func is torch.ops.aten.lift_fresh.default:
            self.fresh.update(refs_of(recorded))
        if func._schema.is_mutable:
            self._write_in_place(func, recorded, named, args)
        else:
            self._write(func, recorded, named, result)
        return result

    def _draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note an operation that draws; of a tensor that it only fills, how that lies in memory."""
        by_hand, place = kwargs.get("generator") is not None, args[0] if fills(func) else None
        if by_hand and self.given is None:
            raise UnrecordableError(f"it draws from a generator that cannot be told from others ({func})")
        draw, named = Draw(func, None, self.given if by_hand else None), {**kwargs}
        named.pop("generator", None)
        if func._schema.is_mutable:
            if place is None:
                raise UnrecordableError(f"how much it draws at random depends on the numbers in its tensors ({func})")
            self._refuse_others_tensor(func, self._numbered(place))
        if place is None:
            recorded = self._numbered(args)
        else:
            draw = replace(draw, filled=(place.dtype, place.device))
            recorded = (tuple(place.shape), place.stride(), *self._numbered(args[1:]))
        named = {name: self._numbered(arg) for name, arg in named.items()}
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._overwrite(draw, recorded, named, place)
        else:
            self._write(draw, recorded, named, result)
        return result

    def _numbered(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return Ref(self.number(tree))
        if isinstance(tree, list | tuple):
            return tuple(self._numbered(child) for child in tree)
        return tree

    def _new(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        self._keep.append(tensor)
        return len(self.tensors) - 1

    def _note_node(self, value: int, tensor: Tensor) -> None:
        self._tracked.add(value)
        self.tensors[value] = tensor
        node = tensor.grad_fn
        self._keep.append(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            self.nodes[value] = node

    def _write(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        results = result if isinstance(result, list | tuple) else (result,)
        outputs = []
        for tensor in results:
            if not isinstance(tensor, Tensor):
                outputs.append(-1)
                continue
            region = _Region.of(tensor)
            value = self._new(tensor)
            if func is torch.ops.aten.detach.default:
                self._detached_at[region] = value
            else:
                self._at[region] = value
                self._stale.discard(region)
            outputs.append(value)
        self._append(func, args, kwargs, tuple(outputs))

    def _append(self, func: Any, args: Any, kwargs: dict[str, Any], outputs: tuple[int, ...]) -> None:
        # What reads nothing is no part of what an `autograd.Function` computes, nor of a region without gradients.
        apart = isinstance(func, Draw) or func in _EMPTY
        differentiable = torch.is_grad_enabled() or (apart and not any(refs_of((args, kwargs))))
        self.events.append(Event(func, args, tuple(kwargs.items()), outputs, differentiable))

    def _refuse_foreign_write(self, func: Any, args: Any) -> None:
        """Before it is run: what the step did not make is not the recording's to change."""
        target = args[0] if args else None
        if not isinstance(target, Ref) or any(argument.is_out for argument in func._schema.arguments):
            raise UnrecordableError(f"{func} writes into a tensor in a way that has no functional counterpart")
        self._refuse_others_tensor(func, target)
        self._functional(func)

    def _refuse_others_tensor(self, func: Any, target: Ref) -> None:
        if not any(target.value in event.outputs for event in self.events):
            raise UnrecordableError(f"{func} writes in place into a tensor that the step did not make")

    def _write_in_place(self, func: Any, args: Any, kwargs: dict[str, Any], given: tuple[Any, ...]) -> None:
        self._overwrite(self._functional(func), args, kwargs, given[0])

    def _overwrite(self, func: Any, args: Any, kwargs: dict[str, Any], tensor: Tensor) -> None:
        """A tensor becomes what an operation returns."""
        value = self._new(tensor)
        self._append(func, args, kwargs, (value,))
        region = _Region.of(tensor)
        self._outdate(tensor)
        self._at[region] = value
        self._stale.discard(region)

    def _become(self, func: Any, tensor: Tensor, result: Tensor) -> Tensor:
        """A tensor becomes what was written down in place of an operation that writes into it."""
        self._refuse_others_tensor(func, self._numbered(tensor))
        tensor.copy_(result)
        self._outdate(tensor)
        region = _Region.of(tensor)
        self._at[region] = self.number(result)
        self._stale.discard(region)
        return tensor

    def _outdate(self, tensor: Tensor) -> None:
        """Whatever shares elements with a tensor that was written to is no longer what was recorded."""
        written = _Region.of(tensor)
        touched = written.elements()
        for region in self._at:
            if region.storage == written.storage and not touched.isdisjoint(region.elements()):
                self._stale.add(region)

    @staticmethod
    def _functional(func: Any) -> Any:
        """The operation that returns what an in-place one writes."""
        name = func._schema.name.removeprefix("aten::")
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
        # The counterpart may be called something else: that of `pow_.Scalar` is `pow.Tensor_Scalar`.
        names = [] if packet is None else [func._overloadname, *packet.overloads()]
        for functional in [getattr(packet, name) for name in names if hasattr(packet, name)]:
            types, wanted = ([str(argument.type) for argument in f._schema.arguments] for f in (functional, func))
            if not functional._schema.is_mutable and types == wanted:
                return functional
        raise UnrecordableError(f"{func} has no functional counterpart")

    @staticmethod
    def _refuse_unrecordable(func: Any, args: tuple[Any, ...]) -> None:
        dynamic = torch.Tag.dynamic_output_shape in func.tags and not _by_index(func, args)
        if torch.Tag.data_dependent_output in func.tags or dynamic:
            raise UnrecordableError(f"what it does depends on the numbers in its tensors ({func})")


_ATEN = torch.ops.aten
_EMPTY = (_ATEN.empty.memory_format, _ATEN.empty_strided.default)
# By what number the operation fills a tensor; None if by its last argument.
_FILLED = {
    **dict.fromkeys((_ATEN.new_zeros.default, _ATEN.zeros_like.default, _ATEN.zeros.default), 0),
    **dict.fromkeys((_ATEN.new_ones.default, _ATEN.ones_like.default, _ATEN.ones.default), 1),
    **dict.fromkeys((_ATEN.new_full.default, _ATEN.full_like.default), None),
}

# Where another engine ran the operation before, its result may lie in memory in another way.
_ANY_LAYOUT = dict.fromkeys((_ATEN.view.default, _ATEN._unsafe_view.default), _ATEN.reshape.default)


def _by_index(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation picks entries by indices: only by a mask their number depends on what is in it."""
    masks = (torch.bool, torch.uint8)
    by_index = func in (_ATEN.index.Tensor, _ATEN._unsafe_index.Tensor)
    return by_index and not any(index is not None and index.dtype in masks for index in args[1])


def tangent_like(tensor: Tensor) -> Tensor:
    """A gradient for a recording; it uses up no random numbers of the user's."""
    return torch.linspace(0.5, 1.5, tensor.numel(), dtype=tensor.dtype, device=tensor.device).view(tensor.shape)
