"""Anybody's module or function as a cell."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.autograd_graph import differentiable
from unrolled.cells.base import GateLayout, Gates, StandInCell
from unrolled.cells.gru import GRUCell
from unrolled.cells.lstm import LSTMCell
from unrolled.cells.rnn import RNNCell
from unrolled.cells.signature import parameters_of
from unrolled.cells.stateful import AttributeStep, check_attributes
from unrolled.errors import OptionError, StateError
from unrolled.trees import Tree

Step = Callable[..., tuple[Tree, Tree]]
State = Callable[..., Tree]


class AdaptedCell(StandInCell):
    """A module whose call differs from the contract, or that lacks `initial_state`, made a cell by `as_cell`."""

    def __init__(self, module: nn.Module, step: Step | None, state: State | None, display_name: str = "") -> None:
        super().__init__()
        self.display_name, self.names_start_with = display_name or type(module).__name__, "module."
        self.module = module
        self.step = step
        self.state = state

    @property
    def state_names(self) -> Sequence[str]:
        """Those of the module, if it has any."""
        return getattr(self.module, "state_names", ())

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tree:
        """What the user's `state=` makes, or the module's own `initial_state`.

        Raises:
            StateError: if there is neither; zeros are never guessed.
        """
        make = self._maker()
        if make is None and isinstance(self.step, AttributeStep):
            raise StateError(
                f"the state of {self.display_name} has the shape that its input gives it; pass a state to the call, "
                "or make the cell with as_cell(module, state=(batch_size, device=None, dtype=None) -> state)"
            )
        if make is None:
            raise StateError(
                f"{self.display_name} has no initial_state and none was given; pass a state to the call, "
                "or make the cell with as_cell(module, state=(batch_size, device=None, dtype=None) -> state)"
            )
        check_state_maker(make, self.display_name)
        return make(batch_size, device=device, dtype=dtype)

    @property
    def starts_from_input(self) -> bool:
        """Whether the initial state is that of a fresh module, in a shape that the input gives it."""
        return self._maker() is None and (self.step is None or isinstance(self.step, AttributeStep))

    def _maker(self) -> State | None:
        return self.state or getattr(self.module, "initial_state", None)

    def forward(self, input: Tree, state: Tree, *context: Tree) -> tuple[Tree, Tree]:
        """Run the user's `step` (or the module itself) once."""
        if self.step is None:
            return self.module(input, state, *context)
        return self.step(self.module, input, state, *context)


def check_state_maker(make: State, name: str) -> None:
    """Refuse a function that cannot be called as `(batch_size, device=, dtype=)`.

    Raises:
        StateError: saying how it must be.
    """
    try:
        inspect.Signature(parameters_of(make)).bind(1, device=None, dtype=None)
    except TypeError as error:
        raise StateError(
            f"the initial state of {name} must be made by (batch_size, device=None, dtype=None) -> state: {error}"
        ) from error


