"""The cell contract: two methods and nothing else; and what a cell may tell about itself besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unrolled.errors import OptionError
from unrolled.trees import Tree


@runtime_checkable
class Cell(Protocol):
    """A recurrent network's program for one time step.

    Any module with these two methods is a cell; nothing need be inherited. Input, output and state are pytrees of
    `[B, ...]`. A cell that attends to something that is the same at every step takes it as a third argument,
    `context`. What a cell may tell about itself besides is `DescribedCell`.
    """

    def __call__(self, input: Tree, state: Tree, /) -> tuple[Tree, Tree]:
        """Run one step: `(input, state) -> (output, next state)`."""
        ...

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tree:
        """The state that copy 0 receives when the caller passes none."""
        ...


@dataclass(frozen=True)
class GateLayout:
    """What the gates of a cell are called, where they are in its parameters, and what they do to the state.

    Every parameter that is named here has one block of rows for each gate, all blocks of one size. A parameter that a
    cell has only sometimes may be None.

    Attributes:
        blocks: the gates, in the order of their blocks.
        computed: the activations (sigmoid, tanh, relu) of a step, in the order in which it computes them; a gate's has
            the gate's name.
        keeps: the gate by which the state is kept; None for a cell that has none.
        keeps_at: at which end that gate keeps the state: 'high' (1) or 'low' (0).
        takes: the gate that takes something new at its high end, where it is not the same one.
        biases: the biases of all gates, parameters by name.
        recurrent: the weights that the state is multiplied by, likewise.

    Example:
        >>> import unrolled as ur
        >>> ur.LSTMCell.gate_layout.keeps, ur.MinGRUCell.gate_layout.keeps_at
        ('forget', 'low')
    """

    blocks: tuple[str, ...]
    computed: tuple[str, ...]
    keeps: str | None = None
    keeps_at: str = "high"
    takes: str | None = None
    biases: tuple[str, ...] = ("bias_ih", "bias_hh")
    recurrent: tuple[str, ...] = ("weight_hh",)

    def renamed(self, pattern: str) -> GateLayout:
        """The same with other names of parameters.

        Example:
            >>> GateLayout(("update",), ("update",)).renamed("cell.{}_l0").biases
            ('cell.bias_ih_l0', 'cell.bias_hh_l0')
        """
        biases, recurrent = (tuple(map(pattern.format, names)) for names in (self.biases, self.recurrent))
        return replace(self, biases=biases, recurrent=recurrent)

    def idle_end(self, gate: str) -> str | None:
        """The end at which a gate leaves the state as it is, 'low' or 'high'; None for other gates."""
        if gate == self.keeps:
            return self.keeps_at
        return "low" if gate == self.takes else None


@runtime_checkable
class DescribedCell(Cell, Protocol):
    """A cell that tells about itself; optional. A cell of your own with these attributes is treated as ours are.

    `stack` checks that layers fit, plans, pictures and figures use the names of the state, `diagnose` names the gates
    and measures how long they remember, `remedy` sets their weights. `state_names` and `gate_layout` are also read of a
    cell that has only these.

    Attributes:
        input_size: I, features of the input.
        output_size: features of the output.
        state_names: one for each tensor of the state; empty where the state's structure names them itself.
        gate_layout: its gates; None for a cell without.

    Example:
        A leaky unit that learns how much it keeps: the whole cell, and what can be asked of it.

        >>> import torch.nn.functional as F, unrolled as ur
        >>> class LeakyCell(nn.Module):
        ...     state_names = ("h",)
        ...     gate_layout = GateLayout(
        ...         blocks=("keep", "candidate"), computed=("keep", "candidate"), keeps="keep", biases=("bias",)
        ...     )
        ...
        ...     def __init__(self, input_size, hidden_size):
        ...         super().__init__()
        ...         self.input_size, self.output_size = input_size, hidden_size
        ...         self.weight_ih = nn.Parameter(torch.randn(2 * hidden_size, input_size) / input_size)
        ...         self.weight_hh = nn.Parameter(torch.randn(2 * hidden_size, hidden_size) / hidden_size)
        ...         self.bias = nn.Parameter(torch.zeros(2 * hidden_size))
        ...
        ...     def initial_state(self, batch_size, device=None, dtype=None):
        ...         return torch.zeros(batch_size, self.output_size, device=device, dtype=dtype)
        ...
        ...     def forward(self, input, state):
        ...         k, c = (F.linear(input, self.weight_ih, self.bias) + F.linear(state, self.weight_hh)).chunk(2, -1)
        ...         keep, candidate = torch.sigmoid(k), torch.tanh(c)
        ...         state = keep * state + (1 - keep) * candidate
        ...         return state, state
        >>> cell = LeakyCell(3, 4)
        >>> ur.remedy.forget_bias(cell, 2.0)
        >>> cell.bias[:5]
        tensor([2., 2., 2., 2., 0.], grad_fn=<SliceBackward0>)
        >>> figures = ur.diagnose(ur.unroll(cell), torch.randn(9, 2, 3), lambda outputs, state: outputs.sum())
        >>> [gate.name for gate in figures.layers[0].units.gates], figures.layers[0].units.memory[0].gate
        (['keep', 'candidate'], 'keep')
    """

    input_size: int
    output_size: int
    state_names: Sequence[str]
    gate_layout: GateLayout | None


class StandInCell(nn.Module):
    """A cell that stands in for another module, and is shown under that one's names.

    Attributes:
        display_name: what a person calls what it stands in for.
        names_start_with: how the paths of its parameters begin; what follows is the name that a person knows.
    """

    display_name: str
    names_start_with: str

    def reads_parameter(self, name: str) -> bool:
        """Whether a parameter is this cell's, and not that of another one that stands in for the same module."""
        return True


