"""Anybody's module or function as a cell, with no subclassing."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from matching import assert_match
from problems import B, DelayCell, H, I, T, leaky, uneven_loss
from unrolled.trees import Tree


class ForeignCell(nn.Module):
    """Somebody else's cell: it takes the state first, returns the state first and makes none."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(I + H, H)

    def forward(self, hidden: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.inner(torch.cat([features, hidden], -1)))
        return hidden, hidden * 2


class ContractCell(nn.Module):
    """Keeps the contract but has no `initial_state`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(I + H, H)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.inner(torch.cat([input, state], -1)))
        return hidden * 2, hidden


def zeros(batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
    return torch.zeros(batch_size, H, device=device, dtype=dtype)


def total(input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return state, state + input


def swapped(module: nn.Module, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    hidden, output = module(state, input)
    return output, hidden


def test_a_cell_comes_back_as_it_is():
    for cell in (ur.LSTMCell(I, H), DelayCell(2, I)):
        assert ur.as_cell(cell) is cell
        assert isinstance(cell, ur.Cell)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_nns_cells_start_from_zeros_of_their_size_on_any_device(cell, dtype):
    made = ur.as_cell(cell(I, H, dtype=dtype))
    assert isinstance(made, ur.Cell)
    state = made.initial_state(B, device="meta", dtype=dtype)
    for tensor in state if cell is nn.LSTMCell else [state]:
        assert (tensor.shape, tensor.dtype, tensor.device.type) == ((B, H), dtype, "meta")


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_an_adapted_cells_own_state_has_the_dtype_of_its_weights_as_our_cells_have(cell):
    ours = getattr(ur, cell.__name__)(I, H).double()
    theirs = ur.as_cell(cell(I, H).double())
    assert_match(theirs.initial_state(B), ours.initial_state(B))


def test_adapting_shares_the_parameters_of_what_was_adapted():
    module = nn.GRUCell(I, H)
    rnn = ur.unroll(module)
    assert {id(p) for p in rnn.parameters()} == {id(p) for p in module.parameters()}
    rnn(torch.randn(T, B, I))[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_module_whose_call_differs_needs_only_step_and_state():
    foreign = ForeignCell().double()
    same = ContractCell().double()
    same.load_state_dict(foreign.state_dict())
    inputs = torch.randn(T, B, I, dtype=torch.float64)
    got = ur.unroll(ur.as_cell(foreign, step=swapped, state=zeros))(inputs)
    want = ur.unroll(ur.as_cell(same, state=zeros))(inputs)
    assert_match(got, want, bound=0)
    uneven_loss(*got).backward()
    uneven_loss(*want).backward()
    assert_match(foreign.inner.weight.grad, same.inner.weight.grad)


class LearnedStart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(H))

    def forward(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return self.start.expand(batch_size, -1)


def test_a_module_given_as_state_is_trained_with_the_cell():
    cell = ur.as_cell(ContractCell(), state=LearnedStart())
    names = [name for name, _ in cell.named_parameters()]
    assert sorted(names) == ["module.inner.bias", "module.inner.weight", "state.start"]
    copies = ur.copies(ur.unroll(cell.double()), torch.randn(T, B, I, dtype=torch.float64))
    copies.backward(copies.outputs.sum())
    assert_match(copies.initial_grad["state.start"], cell.state.start.grad)
    assert cell.state.start.grad.abs().min() > 0


def test_a_state_given_for_torch_nns_cell_replaces_its_zeros():
    cell = ur.as_cell(nn.GRUCell(I, H), state=lambda batch_size, device=None, dtype=None: torch.ones(batch_size, H))
    assert torch.equal(cell.initial_state(2), torch.ones(2, H))


def test_a_function_is_a_cell_with_the_parameters_it_is_given():
    decay = nn.Parameter(torch.tensor(0.5))
    cell = ur.as_cell(leaky, parameters={"decay": decay}, state=lambda B, device=None, dtype=None: torch.zeros(B, I))
    outputs, _ = ur.unroll(cell)(torch.randn(T, B, I))
    outputs.sum().backward()
    assert list(cell.parameters()) == [decay]
    assert decay.grad != 0


def test_a_function_without_parameters_and_a_partial_are_cells():
    def add(scale: float, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return state, state + scale * input

    inputs = torch.randn(T, B, I)
    outputs, total = ur.unroll(functools.partial(add, 2.0))(inputs, torch.zeros(B, I))
    assert_match(total, 2 * inputs.sum(0))
    assert_match(outputs[-1], 2 * inputs[:-1].sum(0))


def test_one_tensor_under_two_names_is_passed_under_both():
    shared = nn.Parameter(torch.tensor(0.5))
    cell = ur.as_cell(lambda p, x, s: (p["a"] * x, p["b"] * s), parameters={"a": shared, "b": shared})
    outputs, state = ur.unroll(cell)(torch.ones(T, B, I), torch.ones(B, I))
    assert_match(outputs, torch.full((T, B, I), 0.5))
    assert_match(state, torch.full((B, I), 0.5**T))


def test_a_tensor_that_asks_for_gradients_is_refused_as_a_parameter_for_it_would_get_none():
    decay = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ur.OptionError, match=r"decay.*Parameter"):
        ur.as_cell(leaky, parameters={"decay": decay})


@pytest.mark.parametrize(
    "parameters",
    [{"a.b": torch.ones(1)}, {"forward": torch.ones(1)}, {"count": torch.tensor(1)}],
    ids=lambda p: next(iter(p)),
)
def test_parameters_that_cannot_be_held_are_refused_by_name(parameters):
    with pytest.raises(ur.OptionError, match=next(iter(parameters))):
        ur.as_cell(leaky, parameters=parameters)


CONTEXT_TAKERS = {
    "module": ur.as_cell(nn.Identity(), step=lambda module, x, s, c: (x + c, s), state=zeros),
    "function": ur.as_cell(lambda x, s, c: (x + c, s), state=zeros),
    "function of parameters": ur.as_cell(
        lambda p, x, s, c: (x + p["w"] * c, s), parameters={"w": torch.ones(())}, state=zeros
    ),
}


@pytest.mark.parametrize("name", CONTEXT_TAKERS)
def test_a_step_with_one_more_argument_takes_a_context(name):
    inputs, context = torch.randn(T, B, I), torch.randn(B, I)
    assert_match(ur.unroll(CONTEXT_TAKERS[name])(inputs, context=context)[0], inputs + context)
    with pytest.raises(ur.InputError, match="context="):
        ur.unroll(CONTEXT_TAKERS[name])(inputs)


def test_a_context_with_a_default_may_be_left_out():
    cell = ur.as_cell(lambda x, s, context=None: (x if context is None else x + context, s), state=zeros)
    inputs = torch.randn(T, B, I)
    assert torch.equal(ur.unroll(cell)(inputs)[0], inputs)
    assert torch.equal(ur.unroll(cell)(inputs, context=torch.ones(B, I))[0], inputs + 1)


def stateless(input: Tensor, state: Tree) -> tuple[Tensor, Tree]:
    return 2 * input, state


@pytest.mark.parametrize("empty", [None, (), {}], ids=str)
def test_a_cell_without_state_hands_an_empty_one_on(empty):
    rnn = ur.unroll(ur.as_cell(stateless, state=lambda batch_size, device=None, dtype=None: empty))
    inputs = torch.randn(T, B, I)
    outputs, state = rnn(inputs)
    assert torch.equal(outputs, 2 * inputs)
    assert state == empty
    assert torch.equal(rnn(inputs, state)[0], 2 * inputs), "what a call returned may be passed to the next"


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [ContractCell(), total, ForeignCell()], ids=["module", "function", "foreign"])
def test_a_state_that_nobody_can_make_is_never_guessed_and_the_error_names_state(cell):
    made = ur.as_cell(cell)
    with pytest.raises(ur.StateError, match="state="):
        made.initial_state(B)
    with pytest.raises(ur.StateError, match="state="):
        ur.unroll(made)(torch.randn(T, B, I))


def test_a_function_without_a_state_is_called_by_its_name_in_the_error():
    with pytest.raises(ur.StateError, match="total"):
        ur.unroll(total)(torch.randn(T, B, I))


def test_with_a_state_passed_no_cell_needs_to_make_one():
    outputs, _ = ur.unroll(ContractCell())(torch.randn(T, B, I), torch.zeros(B, H))
    assert outputs.shape == (T, B, H)


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (("LSTM",), {}, "str"),
        ((nn.GRUCell(I, H),), {"parameters": {}}, "parameters="),
        ((leaky,), {"step": swapped}, "step="),
        ((leaky,), {"parameters": {"decay": 0.5}}, "decay"),
    ],
    ids=["not callable", "parameters of a module", "step of a function", "number as parameter"],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, options, said):
    with pytest.raises(ur.OptionError, match=said):
        ur.as_cell(*arguments, **options)


@pytest.mark.parametrize("thing", [nn.LSTMCell, ur.LSTMCell], ids=["torch.nn's class", "our class"])
def test_a_class_in_place_of_a_cell_is_refused_at_once(thing):
    with pytest.raises(ur.OptionError, match="LSTMCell"):
        ur.unroll(thing)


def test_a_state_function_of_another_signature_is_a_state_error_that_says_the_right_one():
    rnn = ur.unroll(ur.as_cell(ContractCell(), state=lambda batch_size: torch.zeros(batch_size, H)))
    with pytest.raises(ur.StateError, match="device"):
        rnn(torch.randn(T, B, I))


def test_an_initial_state_that_is_no_tree_of_tensors_is_a_state_error():
    rnn = ur.unroll(ur.as_cell(ContractCell(), state=lambda batch_size, device=None, dtype=None: [0.0] * batch_size))
    with pytest.raises(ur.StateError, match="float"):
        rnn(torch.randn(T, B, I))


def test_an_unknown_engine_is_refused_by_name():
    with pytest.raises(ur.OptionError, match=r"reference.*'warp'"):
        ur.unroll(ur.GRUCell(I, H), engine="warp")


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "3"])
@pytest.mark.parametrize("make", [ur.RNNCell, ur.LSTMCell, ur.GRUCell, ur.RNN, ur.LSTM, ur.GRU])
def test_sizes_must_be_positive_integers(make, size):
    with pytest.raises(ur.OptionError, match=f"input_size.*{size!r}"):
        make(size, H)
    with pytest.raises(ur.OptionError, match=f"hidden_size.*{size!r}"):
        make(I, size)


@pytest.mark.parametrize("make", [ur.RNNCell, ur.RNN])
def test_an_unknown_nonlinearity_is_refused_by_name(make):
    with pytest.raises(ur.OptionError, match=r"tanh, relu.*'gelu'"):
        make(I, H, nonlinearity="gelu")
