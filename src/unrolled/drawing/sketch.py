"""What is to be drawn: an unrolled network without its tensors. Renderers know nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorLabel:
    """One tensor of a copy's input, state, output or context.

    Attributes:
        name: what the picture calls it: `x`, `h`, `s['gate'][1]`.
        path: the way to it in its pytree, '' for a bare tensor.
        shape: its shape for one step, `[B, ...]`.
        dtype: its dtype, without `torch.`.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Parameter:
    """One parameter of the cell.

    Attributes:
        name: its name as the user knows it.
        shape: its shape.
        shared: whether the copies use it; a parameter of the initial state alone is no copy's.
        trained: whether it is trained and not frozen.
    """

    name: str
    shape: tuple[int, ...]
    shared: bool = True
    trained: bool = True

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def remark(self) -> str:
        """What sets it apart from a trained weight of the copies; '' for one of those."""
        remarks = [] if self.shared else ["initial state only"]
        return ", ".join(remarks if self.trained else [*remarks, "frozen"])


@dataclass(frozen=True)
class Sketch:
    """An unrolled network as it is drawn: comparable, printable, tensor-free.

    Attributes:
        cell: the cell's name.
        T: how many copies there are.
        B: the batch size.
        input: the tensors that a copy reads.
        state: the tensors that a copy receives from the one before it.
        output: the tensors that a copy outputs.
        parameters: what the copies share.
        origin: where the initial state comes from, 'own', 'learned' or 'passed'.
        context: the tensors that are the same at every step.
        place: which layer and direction of a larger network this is, '' for one that stands alone.
        reverse: whether the last copy comes first.
    """

    cell: str
    T: int
    B: int
    input: tuple[TensorLabel, ...]
    state: tuple[TensorLabel, ...]
    output: tuple[TensorLabel, ...]
    parameters: tuple[Parameter, ...] = ()
    origin: str = "own"
    context: tuple[TensorLabel, ...] = ()
    place: str = ""
    reverse: bool = False

    @property
    def title(self) -> str:
        """The cell's name, and where it is in a larger network."""
        return f"{self.cell}, {self.place}" if self.place else self.cell

    def time(self, n: int) -> int:
        """The time step of the copy that runs as number n."""
        return self.T - 1 - n if self.reverse else n

    def state_time(self, n: int) -> int:
        """The index of the state that copy number n receives; n = T is for the state after the last copy."""
        return self.T - n if self.reverse else n

    @property
    def tensors(self) -> dict[str, tuple[TensorLabel, ...]]:
        """What a copy reads and outputs, by kind; kinds without a tensor are left out."""
        kinds = {"input": self.input, "state": self.state, "output": self.output, "context": self.context}
        return {kind: labels for kind, labels in kinds.items() if labels}

    @property
    def initial_state(self) -> str:
        """Where the initial state comes from, in words."""
        words = {"own": "the cell's own", "learned": "learned with the weights", "passed": "passed by the caller"}
        return words[self.origin]

    @property
    def count(self) -> int:
        """How many numbers all parameters hold."""
        return sum(parameter.count for parameter in self.parameters)

    @property
    def dimensions(self) -> str:
        """The number of steps and the batch size, in words."""
        way = ", from the last to the first" if self.reverse else ""
        return f"unrolled over T = {self.T} time step{'s' if self.T > 1 else ''}{way}, batch B = {self.B}"

    @property
    def sharing(self) -> str:
        """How many parameters the copies share, in words."""
        count = sum(parameter.count for parameter in self.parameters if parameter.shared)
        if not count:
            return "no weights: the copies share their rule alone" if self.T > 1 else "no weights"
        copies = "both copies" if self.T == 2 else f"all {self.T:,} copies"
        shared = f", shared by {copies}" if self.T > 1 else ""
        return f"one set of weights{shared}: {count:,} parameter{'s' if count > 1 else ''}"

    @property
    def state_symbols(self) -> tuple[str, ...]:
        """What stands on the arrows between copies: one or two short names, `s` for anything longer, or nothing."""
        names = tuple(leaf.name for leaf in self.state)
        return names if len(names) <= 2 and all(len(name) <= 3 and name.isalpha() for name in names) else ("s",)

    def shown_copies(self, most: int) -> list[int | None]:
        """The numbers of the copies that are drawn: all, or the first and last ones, with None for those left out.

        Args:
            most: how many copies are drawn at the most.
        """
        if most + 1 >= self.T:  # the mark of an omission takes a copy's room: it never stands for one copy
            return list(range(self.T))
        last = most // 2
        return [*range(most - last), None, *range(self.T - last, self.T)]
