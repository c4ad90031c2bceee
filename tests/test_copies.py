"""The unrolled network as an object: what each copy saw, and what flowed back through it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import unrolled as ur
from matching import assert_match
from problems import (
    PROBLEMS,
    B,
    CountingCell,
    H,
    I,
    LinearCell,
    T,
    TokenCell,
    linear_state_grads,
    linear_states,
    loop_by_hand,
    uneven_loss,
)
from unrolled.trees import Tree, leaves, map_leaves

F64 = torch.float64

Loss = Callable[[Tree, list[Tree]], Tensor]

LOSSES: dict[str, Loss] = {  # of the outputs, and of the states 0 .. T
    "outputs": lambda outputs, states: uneven_loss(outputs),
    "last state": lambda outputs, states: uneven_loss(states[-1]),
    "both": lambda outputs, states: uneven_loss(outputs, states[-1]),
    "a middle state": lambda outputs, states: uneven_loss(states[3]),
    "all states": lambda outputs, states: uneven_loss(outputs, states),
}

NAMES = {  # how a user knows a parameter, by problem: the name in the cell that was adapted
    "RNNCell": "weight_hh",
    "nn.LSTMCell": "weight_hh",
    "function": "decay",
    "nested state": "fast.weight_hh",
    "tokens": "embedding.weight",
}


def run(name: str, state: Tree = None, **options: Any) -> tuple[ur.Unrolled, ur.Copies]:
    problem = PROBLEMS[name](F64)
    rnn = problem.unrolled(**options)
    inputs = problem.inputs.transpose(0, 1) if options.get("batch_first") else problem.inputs
    return rnn, ur.copies(rnn, inputs, state, context=problem.context)


def loss_of(copies: ur.Copies, loss: str = "both") -> Tensor:
    return LOSSES[loss](copies.outputs, [*(copy.state for copy in copies), copies.state])


def trained(module: nn.Module, copies: ur.Copies) -> dict[str, Tensor]:
    """`.grad` of each trained parameter (zeros where none came) under the name that the copies give it."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    assert len(parameters) == len(copies.weight_grad)
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in zip(copies.weight_grad, parameters, strict=True)
    }


def assert_shares_add_up(module: nn.Module, copies: ur.Copies) -> None:
    for name, whole in trained(module, copies).items():
        shares = copies.weight_grad[name]
        assert shares.shape == (len(copies), *whole.shape)
        assert_match(shares.sum(0) + copies.initial_grad[name], whole, name)
        norms = torch.stack([torch.linalg.vector_norm(share) for share in shares])
        assert_match(copies.weight_grad_norm[name], norms, f"norms of {name}")
        for copy, share in zip(copies, shares, strict=True):
            assert_match(copy.weight_grad[name], share, f"{name} of copy {copy.t}")


# -- shares add up ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_shares_and_initial_grad_add_up_to_grad(name, loss):
    rnn, copies = run(name)
    copies.backward(loss_of(copies, loss))
    assert_shares_add_up(rnn, copies)
    assert max(grad.abs().max() for grad in trained(rnn, copies).values()) > 0


@pytest.mark.parametrize("name", PROBLEMS)
def test_backward_leaves_the_same_grad_as_without_copies(name):
    problem = PROBLEMS[name](F64)
    rnn, parameters = problem.unrolled(), list(problem.cell.parameters())
    outputs, state = rnn(problem.inputs, context=problem.context)
    want = torch.autograd.grad(uneven_loss(outputs, state), parameters)
    copies = ur.copies(rnn, problem.inputs, context=problem.context)
    assert_match(copies.outputs, outputs)
    assert_match(copies.state, state)
    copies.backward(loss_of(copies))
    assert_match([p.grad for p in parameters], list(want))


@pytest.mark.parametrize("name", PROBLEMS)
def test_with_a_state_from_the_caller_all_of_grad_is_the_copies_own(name):
    problem = PROBLEMS[name](F64)
    state = map_leaves(Tensor.detach, problem.cell.initial_state(B, dtype=F64))
    rnn = problem.unrolled()
    copies = ur.copies(rnn, problem.inputs, state, context=problem.context)
    copies.backward(loss_of(copies))
    assert_shares_add_up(rnn, copies)
    assert all(grad.abs().max() == 0 for grad in copies.initial_grad.values())


