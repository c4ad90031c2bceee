"""Step programs: what a cell computes in one step, as a straight list of ATen operations. Tensor-free.

A program's values are numbered. Whatever depends on how many rows the batch has is written as a `Size`, affine in the
number of rows B: one program serves every B.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Ref(NamedTuple):
    """A value, by its number, where it stands among an operation's arguments."""

    value: int


class Size(NamedTuple):
    """An integer that depends on the number of rows: `per_row * B + constant`."""

    per_row: int
    constant: int

    def at(self, rows: int) -> int:
        """The integer for so many rows."""
        return self.per_row * rows + self.constant

    def __str__(self) -> str:
        rows = "B" if self.per_row == 1 else f"{self.per_row}B"
        return rows if self.constant == 0 else f"{rows}{self.constant:+d}"


@dataclass(frozen=True)
class Value:
    """What is known of a value before it is computed."""

    shape: tuple[int | Size, ...]
    dtype: torch.dtype

    def sizes(self, rows: int) -> tuple[int, ...]:
        """The shape for so many rows."""
        return tuple(n.at(rows) if isinstance(n, Size) else n for n in self.shape)

    def bytes(self, rows: int) -> int:
        """The memory that it takes for so many rows."""
        count = self.dtype.itemsize
        for n in self.sizes(rows):
            count *= n
        return count

    @property
    def rows(self) -> int | None:
        """The dimension of the rows, None if it has none."""
        return next((d for d, n in enumerate(self.shape) if isinstance(n, Size) and n.per_row), None)

    @property
    def differentiable(self) -> bool:
        """Whether it can have a gradient."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Op:
    """One operation: a target, its arguments with `Ref`s for values and `Size`s for integers, the values it makes.

    Outputs that nobody reads are -1. The line is where a user's code does it, for messages alone.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outputs: tuple[int, ...]
    line: str = field(default="", compare=False, kw_only=True)

    @cached_property
    def name(self) -> str:
        """The operation as torch calls it: `aten.mm`."""
        if isinstance(self.target, Custom | Draw):
            return self.target.name
        return str(self.target).removesuffix(".default")

    @cached_property
    def base(self) -> str:
        """The name without namespace and overload: `mm`. That of an operation that is not torch's own stays whole."""
        return self.name.split(".")[1] if self.name.startswith("aten.") else self.name

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers."""
        return isinstance(self.target, Draw)

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """The values that it reads, in order."""
        return tuple(refs_of((self.args, self.kwargs)))

    def arguments(self, values: Mapping[int, Any] | Sequence[Any], rows: int) -> list[Any]:
        """Its arguments by position, from the tensors of its values, for so many rows."""
        return [
            values[value] if value >= 0 else resolved(arg, values, rows) if value == _NESTED else arg
            for value, arg in self._prepared
        ]

    @cached_property
    def _prepared(self) -> list[tuple[int, Any]]:
        """Each argument: by its value, or as it is passed, or as a nest in which there are values or sizes."""
        return [
            (arg.value, None) if isinstance(arg, Ref) else (_NESTED if depends(arg) else _CONSTANT, arg)
            for arg in self.args
        ]


@dataclass(frozen=True)
class Draw:
    """An operation that draws random numbers: operations are never left out, merged or put in another order if it is.

    Some fill a tensor, or make one like it. Which numbers stand where depends on how it lies in memory, so its sizes
    and strides are the first two arguments.

    Attributes:
        operation: torch's.
        filled: dtype and device of the tensor that it fills; None if it has none.
        generator: where its generator is found, for one that was passed by hand; or that generator.
    """

    operation: Callable[..., Any]
    filled: tuple[torch.dtype, torch.device] | None = None
    generator: Any = None

    @property
    def name(self) -> str:
        """The operation as torch calls it: `aten.bernoulli_.float`."""
        return str(self.operation).removesuffix(".default")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Draw."""
        if self.generator is not None:
            kwargs["generator"] = self.generator
        if self.filled is None:
            return self.operation(*args, **kwargs)
        dtype, device = self.filled
        sizes, strides, *rest = args
        return self.operation(torch.empty_strided(sizes, strides, dtype=dtype, device=device), *rest, **kwargs)