def as_cell(
    module: nn.Module | Callable[..., Any],
    *,
    step: Step | None = None,
    state: State | None = None,
    state_attributes: Sequence[str] | None = None,
    parameters: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Make a cell of a module or function; what is one already comes back unchanged.

    Args:
        module: `torch.nn.RNNCell`, `LSTMCell` or `GRUCell`; any module called as `(input, state) -> (output, state)`;
            any module at all with `step=`; or a plain function `(input, state) -> (output, state)`.
        step: `(module, input, state) -> (output, state)`, for a module whose call differs. A fourth argument, if it
            has one, is the context.
        state: `(batch_size, device=None, dtype=None) -> state`, for what cannot make its own. If it is an
            `nn.Module`, its parameters become the cell's.
        state_attributes: for a *stateful* module, which is called with an input alone and keeps its state in
            attributes: their paths, such as `("v",)` or `("1.v", "3.v")`. The state is a dict of what stands in them; a
            step sets them, calls the module, reads them, and leaves the module as it was. Where `unroll` can prove
            which they are, they need not be named; what a fresh module has in them is where the first copy starts.
        parameters: for a function only: named tensors to be trained. The function is then called as
            `(parameters, input, state)`.

    Returns:
        A module with `forward(input, state)` and `initial_state`. It shares the parameters of what it was made of.

    Raises:
        OptionError: if `module` is not callable, or an argument does not go with it.

    Example:
        >>> lstm = as_cell(torch.nn.LSTMCell(3, 4))
        >>> output, (h, c) = lstm(torch.ones(2, 3), lstm.initial_state(2))
        >>> def leaky(parameters, input, state):
        ...     state = parameters["decay"] * state + input
        ...     return state, state
        >>> cell = as_cell(leaky, parameters={"decay": torch.tensor(0.9)}, state=lambda B, **_: torch.zeros(B, 3))
        >>> [name for name, _ in cell.named_parameters()]
        ['module.decay']
        >>> class LeakyNeuron(torch.nn.Module):
        ...     v = 0.0
        ...
        ...     def forward(self, current):
        ...         self.v = 0.9 * self.v + current
        ...         return torch.relu(self.v - 1)
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), LeakyNeuron())
        >>> neurons = as_cell(net, state_attributes=("1.v",))
        >>> output, state = neurons(torch.ones(2, 3), {"1.v": torch.zeros(2, 4)})
        >>> state["1.v"].shape, net[1].v
        (torch.Size([2, 4]), 0.0)
    """
    if isinstance(module, type):
        raise OptionError(f"as_cell takes a module, got the class {module.__name__}; make one: {module.__name__}(...)")
    if not isinstance(module, nn.Module):
        return _function_as_cell(module, step, state, state_attributes, parameters)
    if step is None and hasattr(module, "flatten_parameters"):  # as torch.nn's layers over time have, and ours
        raise OptionError(
            f"as_cell takes a cell, but {type(module).__name__} is a whole layer over time; call it as it is, or make "
            "ours of torch.nn's: from_torch(layer)"
        )
    if parameters is not None:
        raise OptionError("parameters= goes with a function; a module has its own: leave parameters= out")
    if state_attributes is not None:
        if step is not None:
            raise OptionError("state_attributes= makes the step of a stateful module: leave step= out")
        check_attributes(module, state_attributes)
        return AdaptedCell(module, AttributeStep(state_attributes), state)
    if step is None and getattr(type(module), "forward", None) in _TORCH_STEPS:
        step = _TORCH_STEPS[type(module).forward]
        state = state or _Zeros(module)
    if step is None and state is None and callable(getattr(module, "initial_state", None)):
        return module
    return AdaptedCell(module, step, state)


def _function_as_cell(
    function: Callable[..., Any],
    step: Step | None,
    state: State | None,
    state_attributes: Sequence[str] | None,
    parameters: Mapping[str, Tensor] | None,
) -> nn.Module:
    if not callable(function):
        raise OptionError(f"as_cell takes a module or a function, got a {type(function).__name__}")
    if step is not None:
        raise OptionError("step= goes with a module; a function is its own step: leave step= out")
    if state_attributes is not None:
        raise OptionError("state_attributes= goes with a module; a function has none: pass its state on")
    name = getattr(function, "__name__", type(function).__name__)
    if parameters is None:
        return AdaptedCell(nn.Module(), _Function(function), state, name)
    return AdaptedCell(_Parameters(parameters), _FunctionOfParameters(function), state, name)


class _Parameters(nn.Module):
    """Holds the parameters of a function."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(parameters)
        for name, tensor in parameters.items():
            self._refuse(name, tensor)
            self.register_parameter(name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))

    @staticmethod
    def _refuse(name: str, tensor: Tensor) -> None:
        if not name.isidentifier() or hasattr(nn.Module, name) or name in ("names", "training"):
            raise OptionError(f"parameters= cannot hold the name {name!r}; take another word")
        if isinstance(tensor, nn.Parameter):
            return
        if not isinstance(tensor, Tensor) or not differentiable(tensor):
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise OptionError(
                f"parameters= must be floating tensors, {name} is {got}; keep other things in the function"
            )
        if tensor.requires_grad:
            raise OptionError(
                f"parameters= would not pass gradients on to the tensor {name}; give a torch.nn.Parameter in its place"
            )


