"""Recording a cell: its step, at two batch sizes, becomes one program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.recording.functions import RawProgram, fold_functions
from unrolled.recording.merge import merge
from unrolled.recording.program import Program
from unrolled.recording.tape import NumbersStayUnread, Tape, UnrecordableError
from unrolled.trees import Structure, Tree, flatten, unflatten
from unrolled.unseen import silent

ROWS = (3, 5)
"""The two batch sizes of a recording; small, unequal, and not 1, which broadcasts."""


@dataclass(frozen=True)
class External:
    """A tensor that the step reads and was not handed: where in the cell it is found at every call."""

    module: str
    attribute: str

    def fetch(self, cell: nn.Module) -> Tensor:
        """The tensor as it is now."""
        tensor: Tensor = getattr(cell.get_submodule(self.module), self.attribute)
        return tensor

    @property
    def name(self) -> str:
        """Its path, as in `named_parameters`."""
        return f"{self.module}.{self.attribute}".lstrip(".")


@dataclass(frozen=True)
class Sample:
    """What one recording is given: some rows of real input, state and context, as leaves."""

    inputs: list[Tensor]
    state: list[Tensor]
    context: list[Tensor]


@dataclass(frozen=True)
class Recording:
    """A cell's step as a program.

    The program's inputs are the leaves of input, state and context and then the externals; its outputs the leaves of
    the output and of the next state.

    Attributes:
        program: the step.
        structures: of input, state, context, output.
        externals: the tensors that it reads out of the cell.
        counts: how many leaves input, state and context have.
    """

    program: Program
    structures: tuple[Structure, Structure, Structure | None, Structure]
    externals: tuple[External, ...]
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


def sample_rows(tensors: Sequence[Tensor], batch_size: int, rows: int) -> list[Tensor]:
    """Some rows of tensors `[B, ...]`, the same ones over and over if there are fewer; others are copied whole."""
    index = torch.arange(rows) % batch_size
    picked = []
    for tensor in tensors:
        by_row = tensor.dim() > 0 and tensor.shape[0] == batch_size
        rows_of = tensor.detach()[index.to(tensor.device)] if by_row else tensor.detach()
        picked.append(rows_of.clone().requires_grad_(tensor.is_floating_point()))
    return picked


def record_step(cell: nn.Module, samples: tuple[Sample, Sample], structures: Sequence[Structure | None]) -> Recording:
    """Record one step of a cell.

    Args:
        cell: the cell. It is run twice, and what it does to its own attributes stays done: see `guards`.
        samples: what to run it on, with `ROWS[0]` and `ROWS[1]` rows.
        structures: of input, state and context (None for no context).

    Raises:
        UnrecordableError: if the step cannot be written down as a list of operations.
    """
    runs = [_run(cell, sample, structures) for sample in samples]
    raw = [run[0] for run in runs]
    names = [run[1] for run in runs]
    if names[0] != names[1] or runs[0][2] != runs[1][2]:
        raise UnrecordableError("it reads or returns other tensors at another batch size")
    sample = samples[0]
    program = merge(raw[0], raw[1], ROWS)
    return Recording(
        program,
        (*structures, runs[0][2]),  # type: ignore[arg-type]
        tuple(names[0]),
        (len(sample.inputs), len(sample.state), len(sample.context)),
    )


def _run(
    cell: nn.Module, sample: Sample, structures: Sequence[Structure | None]
) -> tuple[RawProgram, list[External], Structure]:
    tape = Tape()
    given = [tape.add(tensor) for tensor in (*sample.inputs, *sample.state, *sample.context)]
    arguments = [
        unflatten(structure, leaves)
        for structure, leaves in zip(structures, (sample.inputs, sample.state, sample.context), strict=True)
        if structure is not None
    ]
    with silent(), torch.enable_grad(), NumbersStayUnread(), tape:
        output, state = cell(*arguments)
    leaves, output_structure = flatten(output)
    outputs = [tape.number(leaf) for leaf in (*leaves, *flatten(state)[0])]
    fold_functions(tape)
    if any(not event.differentiable for event in tape.events):
        raise UnrecordableError("it turns gradients off for a part of its step")
    externals = [_located(cell, tape, value) for value in tape.externals]
    return (
        RawProgram(tape.tensors, given + tape.externals, tape.events, outputs),
        externals,
        output_structure,
    )


def _located(cell: nn.Module, tape: Tape, value: int) -> External:
    tensor = tape.tensors[value]
    for module_name, module in cell.named_modules():
        for name, held in _held_tensors(module):
            if held is tensor:
                return External(module_name, name)
    shape = list(tensor.shape)
    if value in tape.fresh:
        raise UnrecordableError(f"it makes a tensor {shape} out of Python numbers in every step; keep it as a buffer")
    raise UnrecordableError(f"it reads a tensor {shape} that is no parameter, buffer or attribute of the cell")


def _held_tensors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module._parameters.items()
    yield from module._buffers.items()
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield name, value


def leaves_and_structure(tree: Tree) -> tuple[list[Tensor], Structure | None]:
    """`flatten`, with None for no tree at all."""
    return ([], None) if tree is None else flatten(tree)