@dataclass(frozen=True)
class Custom:
    """A `torch.autograd.Function` as an operation: what it computes, and its own backward.

    Attributes:
        name: the Function's name.
        forward: `inputs -> outputs`, and the values that the backward reads.
        backward: `(saved values, gradients of the outputs) -> gradients of the inputs`; -1 for none.
        saved: which values of `forward` the backward reads.
    """

    name: str
    forward: Program
    backward: Program
    saved: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """A list of operations over numbered values, from some inputs to some outputs.

    Attributes:
        values: what is known of each.
        inputs: the values that it starts from.
        ops: the operations, in an order in which they can be run.
        outputs: the values that it returns; -1 where there is none.
    """

    values: tuple[Value, ...]
    inputs: tuple[int, ...]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]

    @cached_property
    def _hash(self) -> int:
        return hash((self.values, self.inputs, self.outputs, tuple(op.name for op in self.ops)))

    def __hash__(self) -> int:
        """Computed once: programs are looked up at every call."""
        return self._hash

    @cached_property
    def generators(self) -> tuple[Any, ...]:
        """What names the generators that its draws were given by hand."""
        targets = [op.target for op in self.ops if isinstance(op.target, Draw)]
        return tuple([draw.generator for draw in targets if draw.generator is not None])

    def pruned(self) -> Program:
        """Without the operations that no output depends on; draws stay, for those after them."""
        needed, kept = {v for v in self.outputs if v >= 0}, []
        for op in reversed(self.ops):
            if op.draws or needed.intersection(op.outputs):
                needed.update(op.inputs)
                kept.append(op)
        return Program(self.values, self.inputs, tuple(reversed(kept)), self.outputs)

    def producers(self) -> dict[int, int]:
        """For each value that an operation makes, which operation."""
        return {value: index for index, op in enumerate(self.ops) for value in op.outputs if value >= 0}

    def dependents(self, values: Iterable[int]) -> set[int]:
        """These values and all that depend on any of them."""
        found = set(values)
        for op in self.ops:
            if found.intersection(op.inputs):
                found.update(v for v in op.outputs if v >= 0)
        return found

    def with_gradient(self, values: Iterable[int]) -> set[int]:
        """These values and all that have a gradient by any of them: what is detached or counted has none."""
        found = set(values)
        for op in self.ops:
            if op.base != "detach" and found.intersection(op.inputs):
                found.update(v for v in op.outputs if v >= 0 and self.values[v].differentiable)
        return found

    def made_of(self, values: Iterable[int]) -> set[int]:
        """These values and all that depend on no others, nor on chance."""
        found = set(values)
        for op in self.ops:
            if not op.draws and found.issuperset(op.inputs):
                found.update(op.outputs)
        return found

    def read_by_others(self, ops: Collection[int]) -> set[int]:
        """The values that operations other than these read."""
        return {v for number, op in enumerate(self.ops) if number not in ops for v in op.inputs}


def live_in(ops: Collection[Op], outputs: Sequence[int] = ()) -> list[int]:
    """The values that must be there before some operations run: what they or the outputs read and none of them makes.

    Each stands once, in the order in which they are read.
    """
    made = {v for op in ops for v in op.outputs}
    read = dict.fromkeys([*(v for op in ops for v in op.inputs), *outputs])
    return [v for v in read if v >= 0 and v not in made]


_CONSTANT, _NESTED = -1, -2


def depends(tree: Any) -> bool:
    """Whether there are values or sizes in a nest of arguments."""
    return isinstance(tree, Ref | Size) or (isinstance(tree, tuple | list) and any(map(depends, tree)))


def refs_of(tree: Any) -> Iterator[int]:
    """All values that a nest of arguments mentions."""
    if isinstance(tree, Ref):
        yield tree.value
    elif isinstance(tree, Size):
        return
    elif isinstance(tree, tuple | list):
        for child in tree:
            yield from refs_of(child)


def resolved(tree: Any, values: Mapping[int, Tensor] | Sequence[Tensor], rows: int) -> Any:
    """A nest of arguments with tensors for `Ref`s and integers for `Size`s."""
    if isinstance(tree, Ref):
        return values[tree.value]
    if isinstance(tree, Size):
        return tree.at(rows)
    if isinstance(tree, tuple | list):
        return [resolved(child, values, rows) for child in tree]
    return tree
