"""Recording a cell: its step, at two batch sizes, becomes one program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from unrolled.autograd_graph import new_leaf
from unrolled.cells.base import shown_path
from unrolled.internals import autocasting, dual_numbers, has_memory, watching
from unrolled.recording.checks import Asked, at_outputs, on_entries
from unrolled.recording.events import RawProgram, UnrecordableError, depends_on_numbers, needed
from unrolled.recording.externals import Constant, Found, OutsideTensor, held_tensors
from unrolled.recording.functions import fold_functions
from unrolled.recording.fused_layers import UnfusedLayers
from unrolled.recording.generators import named
from unrolled.recording.indexing import FixedShapes
from unrolled.recording.lines import line_of_step, named_in_refusals
from unrolled.recording.merge import merge
from unrolled.recording.no_grad import detach_operands
from unrolled.recording.program import Draw, Program, live_in
from unrolled.recording.rows_first import rows_first
from unrolled.recording.tape import GivenGenerators, Tape
from unrolled.recording.unread import NumbersStayUnread
from unrolled.trees import Structure, Tree, flatten, leaves, map_leaves
from unrolled.unseen import silent

ROWS = (3, 5)
"""The two batch sizes of a recording; small, unequal, and not 1, which broadcasts."""


class LeftBehindError(UnrecordableError):
    """A step that reads what the step before it left in an attribute, by its path: that is state."""

    def __init__(self, path: str) -> None:
        super().__init__(
            f"its step reads {path}, which the step before it left; attributes that keep a state are named: "
            f"as_cell(module, state_attributes=({path!r},))"
        )


@dataclass(frozen=True)
class Recording:
    """A cell's step as a program.

    The program's inputs are the leaves of input, state and context and then the externals; its outputs the leaves of
    the output and of the next state, and then what it asks.

    Attributes:
        program: the step.
        structures: of input, state, context (one without leaves where there is none) and output.
        externals: the tensors that it reads out of the cell.
        counts: how many leaves input, state and context have.
        asked: what it asks of its numbers; it stands for steps that get the same answers.
    """

    program: Program
    structures: tuple[Structure, Structure, Structure, Structure]
    externals: tuple[Found, ...]
    counts: tuple[int, int, int]
    asked: tuple[Asked, ...] = ()

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
        return self.program.outputs[: len(self.program.outputs) - self.counts[1] - len(self.asked)]

    @property
    def next_state(self) -> tuple[int, ...]:
        """The values of the next state's leaves."""
        end = len(self.program.outputs) - len(self.asked)
        return self.program.outputs[end - self.counts[1] : end]


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
        return new_leaf(picked)

    return [map_leaves(lambda x, rows=rows: sampled(x, rows), trees) for rows in ROWS]


def arguments_of(input: Tree, state: Tree, context: Tree) -> tuple[Tree, ...]:
    """What a cell's step is called with."""
    return (input, state) if context is None else (input, state, context)


def record_step(
    cells: Sequence[nn.Module], samples: Sequence[tuple[Tree, Tree, Tree]], outside: Iterable[OutsideTensor] = ()
) -> Recording:
    """Record one step of a cell.

    Args:
        cells: for each sample a copy of the cell, or the same one. What the step does to its attributes stays done.
        samples: what to run it on, from `samples_of`.
        outside: tensors outside of the cell that it may read.

    Raises:
        UnrecordableError: if the step cannot be written down as a list of operations.
    """
    found = [_recorded(cell, sample, outside) for cell, sample in zip(cells, samples, strict=True)]
    (first, externals, output, asked), (second, *others, again) = found
    if others != [externals, output]:
        raise UnrecordableError("it reads or returns other tensors at another batch size")
    for each, other in zip(asked, again, strict=False):
        if (each.answer, each.line) != (other.answer, other.line):
            raise depends_on_numbers(f"{each}, and not of other rows")
    input, state, context = flatten(samples[0])[1].children
    a, b, c = (len(leaves(tree)) for tree in samples[0])
    program = merge(first, second, ROWS)
    program, entries = on_entries(program, at_outputs(program, asked))
    program = rows_first(program)
    return Recording(program, (input, state, context, output), externals, (a, b, c), at_outputs(program, entries))


@contextmanager
def _written_on(tape: Tape) -> Iterator[None]:
    """A context in which what a step calls of torch is noted, in the form that a program has it."""
    unread = NumbersStayUnread()
    with unread, FixedShapes(), UnfusedLayers(), GivenGenerators(tape), tape:
        yield
    unread.refuse_kept_items()


def _recorded(
    cell: nn.Module, sample: tuple[Tree, Tree, Tree], outside: Iterable[OutsideTensor]
) -> tuple[RawProgram, tuple[Found, ...], Structure, list[Asked]]:
    tape, held = Tape(line=line_of_step), held_tensors(cell)
    inputs = [tape.add(tensor) for tensor in leaves(sample)]
    with named_in_refusals(), silent(), torch.enable_grad(), _written_on(tape):
        output, state = cell(*arguments_of(*sample))
    tensors, structure = flatten(output)
    outputs = [tape.number(leaf) for leaf in (*tensors, *leaves(state))]
    tape.events[:] = [
        replace(event, target=named(event.target, cell)) if isinstance(event.target, Draw) else event
        for event in tape.events
    ]
    fold_functions(tape)
    detach_operands(tape)
    known: dict[int, Found] = {
        **{id(x): external for external, x in held.items()},
        **{tensor.key: tensor for tensor in outside},
    }
    externals = tuple([_located(cell, known, tape, value) for value in tape.externals])
    outputs += [each.value for each in tape.asked]
    if not {*inputs, *tape.externals}.issuperset(live_in(needed(tape.events, outputs), outputs)):
        raise UnrecordableError("it asks for numbers inside of an autograd.Function; ask outside of it")
    program = RawProgram(tape.tensors, inputs + tape.externals, tape.events, outputs)
    return program, externals, structure, tape.asked


def _located(cell: nn.Module, known: Mapping[int, Found], tape: Tape, value: int) -> Found:
    tensor = tape.tensors[value]
    external = known.get(id(tensor))
    if external is None and value in tape.constants:
        return Constant.of(tensor)
    if external is None:
        raise UnrecordableError(
            f"it reads a tensor {list(tensor.shape)} that is found neither in the cell nor in what its code names; "
            "make it a buffer"
        )
    path = shown_path(cell, external.name)
    if type(tensor) not in (Tensor, nn.Parameter):
        raise UnrecordableError(f"{path} is a {type(tensor).__name__}, which may compute in its own way")
    if not _is_still_there(external, cell, tensor):
        raise LeftBehindError(path)
    return external


def _is_still_there(external: Found, cell: nn.Module, tensor: Tensor) -> bool:
    try:
        return external.fetch(cell) is tensor
    except (AttributeError, LookupError, TypeError):
        return False


def why_not_recorded(tensors: Iterable[Tensor]) -> str | None:
    """Why a call on these tensors is left to the reference before anything is recorded; None if it need not be.

    Args:
        tensors: all of inputs, state, context, parameters and buffers.
    """
    looking_on = watching()
    if looking_on is not None:
        return looking_on
    casting, dual = autocasting(), dual_numbers()
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return f"a tensor is a {type(tensor).__name__}, which may compute in its own way"
        if casting and torch.is_autocast_enabled(tensor.device.type):
            return "under autocast torch chooses the dtype of each operation as it runs"
        if not has_memory(tensor):
            return "inside of a transform of torch.func"
        if dual and forward_ad.unpack_dual(tensor).tangent is not None:
            return "forward-mode derivatives"
    return None