def shown_path(cell: nn.Module, path: str) -> str:
    """The path of something inside of a cell, as a person knows it who knows what the cell stands in for."""
    return path.removeprefix(cell.names_start_with) if isinstance(cell, StandInCell) else path


class Gates:
    """The gates of one cell.

    Attributes:
        layout: what they are called and do.
    """

    def __init__(self, cell: nn.Module, layout: GateLayout) -> None:
        self._cell, self.layout = cell, layout

    @property
    def biases(self) -> list[str]:
        """The biases that exist, by name."""
        return [name for name in self.layout.biases if self._tensor(name) is not None]

    @property
    def recurrent(self) -> list[str]:
        """The recurrent weights that exist and whose blocks are square, by name."""
        found, many = [(name, self._tensor(name)) for name in self.layout.recurrent], len(self.layout.blocks)
        return [name for name, weight in found if weight is not None and weight.shape[0] == many * weight.shape[1]]

    def blocks(self, name: str) -> dict[str, Tensor]:
        """Each gate's block of a parameter."""
        gates = self.layout.blocks
        return dict(zip(gates, self._tensor(name).chunk(len(gates)), strict=True))

    def recurrent_blocks(self) -> list[tuple[str, Tensor]]:
        """The square matrices by which the state meets itself, one for each gate, by name: 'weight_hh (forget)'."""
        found = list[tuple[str, Tensor]]()
        for name in self.recurrent:
            short, blocks = name.rpartition(".")[2], self.blocks(name)
            found += [(f"{short} ({gate})" if len(blocks) > 1 else short, block) for gate, block in blocks.items()]
        return found

    def is_parametrized(self, name: str) -> bool:
        """Whether a parametrization makes the parameter of others (weight norm, spectral norm)."""
        return parametrize.is_parametrized(*self._place(name))

    def can_set(self, name: str) -> bool:
        """Whether the parameter can be set: a hook may compute it anew in every call, as that of pruning does."""
        owner, tensor = self._place(name)[0], self._tensor(name)
        kept = isinstance(tensor, nn.Parameter) or any(tensor is buffer for buffer in owner.buffers(recurse=False))
        return kept or self.is_parametrized(name)

    @torch.no_grad()
    def set_blocks(self, name: str, blocks: Mapping[str, Tensor]) -> None:
        """Set some gates' blocks of a parameter, in place or by its parametrization.

        Raises:
            OptionError: if the parametrization takes no such values, or makes others of them.
        """
        (owner, attribute), tensor = self._place(name), self._tensor(name)
        if not self.is_parametrized(name):
            for gate, block in blocks.items():
                self.blocks(name)[gate].copy_(block)
            return
        wanted = torch.cat([blocks.get(gate, block) for gate, block in self.blocks(name).items()])
        try:
            setattr(owner, attribute, wanted)
            fits = torch.allclose(getattr(owner, attribute), wanted, rtol=1e-3, atol=1e-5)
        except (RuntimeError, ValueError, NotImplementedError):
            fits = False
        if not fits:
            kinds = ", ".join(type(one).__name__.strip("_") for one in owner.parametrizations[attribute])
            raise OptionError(
                f"{attribute} {list(tensor.shape)} is parametrised by {kinds}, which does not make of it what is to be "
                f"set; take it off first: torch.nn.utils.parametrize.remove_parametrizations(module, {attribute!r})"
            )

    def _tensor(self, name: str) -> Any:
        return attrgetter(name)(self._cell)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """The module that a parameter belongs to, and its name there."""
        path, _, attribute = name.rpartition(".")
        return self._cell.get_submodule(path), attribute
