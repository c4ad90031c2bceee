"""Recording a cell: its step, at two batch sizes, becomes one program."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from unrolled.autograd_graph import differentiable
from unrolled.internals import has_memory, watching
from unrolled.recording.events import RawProgram, UnrecordableError
from unrolled.recording.functions import fold_functions
from unrolled.recording.generators import named
from unrolled.recording.indexing import FixedShapes
from unrolled.recording.merge import merge
from unrolled.recording.no_grad import detach_operands
from unrolled.recording.program import Draw, Program
from unrolled.recording.tape import GivenGenerators, NumbersStayUnread, Tape
from unrolled.trees import Structure, Tree, flatten, leaves, map_leaves
from unrolled.unseen import silent

ROWS = (3, 5)
"""The two batch sizes of a recording; small, unequal, and not 1, which broadcasts."""


@dataclass(frozen=True)
class External:
    """A tensor that the step reads and is not an argument of it: where in the cell it is found at every call.

    Attributes:
        module: the path of the module that holds it.
        attribute: under which name.
        part: of a complex one 'real' or 'imag' for that part alone.
    """

    module: str
    attribute: str
    part: str = ""

    def fetch(self, cell: nn.Module) -> Tensor:
        """The tensor as it is now."""
        tensor: Tensor = getattr(cell.get_submodule(self.module), self.attribute)
        return getattr(tensor, self.part).resolve_neg() if self.part else tensor

    @property
    def name(self) -> str:
        """Its path, as in `named_parameters`."""
        return ".".join(filter(None, (self.module, self.attribute, self.part)))

    @property
    def parts(self) -> list[External]:
        """The two parts of a complex one."""
        return [replace(self, part="real"), replace(self, part="imag")]


@dataclass(frozen=True)
class Constant:
    """A tensor that the step makes out of Python numbers, the same ones in every step.

    Attributes:
        numbers: its bytes.
        shape: its shape.
        dtype: of its entries.
        device: where it is.
    """

    numbers: bytes
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    name: ClassVar[str] = "a constant"
    attribute: ClassVar[str] = ""

    @classmethod
    def of(cls, tensor: Tensor) -> Constant:
        """A tensor's numbers."""
        numbers = bytes(tensor.detach().cpu().contiguous().view(torch.uint8).flatten().tolist())
        return cls(numbers, tuple(tensor.shape), tensor.dtype, tensor.device)

    def fetch(self, cell: nn.Module) -> Tensor:
        """The tensor."""
        return _made(self)

    @property
    def parts(self) -> list[Constant]:
        """The two parts of a complex one."""
        tensor = _made(self)
        return [Constant.of(tensor.real), Constant.of(tensor.imag)]


@lru_cache(maxsize=256)
def _made(constant: Constant) -> Tensor:
    if not constant.numbers:
        return torch.zeros(constant.shape, dtype=constant.dtype, device=constant.device)
    flat = torch.frombuffer(bytearray(constant.numbers), dtype=constant.dtype)
    return flat.view(constant.shape).to(constant.device)


@dataclass(frozen=True)
class Recording:
    """A cell's step as a program.

    The program's inputs are the leaves of input, state and context and then the externals; its outputs the leaves of
    the output and of the next state.

    Attributes:
        program: the step.
        structures: of input, state, context (one without leaves where there is none) and output.
        externals: the tensors that it reads out of the cell.
        counts: how many leaves input, state and context have.
    """

    program: Program
    structures: tuple[Structure, Structure, Structure, Structure]
    externals: tuple[External | Constant, ...]
    counts: tuple[int, int, int]

    @property
    def inputs(self) -> tuple[int, ...]:
        """The values of the input's leaves."""
        return self.program.inputs[: self.counts[0]]

    @property
    def state(self) -> tuple[int, ...]:
        """The values of the state's leaves."""
        return self.program.inputs[self.counts[0] : self.counts[0] + self.counts[1]]

    @property
    def fixed(self) -> tuple[int, ...]:
        """The values that are the same at every step: the context's leaves and the externals."""
        return self.program.inputs[self.counts[0] + self.counts[1] :]

    @property
    def outputs(self) -> tuple[int, ...]:
        """The values of the output's leaves."""
        return self.program.outputs[: len(self.program.outputs) - self.counts[1]]

    @property
    def next_state(self) -> tuple[int, ...]:
        """The values of the next state's leaves."""
        return self.program.outputs[len(self.program.outputs) - self.counts[1] :]