@pytest.mark.parametrize("name", [name for name in PROBLEMS if "start" in name])
def test_initial_grad_is_what_came_through_the_initial_state(name):
    problem = PROBLEMS[name](F64)
    rnn, parameters = problem.unrolled(), list(problem.cell.parameters())
    initial = problem.cell.initial_state(B, dtype=F64)
    cut = map_leaves(lambda x: x.detach().requires_grad_(), initial)
    loss = uneven_loss(*rnn(problem.inputs, cut))
    by_initial = torch.autograd.grad(loss, leaves(cut))
    want = torch.autograd.grad(leaves(initial), parameters, by_initial, allow_unused=True, materialize_grads=True)
    copies = ur.copies(rnn, problem.inputs)
    copies.backward(loss_of(copies))
    assert_match(list(copies.initial_grad.values()), list(want))
    assert any(grad.abs().max() > 0 for grad in want)
    assert_match(leaves(copies[0].total_state_grad), list(by_initial))


def test_initial_grad_is_zero_where_the_caller_made_the_state_even_from_the_cells_own_parameter():
    problem = PROBLEMS["GRUCell learned start"](F64)
    copies = ur.copies(problem.unrolled(), problem.inputs, problem.cell.initial_state(B))
    copies.backward(loss_of(copies))
    assert problem.cell.initial_h.grad.abs().max() > 0
    assert copies.initial_grad["initial_h"].abs().max() == 0


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layer", [ur.RNN, ur.LSTM, ur.GRU])
def test_layers_have_copies_under_torch_nns_names(layer, batch_first):
    module = layer(I, H, batch_first=batch_first).double()
    inputs = torch.randn(B, T, I, dtype=F64) if batch_first else torch.randn(T, B, I, dtype=F64)
    h, c = torch.randn(2, 1, B, H, dtype=F64).unbind()
    state = (h, c) if layer is ur.LSTM else h
    copies = ur.copies(module, inputs, state)
    assert_match(copies.outputs, module(inputs, state)[0])
    assert_match(copies[0].state, map_leaves(lambda x: x.squeeze(0), state), bound=0)
    copies.backward(loss_of(copies))
    assert list(copies.weight_grad) == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    assert_shares_add_up(module, copies)


@pytest.mark.parametrize("name", PROBLEMS)
def test_batch_first_changes_only_the_layout_of_inputs_and_outputs(name):
    rnn, copies = run(name, batch_first=True)
    assert len(copies) == T
    assert all(leaf.shape[:2] == (B, T) for leaf in leaves(copies.outputs))
    assert all(leaf.shape[0] == B for leaf in leaves([copies[1].input, copies[1].output]))
    copies.backward(loss_of(copies))
    assert_shares_add_up(rnn, copies)


@pytest.mark.parametrize(("name", "parameter"), NAMES.items())
def test_parameters_go_by_the_names_their_owner_knows(name, parameter):
    _, copies = run(name)
    copies.backward(loss_of(copies))
    assert parameter in copies.weight_grad
    with pytest.raises(KeyError, match=f"nothing.*{parameter}"):
        copies.weight_grad["nothing"]


# -- gradients of inputs and states ----------------------------------------------------------------------------------


def floating(tree: Tree) -> list[Tensor]:
    return [leaf for leaf in leaves(tree) if leaf.is_floating_point()]


def apart(state: Tree) -> Tree:
    """The same numbers as tensors of their own, so that gradients by them can be told from others."""
    return map_leaves(lambda x: x * 1, state)


