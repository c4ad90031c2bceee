"""Recording: running a step on real tensors while a tape notes every ATen operation below autograd.

The tape tells values apart by where they lie in memory, and keeps them alive so that no place is used twice. In-place
operations are written down as their functional counterparts. What ran inside an `autograd.Function` is seen because
autograd was off meanwhile and its result has a Python node for its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from unrolled.internals import DispatchMode
from unrolled.recording.program import Ref, refs_of

Place = tuple[Any, ...]


class UnrecordableError(Exception):
    """A step that cannot be recorded; the message says why, and ends up in the plan."""


class IrreversibleError(UnrecordableError):
    """A step that does something which cannot be put back: it is not even tried."""


@dataclass(eq=False)
class Event:
    """One operation as it ran, its tensors replaced by the numbers of values."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    differentiable: bool

    @property
    def inputs(self) -> list[int]:
        """The values that it read."""
        return list(refs_of((self.args, tuple(self.kwargs.values()))))


class NumbersStayUnread(TorchFunctionMode):
    """Refuses what hands a tensor's numbers to Python, where the tape cannot see what becomes of them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _READERS:
            raise UnrecordableError(f"what it does may depend on the numbers in its tensors ({func.__name__})")
        return func(*args, **(kwargs or {}))


_READERS = frozenset(["tolist", "numpy", "item", "__array__", "__repr__", "__format__", "__bool__", "data_ptr"])


class Tape(DispatchMode):
    """Notes every operation that runs while it is active.

    Args:
        decomposition: for an operation what computes the same by simpler ones, to be written down in its place. Only
            under autograd that has seen the operation itself: its derivative is not everywhere that of the formula.

    Attributes:
        events: the operations, in order.
        tensors: for each value the tensor that it was, seen last.
        externals: values that came from nowhere: parameters, buffers, attributes, constants.
        nodes: values that an `autograd.Function` made, each with that Function's node.
        fresh: externals that the step made itself out of Python numbers.
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
        self._at: dict[Place, int] = {}
        self._detached_at: dict[Place, int] = {}
        self._stale: set[Place] = set()
        self._tracked: set[int] = set()

    def add(self, tensor: Tensor) -> int:
        """Give a tensor a number of its own: an input."""
        value = self._new(tensor)
        self._at[_place(tensor)] = value
        return value

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor that was seen; one that never was is an external."""
        place = _place(tensor)
        if place in self._stale:
            raise UnrecordableError("it changes a tensor in place and then reads it through another view")
        value = self._at.get(place)
        if value is None:
            value = self.add(tensor)
            self.externals.append(value)
            return value
        if tensor.requires_grad:
            self._note_node(value, tensor)
        elif not self.in_backward and value in self._tracked and place in self._detached_at:
            return self._detached_at[place]
        return value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        _refuse_unrecordable(func)
        simpler = self.decomposition(func)
        if simpler is not None:
            with self:
                return simpler(*args, **kwargs)
        recorded, named = self._numbered(args), {name: self._numbered(arg) for name, arg in kwargs.items()}
        if func._schema.is_mutable:
            self._refuse_foreign_write(func, recorded)
        result = func(*args, **kwargs)
        if func in _FILLED:
            # Only the shape of what it was given counts: nothing is read, and nothing need be kept.
            recorded, named = _as_full(func, args, result)
            func = torch.ops.aten.full.default
        func = _ANY_LAYOUT.get(func, func)
        if func is torch.ops.aten.lift_fresh.default:
            self.fresh.update(refs_of(recorded))
        if func._schema.is_mutable:
            self._write_in_place(func, recorded, named, args)
        else:
            self._write(func, recorded, named, result)
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
            place = _place(tensor)
            if func is torch.ops.aten.detach.default:
                value = self._new(tensor)
                self._detached_at[place] = value
            else:
                value = self._new(tensor)
                self._at[place] = value
                self._stale.discard(place)
            outputs.append(value)
        self.events.append(Event(func, args, kwargs, tuple(outputs), torch.is_grad_enabled()))

    def _refuse_foreign_write(self, func: Any, args: Any) -> None:
        """Before it is run: what the step did not make is not the recording's to change."""
        target = args[0] if args else None
        if not isinstance(target, Ref) or any(argument.is_out for argument in func._schema.arguments):
            raise UnrecordableError(f"{func} writes into a tensor in a way that has no functional counterpart")
        if not any(target.value in event.outputs for event in self.events):
            raise UnrecordableError(f"{func} writes in place into a tensor that the step did not make")
        _functional(func)

    def _write_in_place(self, func: Any, args: Any, kwargs: dict[str, Any], given: tuple[Any, ...]) -> None:
        tensor = given[0]
        value = self._new(tensor)
        self.events.append(Event(_functional(func), args, kwargs, (value,), torch.is_grad_enabled()))
        place = _place(tensor)
        self._outdate(tensor)
        self._at[place] = value
        self._stale.discard(place)

    def _outdate(self, tensor: Tensor) -> None:
        """Whatever shares elements with a tensor that was written to is no longer what was recorded."""
        storage, touched = tensor.untyped_storage().data_ptr(), _elements(_place(tensor))
        for place in [place for place in self._at if place[0] == storage]:
            if not touched.isdisjoint(_elements(place)):
                self._stale.add(place)