def samples_of(trees: tuple[Tree, Tree, Tree], batch_size: int) -> list[tuple[Tree, Tree, Tree]]:
    """Input, state and context to record a step on, with `ROWS[0]` and `ROWS[1]` rows of the given ones.

    Args:
        trees: input, state and context (None for none); of leaves `[B, ...]` some rows are taken, the same ones over
            and over if there are fewer, and other leaves are taken whole.
        batch_size: B.
    """

    def sampled(tensor: Tensor, rows: int) -> Tensor:
        picked = tensor.detach()
        if tensor.dim() > 0 and len(tensor) == batch_size:
            picked = picked[(torch.arange(rows) % batch_size).to(tensor.device)]
        return picked.clone().requires_grad_(differentiable(tensor))

    return [map_leaves(lambda x, rows=rows: sampled(x, rows), trees) for rows in ROWS]


def arguments_of(input: Tree, state: Tree, context: Tree) -> tuple[Tree, ...]:
    """What a cell's step is called with."""
    return (input, state) if context is None else (input, state, context)


def record_step(cell: nn.Module, samples: Sequence[tuple[Tree, Tree, Tree]]) -> Recording:
    """Record one step of a cell.

    Args:
        cell: the cell. It is run twice, and what it does to its own attributes stays done: see `guards`.
        samples: what to run it on, from `samples_of`.

    Raises:
        UnrecordableError: if the step cannot be written down as a list of operations.
    """
    (first, externals, output), (second, *others) = [_recorded(cell, sample) for sample in samples]
    if others != [externals, output]:
        raise UnrecordableError("it reads or returns other tensors at another batch size")
    input, state, context = flatten(samples[0])[1].children
    a, b, c = (len(leaves(tree)) for tree in samples[0])
    return Recording(merge(first, second, ROWS), (input, state, context, output), externals, (a, b, c))


def _recorded(
    cell: nn.Module, sample: tuple[Tree, Tree, Tree]
) -> tuple[RawProgram, tuple[External | Constant, ...], Structure]:
    tape = Tape()
    inputs = [tape.add(tensor) for tensor in leaves(sample)]
    with silent(), torch.enable_grad(), NumbersStayUnread(), FixedShapes(), GivenGenerators(tape), tape:
        output, state = cell(*arguments_of(*sample))
    tensors, structure = flatten(output)
    outputs = [tape.number(leaf) for leaf in (*tensors, *leaves(state))]
    tape.events[:] = [
        replace(event, target=named(event.target, cell)) if isinstance(event.target, Draw) else event
        for event in tape.events
    ]
    fold_functions(tape)
    detach_operands(tape)
    externals = tuple([_located(cell, tape, value) for value in tape.externals])
    return RawProgram(tape.tensors, inputs + tape.externals, tape.events, outputs), externals, structure


def _located(cell: nn.Module, tape: Tape, value: int) -> External | Constant:
    tensor = tape.tensors[value]
    for module_name, module in cell.named_modules():
        for name, held in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
            if held is tensor:
                return External(module_name, name)
    if value in tape.constants:
        return Constant.of(tensor)
    shape = list(tensor.shape)
    raise UnrecordableError(f"it reads a tensor {shape} that is no parameter, buffer or attribute of the cell")


def why_not_recorded(tensors: Iterable[Tensor]) -> str | None:
    """Why a call on these tensors is left to the reference before anything is recorded; None if it need not be.

    Args:
        tensors: all of inputs, state, context, parameters and buffers.
    """
    looking_on = watching()
    if looking_on is not None:
        return looking_on
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"a tensor is a {type(tensor).__name__}, which may compute in its own way"
        if torch.is_autocast_enabled(tensor.device.type):
            return "under autocast torch chooses the dtype of each operation as it runs"
        if not has_memory(tensor):
            return "inside of a transform of torch.func"
        if forward_ad.unpack_dual(tensor).tangent is not None:
            return "forward-mode derivatives"
    return None