def state_grads_by_hand(problem: Any, start: Tree, loss: Loss) -> list[tuple[list[Tensor], list[Tensor]]]:
    """For each copy the gradient by what it used of its state, and by the state as copy and loss both read it."""
    rest = () if problem.context is None else (problem.context,)
    states, used, outputs = [apart(start)], [], []
    for t in range(T):
        used.append(apart(states[-1]))
        output, state = problem.cell(problem.inputs[t], used[-1], *rest)
        outputs.append(output)
        states.append(apart(state))
    value = loss(map_leaves(lambda *steps: torch.stack(steps), *outputs), states)

    def by(tree: Tree) -> list[Tensor]:
        return list(torch.autograd.grad(value, floating(tree), retain_graph=True, materialize_grads=True))

    return [(by(a), by(b)) for a, b in zip(used, states, strict=False)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_state_grad_flowed_through_the_copy_and_total_counts_what_the_loss_took_too(name, loss):
    problem = PROBLEMS[name](F64)
    start = map_leaves(Tensor.detach, problem.cell.initial_state(B, dtype=F64))
    copies = ur.copies(problem.unrolled(), problem.inputs, start, context=problem.context)
    copies.backward(loss_of(copies, loss))
    for leaf in floating(start):
        leaf.requires_grad_()
    wanted = state_grads_by_hand(problem, start, LOSSES[loss])
    for copy, (through, total) in zip(copies, wanted, strict=True):
        assert_match(leaves(copy.state_grad), through, f"state_grad of copy {copy.t}")
        assert_match(leaves(copy.total_state_grad), total, f"total_state_grad of copy {copy.t}")


def test_integer_leaves_have_no_gradient():
    copies = ur.copies(ur.unroll(CountingCell(I).double()), torch.randn(T, B, I, dtype=F64))
    copies.backward(loss_of(copies))
    assert copies[1].state_grad.count is None
    assert copies[1].state_grad.total.shape == (B, I)
    _, tokens = run("tokens")
    tokens.backward(loss_of(tokens))
    assert tokens[1].input_grad is None


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", sorted(set(PROBLEMS) - {"tokens"}))
def test_input_grad_is_each_copys_slice_of_the_inputs_gradient(name, batch_first):
    problem = PROBLEMS[name](F64)
    inputs = problem.inputs.transpose(0, 1) if batch_first else problem.inputs
    asked = inputs.clone().requires_grad_()
    rnn = problem.unrolled(batch_first=batch_first)
    with_grad = ur.copies(rnn, asked, context=problem.context)
    without = ur.copies(rnn, inputs, context=problem.context)
    for copies in (with_grad, without):
        copies.backward(loss_of(copies))
    assert inputs.grad is None
    assert not inputs.requires_grad
    by_inputs = asked.grad.transpose(0, 1) if batch_first else asked.grad
    assert_match(torch.stack([copy.input_grad for copy in with_grad]), by_inputs)
    assert_match(torch.stack([copy.input_grad for copy in without]), by_inputs)


def test_gradients_flow_on_to_an_encoder_and_to_the_state_it_made():
    encoder, start = nn.Linear(2, I).double(), nn.Linear(2, H).double()
    rnn, raw = ur.unroll(ur.GRUCell(I, H)).double(), torch.randn(T, B, 2, dtype=F64)
    upstream = [*encoder.parameters(), *start.parameters()]
    want = torch.autograd.grad(uneven_loss(*rnn(encoder(raw), start(raw[0]))), upstream)
    copies = ur.copies(rnn, encoder(raw), start(raw[0]))
    copies.backward(loss_of(copies))
    assert_match([p.grad for p in upstream], list(want))


def test_gradients_flow_on_to_a_context():
    problem = PROBLEMS["attending"](F64)
    context = problem.context.requires_grad_()
    want = torch.autograd.grad(uneven_loss(*problem.unrolled()(problem.inputs, context=context)), [context])
    copies = ur.copies(problem.unrolled(), problem.inputs, context=context)
    copies.backward(loss_of(copies))
    assert_match([context.grad], list(want))


# -- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 10, 50])
@pytest.mark.parametrize("w", [0.5, 1.0, 1.5, -0.9])
def test_copies_of_a_linear_cell_show_powers_of_its_weight(w, steps):
    rnn = ur.unroll(LinearCell(torch.tensor(w, dtype=F64)))
    copies = ur.copies(rnn, torch.zeros(steps, 1, 1, dtype=F64), torch.ones(1, 1, dtype=F64))
    copies.backward(copies.state.sum())
    powers = torch.tensor([w**t for t in range(steps + 1)], dtype=F64)
    states = torch.stack([copy.state for copy in copies]).flatten()
    assert_match(states, powers[:steps], "h_t = w^t")
    for copy in copies:
        assert_match(copy.state_grad, powers[steps - copy.t].view(1, 1), f"d h_T / d h_{copy.t} = w^(T-t)")
    share = torch.full((steps,), w ** (steps - 1), dtype=F64)
    assert_match(copies.weight_grad["weight"], share, "each copy's share is w^(T-1)")
    assert_match(copies.weight_grad_norm["weight"], share.abs())


@pytest.mark.parametrize(("w", "bound"), [(0.5, 0.5**60), (1.5, 1.5**60)])
def test_vanishing_and_exploding_are_the_numbers_theory_says(w, bound):
    rnn = ur.unroll(LinearCell(torch.tensor(w, dtype=F64)))
    copies = ur.copies(rnn, torch.ones(60, 1, 1, dtype=F64))
    copies.backward(copies.outputs[-1].sum())
    assert_match(copies[0].state_grad, torch.full((1, 1), bound, dtype=F64))


def test_copies_of_a_matrix_linear_cell_show_powers_of_the_matrix():
    problem = PROBLEMS["linear"](F64)
    weight, by_last = problem.cell.weight.detach(), torch.randn(B, I, dtype=F64)
    start = torch.randn(B, I, dtype=F64)
    copies = ur.copies(problem.unrolled(), problem.inputs, start)
    copies.backward((copies.state * by_last).sum())
    states, grads = linear_states(weight, start, problem.inputs), linear_state_grads(weight, T, by_last)
    for t, copy in enumerate(copies):
        assert_match(copy.state, states[t])
        assert_match(copy.next_state, states[t + 1])
        assert_match(copy.state_grad, grads[t])
        assert_match(copy.input_grad, grads[t + 1])
        assert_match(copy.weight_grad["weight"], grads[t + 1].T @ states[t])


# -- one copy, many copies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
def test_each_copy_holds_what_went_in_and_out_of_it(name):
    problem = PROBLEMS[name](F64)
    copies = ur.copies(problem.unrolled(), problem.inputs, context=problem.context)
    outputs, states = loop_by_hand(problem.cell, problem.inputs, copies[0].state, problem.context)
    for t, copy in enumerate(copies):
        assert copy.t == t
        assert torch.equal(copy.input, problem.inputs[t])
        assert_match(copy.output, outputs[t], bound=0)
        assert_match(copy.state, states[t], bound=0)
        assert_match(copy.next_state, states[t + 1], bound=0)
    assert all(a is b for a, b in zip(leaves(copies[1].next_state), leaves(copies[2].state), strict=True))


def test_len_index_iteration_and_slices_are_those_of_a_sequence_and_t_stays():
    _, copies = run("LSTMCell")
    assert len(copies) == T
    assert [copy.t for copy in copies] == [0, 1, 2, 3, 4]
    assert [copy.t for copy in reversed(copies)] == [4, 3, 2, 1, 0]
    assert copies[-1] is copies[T - 1]
    assert [copy.t for copy in copies[1:4]] == [1, 2, 3]
    assert [copy.t for copy in copies[1:][1:3]] == [2, 3]
    assert [copy.t for copy in copies[::-2]] == [4, 2, 0]
    assert len(copies[3:3]) == 0
    assert copies[2] in copies
    for index in (T, -T - 1):
        with pytest.raises(IndexError, match=rf"{T} copies.*{index}"):
            copies[index]


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_slice_has_the_outputs_last_state_and_shares_of_its_rows(batch_first):
    _, copies = run("LSTMCell", batch_first=batch_first)
    copies.backward(loss_of(copies))
    part = copies[1:4]
    assert_match(part.outputs, copies.outputs[:, 1:4] if batch_first else copies.outputs[1:4], bound=0)
    assert_match(part.state, copies[3].next_state, bound=0)
    for name in copies.weight_grad:
        assert_match(part.weight_grad[name], copies.weight_grad[name][1:4], bound=0)
        assert_match(part.weight_grad_norm[name], copies.weight_grad_norm[name][1:4], bound=0)


def test_an_empty_slice_has_no_shares_and_no_norms():
    _, copies = run("LSTMCell")
    copies.backward(loss_of(copies))
    empty = copies[T:]
    assert empty.weight_grad["weight_hh"].shape == (0, 4 * H, H)
    assert empty.weight_grad_norm["weight_hh"].shape == (0,)


def test_a_loss_on_a_slice_gives_nothing_to_the_copies_after_it():
    rnn, copies = run("GRUCell")
    copies.backward(uneven_loss(copies[:3].outputs))
    norms = copies.weight_grad_norm["weight_ih"]
    assert (norms[:3] > 0).all()
    assert (norms[3:] == 0).all()
    assert copies[4].state_grad.abs().max() == 0
    assert_shares_add_up(rnn, copies)


def test_reprs_say_shapes_steps_names_and_whether_gradients_are_there():
    _, copies = run("LSTMCell")
    before = repr(copies)
    assert all(word in before for word in ("LSTMCell", "5", "t = 0 to 4", "float64[2, 3]", "weight_hh", "after"))
    assert "t = 1 to 3" in repr(copies[1:4])
    assert "none" in repr(copies[:0])
    one = repr(copies[3])
    assert all(word in one for word in ("t=3", "input=float64[2, 3]", "(float64[2, 4], float64[2, 4])", "next_state"))
    copies.backward(loss_of(copies))
    assert "after" not in repr(copies)
    assert "weight_ih" in repr(copies.weight_grad)


# -- backward --------------------------------------------------------------------------------------------------------


def test_a_second_backward_adds_to_everything_the_first_left():
    rnn, copies = run("LSTMCell learned start")
    first, second = LOSSES["outputs"], LOSSES["all states"]
    states = [*(copy.state for copy in copies), copies.state]
    copies.backward(first(copies.outputs, states))
    norms = copies.weight_grad_norm["weight_hh"]
    copies.backward(second(copies.outputs, states))
    assert_shares_add_up(rnn, copies)
    assert not torch.equal(copies.weight_grad_norm["weight_hh"], norms)
    got = [(copy.state_grad, copy.input_grad, copy.weight_grad["weight_hh"]) for copy in copies]
    fresh = ur.copies(rnn, torch.stack([copy.input for copy in copies]))
    states = [*(copy.state for copy in fresh), fresh.state]
    fresh.backward(first(fresh.outputs, states) + second(fresh.outputs, states))
    assert_match(got, [(copy.state_grad, copy.input_grad, copy.weight_grad["weight_hh"]) for copy in fresh])


def test_a_gradient_may_be_given_for_a_loss_that_is_no_scalar():
    rnn, copies = run("GRUCell")
    cotangent = torch.randn_like(copies.outputs)
    copies.backward(copies.outputs, cotangent)
    assert_shares_add_up(rnn, copies)
    outputs = torch.stack([copy.output_grad for copy in copies])
    assert_match(outputs, cotangent, bound=0)


def test_an_ordinary_backward_elsewhere_is_not_remembered():
    rnn, copies = run("GRUCell")
    copies.backward(loss_of(copies))
    before = [copy.state_grad.clone() for copy in copies]
    uneven_loss(copies.outputs).backward(retain_graph=True)
    rnn(torch.randn(T, B, I, dtype=F64))[0].sum().backward()
    assert_match([copy.state_grad for copy in copies], before, bound=0)


@pytest.mark.parametrize("name", ["LSTMCell", "nn.LSTMCell", "tokens"])
def test_hooks_on_a_weight_fire_once_a_backward_and_never_for_a_share(name):
    rnn, copies = run(name)
    calls: list[str] = []
    for key, parameter in rnn.named_parameters():
        parameter.register_hook(lambda grad, key=key: calls.append(key))
    copies.backward(loss_of(copies))
    copies.weight_grad_norm[next(iter(copies.weight_grad))]
    copies.weight_grad[next(iter(copies.weight_grad))]
    assert sorted(calls) == sorted(key for key, _ in rnn.named_parameters())


def test_frozen_parameters_have_no_share_and_no_grad():
    rnn = ur.unroll(ur.LSTMCell(I, H)).double()
    rnn.cell.weight_ih.requires_grad_(False)
    copies = ur.copies(rnn, torch.randn(T, B, I, dtype=F64))
    copies.backward(loss_of(copies))
    assert list(copies.weight_grad) == ["weight_hh", "bias_ih", "bias_hh"]
    assert rnn.cell.weight_ih.grad is None
    assert_shares_add_up(rnn, copies)


def test_with_every_parameter_frozen_states_and_inputs_still_have_gradients():
    rnn = ur.unroll(ur.LSTMCell(I, H)).double().requires_grad_(False)
    copies = ur.copies(rnn, torch.randn(T, B, I, dtype=F64))
    copies.backward(loss_of(copies))
    assert len(copies.weight_grad) == 0
    assert copies[0].input_grad.abs().max() > 0
    assert copies[0].state_grad[1].abs().max() > 0


PARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("how", PARAMETRIZED)
@pytest.mark.parametrize("make", [lambda: ur.unroll(ur.GRUCell(I, H)), lambda: ur.GRU(I, H)], ids=["cell", "layer"])
def test_parametrized_cells_have_shares_of_their_originals(make, how):
    rnn = make().double()
    owner, weight = (rnn, "weight_hh_l0") if isinstance(rnn, ur.GRU) else (rnn.cell, "weight_hh")
    PARAMETRIZED[how](owner, weight)
    copies = ur.copies(rnn, torch.randn(T, B, I, dtype=F64))
    copies.backward(loss_of(copies))
    assert any(name.startswith(f"parametrizations.{weight}.original") for name in copies.weight_grad)
    assert_shares_add_up(rnn, copies)


def test_a_parametrized_function_of_parameters_reads_the_parametrized_value():
    problem = PROBLEMS["function"](F64)
    decay = problem.cell.module.decay.detach().clone()
    parametrize.register_parametrization(problem.cell.module, "decay", nn.Sigmoid())
    twin = ur.as_cell(problem.cell.step.function, parameters={"decay": torch.sigmoid(decay)}, state=problem.cell.state)
    assert_match(problem.unrolled()(problem.inputs)[0], ur.unroll(twin)(problem.inputs)[0])


def test_tied_parameters_are_one_parameter_whose_share_counts_both_uses():
    cell = TokenCell(7, H).double()
    rnn, tokens = ur.unroll(cell), torch.randint(7, (T, B))
    copies = ur.copies(rnn, tokens)
    copies.backward(loss_of(copies))
    assert "embedding.weight" in copies.weight_grad
    assert "head.weight" not in copies.weight_grad
    assert_shares_add_up(rnn, copies)


class OneStepLayer(nn.Module):
    """torch.nn's layer run for one step: it keeps its weights in a list beside its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(I, H)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, H, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        output, state = self.layer(input.unsqueeze(0), state.unsqueeze(0))
        return output.squeeze(0), state.squeeze(0)


class UserCell(nn.Module):
    """What many a user's cell is made of: `change` says what is odd about it."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change
        self.linear, self.norm = nn.Linear(I, I), nn.BatchNorm1d(I)
        self.gains = nn.ParameterList([torch.randn(I), torch.randn(I)])
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tree:
        zeros = torch.zeros(batch_size, I, device=device, dtype=dtype)
        return {"list": [zeros], "none": None, "empty": ()}.get(self.change, zeros)

    def forward(self, input: Tensor, state: Tree) -> tuple[Tree, Tree]:
        self.steps += 1
        hidden = state[0] if isinstance(state, list) else state if isinstance(state, Tensor) else input
        new = torch.tanh(self.linear(hidden) * self.gains[0] + input * self.gains[1])
        match self.change:
            case "list":
                return new, [new]
            case "none" | "empty":
                return new, state
            case "batch norm":
                new = self.norm(new)
            case "dropout":
                new = nn.functional.dropout(new, 0.5, self.training)
            case "detached state":
                return new, new.detach()
            case "state unchanged":
                return new, state
            case "output is the input":
                return input, new
            case "output is the state received":
                return state, new
            case "tree of outputs":
                return {"new": new, "old": (state, None)}, new
        return new, new


ODD = ["list", "none", "empty", "batch norm", "dropout", "detached state", "state unchanged", "output is the input"]
ODD += ["output is the state received", "tree of outputs"]


@pytest.mark.parametrize("length", [1, T])
@pytest.mark.parametrize("change", ODD)
def test_odd_but_legitimate_cells_are_unrolled_and_their_shares_add_up(change, length):
    rnn = ur.unroll(UserCell(change).double())
    inputs = torch.randn(B, I, length, dtype=F64).permute(2, 0, 1)  # not contiguous
    torch.manual_seed(1)
    want = rnn(inputs)
    torch.manual_seed(1)
    copies = ur.copies(rnn, inputs)
    assert rnn.cell.steps == 2 * length
    assert_match(copies.outputs, want[0])
    assert_match(copies.state, want[1])
    copies.backward(uneven_loss(copies.outputs, copies.state))
    assert_shares_add_up(rnn, copies)


def test_a_cell_that_holds_torch_nns_layer_has_shares_of_its_weights():
    rnn = ur.unroll(OneStepLayer().double())
    copies = ur.copies(rnn, torch.randn(T, B, I, dtype=F64))
    copies.backward(loss_of(copies))
    assert (copies.weight_grad_norm["layer.weight_hh_l0"][1:] > 0).all()
    assert_shares_add_up(rnn, copies)


# -- refusals --------------------------------------------------------------------------------------------------------


ASKED: dict[str, Callable[[ur.Copies], Any]] = {
    "weight_grad": lambda copies: copies.weight_grad["weight_hh"],
    "weight_grad_norm": lambda copies: copies.weight_grad_norm["weight_hh"],
    "initial_grad": lambda copies: copies.initial_grad["weight_hh"],
    "a copy's weight_grad": lambda copies: copies[0].weight_grad["weight_hh"],
    "state_grad": lambda copies: copies[0].state_grad,
    "total_state_grad": lambda copies: copies[0].total_state_grad,
    "input_grad": lambda copies: copies[0].input_grad,
    "output_grad": lambda copies: copies[0].output_grad,
}


@pytest.mark.parametrize("asked", ASKED)
def test_before_backward_there_are_no_gradients_and_the_error_says_what_to_call(asked):
    _, copies = run("LSTMCell")
    with pytest.raises(ur.GradientError, match=r"copies\.backward\(loss\)"):
        ASKED[asked](copies)


@pytest.mark.parametrize("asked", ["weight_grad", "weight_grad_norm", "a copy's weight_grad"])
def test_after_the_weights_changed_shares_are_refused_and_not_wrong(asked):
    rnn, copies = run("LSTMCell")
    copies.backward(loss_of(copies))
    torch.optim.SGD(rnn.parameters(), 0.1).step()
    with pytest.raises(ur.GradientError, match=r"optimizer\.step"):
        ASKED[asked](copies)


def test_after_the_weights_changed_another_backward_is_refused_and_leaves_grad_alone():
    rnn, copies = run("LSTMCell")
    loss = loss_of(copies)
    copies.backward(loss)
    torch.optim.SGD(rnn.parameters(), 0.1).step()
    rnn.zero_grad()
    with pytest.raises(ur.GradientError):
        copies.backward(loss)
    assert all(p.grad is None for p in rnn.parameters())


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda copies: copies.outputs, r"\[5, 2, 4\].*sum"),
        (lambda copies: copies.outputs.sum().detach(), "no gradient"),
        (lambda copies: 3.0, "no gradient"),
        (lambda copies: None, "no gradient"),
    ],
    ids=["not a scalar", "detached", "number", "None"],
)
def test_a_loss_that_cannot_be_differentiated_is_refused_and_nothing_changes(loss, said):
    rnn, copies = run("LSTMCell")
    with pytest.raises(ur.GradientError, match=said):
        copies.backward(loss(copies))
    assert all(p.grad is None for p in rnn.parameters())
    with pytest.raises(ur.GradientError, match=r"copies\.backward\(loss\)"):
        copies[0].state_grad  # noqa: B018