_ATEN = torch.ops.aten
_FILLED = {
    **dict.fromkeys((_ATEN.new_zeros.default, _ATEN.zeros_like.default, _ATEN.zeros.default), 0),
    **dict.fromkeys((_ATEN.new_ones.default, _ATEN.ones_like.default, _ATEN.ones.default), 1),
    **dict.fromkeys((_ATEN.new_full.default, _ATEN.full_like.default), None),
}

# Where another engine ran the operation before, its result may lie in memory in another way.
_ANY_LAYOUT = dict.fromkeys((_ATEN.view.default, _ATEN._unsafe_view.default), _ATEN.reshape.default)


def _as_full(func: Any, args: tuple[Any, ...], made: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `aten.full` that make the same tensor."""
    number = _FILLED[func] if _FILLED[func] is not None else args[-1]
    return (tuple(made.shape), number), {"dtype": made.dtype, "device": made.device}


def _place(tensor: Tensor) -> Place:
    return (
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


def _elements(place: Place) -> set[int]:
    _, offset, shape, strides, _ = place
    found = torch.tensor([offset])
    for size, stride in zip(shape, strides, strict=True):
        found = (found.unsqueeze(1) + torch.arange(size) * stride).flatten()
    return set(found.tolist())


def _refuse_unrecordable(func: Any) -> None:
    tags = func.tags
    if torch.Tag.nondeterministic_seeded in tags:
        raise UnrecordableError(
            f"it draws random numbers ({func}); dropout over time is a wrapper: DropoutCell, ZoneoutCell"
        )
    if torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags:
        raise UnrecordableError(f"what it does depends on the numbers in its tensors ({func})")


def _functional(func: Any) -> Any:
    name = func._schema.name.removeprefix("aten::")
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    # The counterpart may be called something else: that of `pow_.Scalar` is `pow.Tensor_Scalar`.
    names = [] if packet is None else [func._overloadname, *packet.overloads()]
    for functional in [getattr(packet, name) for name in names if hasattr(packet, name)]:
        if not functional._schema.is_mutable and _kinds(functional) == _kinds(func):
            return functional
    raise UnrecordableError(f"{func} has no functional counterpart")


def _kinds(func: Any) -> list[str]:
    return [str(argument.type) for argument in func._schema.arguments]


def tangent_like(tensor: Tensor) -> Tensor:
    """A gradient for a recording; it uses up no random numbers of the user's."""
    return torch.linspace(0.5, 1.5, tensor.numel(), dtype=tensor.dtype, device=tensor.device).view(tensor.shape)


def values_behind(node: Any, tensors: Sequence[Tensor]) -> list[int | None]:
    """For each input of an autograd node the number of the tensor that it came from; None where there is none."""
    found: list[int | None] = []
    for function, output in node.next_functions:
        matches = [number for number, tensor in enumerate(tensors) if _made_by(tensor, function, output)]
        found.append(matches[-1] if matches else None)
    return found


def _made_by(tensor: Tensor, function: Any, output: int) -> bool:
    if function is None or not tensor.requires_grad:
        return False
    if tensor.grad_fn is None:
        return getattr(function, "variable", None) is tensor
    return tensor.grad_fn is function and tensor.output_nr == output