class _Function:
    """A plain function called as a step: it does without the module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, module: nn.Module, *arguments: Tree) -> Any:
        return self.function(*arguments)


class _FunctionOfParameters(_Function):
    """A plain function called as a step with the named parameters that the module holds."""

    def __call__(self, module: nn.Module, *arguments: Tree) -> Any:
        return self.function({name: getattr(module, name) for name in module.names}, *arguments)


def _hidden_step(module: nn.Module, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    hidden = module(input, state)
    return hidden, hidden


def _lstm_step(module: nn.Module, input: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tree]:
    hidden, memory = module(input, state)
    return hidden, (hidden, memory)


# Keyed by `forward` itself: a subclass with a forward of its own is taken at its word.
_TORCH_STEPS: dict[Any, Step] = {
    nn.RNNCell.forward: _hidden_step,
    nn.GRUCell.forward: _hidden_step,
    nn.LSTMCell.forward: _lstm_step,
}


class _Zeros:
    """The initial state of torch.nn's cells: zeros, by default like the weights."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tree:
        hidden = self.module.weight_hh.new_zeros(batch_size, self.module.hidden_size, device=device, dtype=dtype)
        return (hidden, torch.zeros_like(hidden)) if isinstance(self.module, nn.LSTMCell) else hidden


def is_torch_cell(cell: nn.Module) -> bool:
    """Whether a cell is one of torch.nn's with nothing of the user's: its own step, from zeros."""
    return isinstance(cell, AdaptedCell) and cell.step in _TORCH_STEPS.values() and isinstance(cell.state, _Zeros)


_TORCH_GATES: dict[type[nn.Module], GateLayout] = {
    nn.RNNCell: RNNCell.gate_layout,
    nn.GRUCell: GRUCell.gate_layout,
    nn.LSTMCell: replace(LSTMCell.gate_layout, computed=("input", "forget", "candidate", "output", "memory")),
}


def gates_of(cell: nn.Module) -> Gates | None:
    """The gates of a cell, or of the one cell inside of it that has some.

    None where several inside have gates: nobody can tell then which of them keep the state of the whole.
    """
    found, inside = [], set[nn.Module]()
    for module in cell.modules():
        layout = getattr(module, "gate_layout", None) or _TORCH_GATES.get(type(module))
        if isinstance(layout, GateLayout) and module not in inside:
            found.append(Gates(module, layout))
            inside.update(module.modules())
    return found[0] if len(found) == 1 else None


def parameter_names(cell: nn.Module) -> dict[str, str]:
    """Each parameter's name as the user knows it, and its path inside the cell.

    An adapter's parameters go by the names they have in the module that it adapts. A cell that shares a module with
    others says which parameters it reads.
    """
    names = [name for name, _ in cell.named_parameters()]
    if not isinstance(cell, StandInCell):
        return {name: name for name in names}
    return {name.removeprefix(cell.names_start_with): name for name in names if cell.reads_parameter(name)}


def context_use(cell: nn.Module) -> str:
    """Whether a cell 'requires', 'accepts' or 'refuses' a third argument, read from its signature.

    A cell around another cell, its `wrapped`, takes what that one takes.
    """
    if isinstance(getattr(type(cell), "wrapped", None), property):  # a user's attribute of that name is their own
        return context_use(cell.wrapped)
    function: Callable[..., Any] = cell.forward
    leading = 2
    if isinstance(cell, AdaptedCell):
        if cell.step is None:
            return context_use(cell.module)
        function, leading = cell.step, 3
        if isinstance(function, _Function):
            leading = 3 if isinstance(function, _FunctionOfParameters) else 2
            function = function.function
    parameters = parameters_of(function)
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return "accepts"
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) <= leading:
        return "refuses"
    return "accepts" if positional[leading].default is not inspect.Parameter.empty else "requires"