def test_a_loss_of_another_run_is_refused_and_not_answered_with_zeros():
    rnn, copies = run("LSTMCell")
    outputs, _ = rnn(torch.randn(T, B, I, dtype=F64))
    with pytest.raises(ur.GradientError):
        copies.backward(outputs.sum())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_copies_made_without_gradients_have_values_and_refuse_backward(mode):
    problem = PROBLEMS["LSTMCell"](F64)
    with mode():
        copies = ur.copies(problem.unrolled(), problem.inputs)
    assert_match(copies.outputs, problem.unrolled()(problem.inputs)[0])
    with pytest.raises(ur.GradientError, match="gradients enabled"):
        copies.backward(copies.outputs.sum())


@pytest.mark.parametrize("run", [ur.copies, lambda rnn, inputs, state: rnn(inputs, state)], ids=["copies", "call"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_a_cell_that_writes_into_its_state_in_place_is_refused(run, grad):
    rnn = ur.unroll(lambda x, h: (x, h.add_(x)))
    with torch.set_grad_enabled(grad), pytest.raises(ur.CellError, match=r"copy 0.*in ?place"):
        run(rnn, torch.ones(T, B, I), torch.zeros(B, I))


def test_looking_at_the_outputs_without_gradients_does_not_cut_them_off():
    rnn, copies = run("LSTMCell")
    with torch.no_grad():
        assert copies.outputs.isfinite().all()
    copies.backward(copies.outputs.sum())
    assert_shares_add_up(rnn, copies)


def test_inputs_made_in_inference_mode_can_be_looked_at_copy_by_copy():
    rnn = ur.unroll(ur.LSTMCell(I, H))
    with torch.inference_mode():
        inputs = torch.randn(T, B, I)
    copies = ur.copies(rnn, inputs.clone())
    assert len(copies) == T
    assert ur.copies(rnn, inputs).outputs.shape == (T, B, H)


@pytest.mark.parametrize("thing", [ur.LSTMCell(I, H), nn.LSTM(I, H), None], ids=["cell", "torch.nn", "None"])
def test_copies_of_what_is_not_unrolled_are_refused(thing):
    with pytest.raises(ur.OptionError, match=type(thing).__name__):
        ur.copies(thing, torch.randn(T, B, I))


# -- memory ----------------------------------------------------------------------------------------------------------


class LiveStorages(TorchDispatchMode):
    """Counts how many storages of one size are alive at most, while it is active, among those made meanwhile."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.nbytes, self.most, self.seen = nbytes, 0, {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() == self.nbytes:
                storage = StorageWeakRef(tensor.untyped_storage())
                self.seen[storage.cdata] = storage
        self.seen = {key: storage for key, storage in self.seen.items() if not storage.expired()}
        self.most = max(self.most, len(self.seen))
        return result


def most_alive(steps: int, ask: Callable[[ur.Copies], Any]) -> int:
    rnn = ur.unroll(ur.GRUCell(7, 11)).double()
    copies = ur.copies(rnn, torch.randn(steps, B, 7, dtype=F64))
    copies.backward(copies.outputs.square().sum())
    with LiveStorages(rnn.cell.weight_hh.numel() * 8) as live:
        ask(copies)
    return live.most


def test_norms_of_shares_hold_a_few_shares_at_a_time_however_long_the_sequence():
    counts = [most_alive(steps, lambda copies: copies.weight_grad_norm["weight_hh"]) for steps in (4, 16, 64)]
    assert counts[0] == counts[1] == counts[2]
    assert 1 <= counts[0] <= 4


def test_the_count_of_live_shares_sees_them_when_they_are_held():
    held = most_alive(16, lambda copies: [copy.weight_grad["weight_hh"] for copy in copies])
    assert held >= 16


def test_copies_that_nobody_holds_any_more_are_freed():
    rnn, inputs = ur.unroll(ur.LSTMCell(I, H)), torch.randn(T, B, I)

    def run_once() -> list[StorageWeakRef]:
        copies = ur.copies(rnn, inputs)
        copies.backward(copies.outputs.sum())
        return [StorageWeakRef(copy.output.untyped_storage()) for copy in copies]

    storages = run_once()
    gc.collect()
    assert [storage.expired() for storage in storages] == [True] * T


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_the_share_of_a_late_copy_costs_no_more_than_that_of_an_early_one():
    counts = {}
    for steps in (5, 50):
        copies = ur.copies(ur.unroll(ur.LSTMCell(I, H)), torch.randn(steps, B, I))
        copies.backward(copies.outputs.sum())
        for t in (0, steps // 2, steps - 1):
            with CountOperations() as operations:
                copies[t].weight_grad["weight_hh"]
            counts[steps, t] = operations.count
    assert max(counts.values()) - min(counts.values()) <= 3


class Cached(nn.Module):
    """Computes something from its weight in the first copy and uses it in the others."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(I, I, dtype=F64))
        self.first, self.calls, self.held = first, 0, None

    def initial_state(self, batch_size, device=None, dtype=None):
        self.calls = 0
        return torch.zeros(batch_size, I, device=device, dtype=dtype)

    def forward(self, input, state):
        if self.calls <= self.first:
            self.held = 2 * self.weight
        self.calls += 1
        state = torch.tanh(input + state @ self.held)
        return state, state


@pytest.mark.parametrize("first", [0, 1])
def test_a_weight_that_one_copy_computes_for_the_others_is_refused(first):
    with pytest.raises(ur.CellError, match=f"copy {first + 1} .*earlier copy"):
        ur.copies(ur.unroll(Cached(first)), torch.randn(T, B, I, dtype=F64))


def test_a_cached_parametrization_is_refused():
    cell = ur.RNNCell(I, H)
    nn.utils.parametrizations.weight_norm(cell, "weight_hh")
    with parametrize.cached(), pytest.raises(ur.CellError, match=r"copy 1 .*earlier copy"):
        ur.copies(ur.unroll(cell), torch.randn(T, B, I))


class Aliased(nn.Module):
    """Reads its weight through a list from copy 2 on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(I, I))
        self.beside = [self.weight]

    def forward(self, input, state):
        hidden, clock = state
        weight = self.beside[0] if int(clock[0]) >= 2 else self.weight
        hidden = torch.tanh(input + hidden @ weight)
        return hidden, (hidden, clock + 1)


def test_a_weight_read_by_another_name_is_refused_in_whatever_copy():
    state = torch.zeros(B, I), torch.zeros(B, dtype=torch.int64)
    with pytest.raises(ur.CellError, match=r"copy 2 .*reads weight"):
        ur.copies(ur.unroll(Aliased()), torch.randn(T, B, I), state)


class Attending(nn.Module):
    """Its context may come from its own projection."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(I, I)

    def initial_state(self, batch_size, device=None, dtype=None):
        return torch.zeros(batch_size, I, device=device, dtype=dtype)

    def forward(self, input, state, context):
        state = torch.tanh(self.key(input) + state * context)
        return state, state


def test_a_context_made_with_the_cells_own_weights_is_no_copys_share():
    cell = Attending().double()
    inputs, memory = torch.randn(T, B, I, dtype=F64), torch.randn(B, I, dtype=F64)
    copies = ur.copies(ur.unroll(cell), inputs, context=cell.key(memory))
    copies.backward(copies.outputs.sum())
    cell_grad = cell.key.weight.grad.clone()
    cell.zero_grad()
    context = cell.key(memory)
    outputs, _ = ur.unroll(cell, engine="reference")(inputs, context=context)
    (through_context,) = torch.autograd.grad(outputs.sum(), context, retain_graph=True)
    (beside,) = torch.autograd.grad(context, cell.key.weight, through_context)
    assert_match(copies.weight_grad["key.weight"].sum(0) + beside, cell_grad)


def test_a_backward_pass_that_a_hook_breaks_leaves_what_was_remembered():
    rnn, copies = run("GRUCell")
    copies.backward(loss_of(copies))
    before = copies[0].state_grad.clone()

    def broken(grad):
        raise ValueError("broken")

    handle = copies[1].output.register_hook(broken)
    with pytest.raises(ValueError, match="broken"):
        copies.backward(loss_of(copies))
    handle.remove()
    assert torch.equal(copies[0].state_grad, before)
    assert rnn is not None


def test_a_sparse_embedding_has_dense_shares():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, I, sparse=True)

        def initial_state(self, batch_size, device=None, dtype=None):
            return torch.zeros(batch_size, I)

        def forward(self, input, state):
            state = torch.tanh(self.embedding(input) + state)
            return state, state

    cell = Tokens()
    copies = ur.copies(ur.unroll(cell), torch.randint(7, (T, B)))
    copies.backward(copies.outputs.sum())
    assert_match(copies.weight_grad["embedding.weight"].sum(0), cell.embedding.weight.grad.to_dense())
    assert copies.weight_grad_norm["embedding.weight"].shape == (T,)
