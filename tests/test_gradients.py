"""Unrolled networks and layers under every way torch has of differentiating, transforming and moving a module."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.utils import parametrizations, parametrize

import unrolled as ur
from matching import assert_match
from problems import PROBLEMS, B, CountingCell, DelayCell, H, I, LinearCell, S, T, loop_by_hand, uneven_loss
from unrolled.trees import Tree, flatten, leaves, map_leaves, unflatten

F64 = torch.float64
CELLS = {"RNNCell": ur.RNNCell, "LSTMCell": ur.LSTMCell, "GRUCell": ur.GRUCell}
LAYERS = {"RNN": ur.RNN, "LSTM": ur.LSTM, "GRU": ur.GRU}

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{f"unrolled {name}": lambda cell=cell: ur.unroll(cell(I, H)).double() for name, cell in CELLS.items()},
    **{f"layer {name}": lambda layer=layer: layer(I, H).double() for name, layer in LAYERS.items()},
}


def floating(tree: Tree) -> list[Tensor]:
    return [leaf for leaf in leaves(tree) if leaf.is_floating_point()]


def own_state(problem) -> Tree:
    return problem.cell.initial_state(B, dtype=F64)


# -- values and gradients are those of the loop written by hand ------------------------------------------------------


@pytest.mark.parametrize("given", [False, True], ids=["own state", "given state"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_values_and_gradients_are_those_of_the_loop_written_by_hand(name, given):
    problem = PROBLEMS[name](F64)
    state = map_leaves(lambda x: x.detach().clone() + (x.is_floating_point() * 1), own_state(problem))
    asked = [*problem.cell.parameters()]
    if given:
        asked += [leaf.requires_grad_() for leaf in floating(state)]
    outputs, states = loop_by_hand(
        problem.cell, problem.inputs, state if given else own_state(problem), problem.context
    )
    want_outputs = map_leaves(lambda *steps: torch.stack(steps), *outputs)
    got_outputs, got_state = problem.unrolled()(problem.inputs, state if given else None, context=problem.context)
    assert_match(got_outputs, want_outputs)
    assert_match(got_state, states[-1])
    want = torch.autograd.grad(uneven_loss(want_outputs, states[-1]), asked, allow_unused=True)
    got = torch.autograd.grad(uneven_loss(got_outputs, got_state), asked, allow_unused=True)
    assert_match(got, want)


def as_function(problem, steps: int) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """A problem as a function of every floating tensor in it: inputs, initial state and parameters."""
    rnn, state = problem.unrolled(), own_state(problem)
    everything = (problem.inputs[:steps], state, dict(rnn.named_parameters()))
    tensors, structure = flatten(everything)

    def run(*asked: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(asked)
        given = unflatten(structure, [next(remaining) if x.is_floating_point() else x for x in tensors])
        inputs, state, weights = given
        return tuple(floating(list(functional_call(rnn, weights, (inputs, state), {"context": problem.context}))))

    return run, [x.detach().clone().requires_grad_() for x in tensors if x.is_floating_point()]


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradcheck_and_gradgradcheck_pass_on_every_cell(name):
    run, tensors = as_function(PROBLEMS[name](F64), steps=3)
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("name", CELLS)
def test_gradcheck_passes_entry_by_entry_on_the_built_in_cells(name):
    run, tensors = as_function(PROBLEMS[name](F64), steps=3)
    assert torch.autograd.gradcheck(run, tensors)


def test_a_gradient_penalty_trains_through_the_gradient_of_the_inputs():
    problem = PROBLEMS["LSTMCell"](F64)
    inputs = problem.inputs.requires_grad_()
    weights = list(problem.cell.parameters())

    def penalty(outputs: Tensor) -> tuple[Tensor, ...]:
        (by_inputs,) = torch.autograd.grad(uneven_loss(outputs), inputs, create_graph=True)
        return torch.autograd.grad(by_inputs.square().sum(), weights)

    want = penalty(torch.stack(loop_by_hand(problem.cell, inputs, own_state(problem))[0]))
    assert_match(penalty(problem.unrolled()(inputs)[0]), want)


# -- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 10, 50])
@pytest.mark.parametrize("w", [0.5, 1.0, 1.5, -0.9])
def test_gradients_of_a_linear_cell_are_powers_of_its_weight(w, steps):
    rnn = ur.unroll(LinearCell(torch.tensor(w, dtype=F64)))
    inputs = torch.zeros(steps, 1, 1, dtype=F64, requires_grad=True)
    start = torch.ones(1, 1, dtype=F64, requires_grad=True)
    _, last = rnn(inputs, start)
    last.sum().backward()
    assert_match(last, torch.full((1, 1), w**steps, dtype=F64), "h_T = w^T")
    assert_match(start.grad, torch.full((1, 1), w**steps, dtype=F64), "d h_T / d h_0 = w^T")
    assert_match(rnn.cell.weight.grad, torch.tensor(steps * w ** (steps - 1), dtype=F64), "d h_T / d w = T w^(T-1)")
    powers = torch.tensor([w ** (steps - 1 - t) for t in range(steps)], dtype=F64)
    assert_match(inputs.grad.flatten(), powers, "d h_T / d x_t = w^(T-1-t)")


def test_a_delay_hands_each_gradient_back_to_the_step_it_came_from():
    inputs = torch.randn(9, B, I, dtype=F64, requires_grad=True)
    outputs, state = ur.unroll(DelayCell(4, I))(inputs)
    assert torch.equal(outputs[4:], inputs[:5])
    assert torch.equal(outputs[:4], torch.zeros(4, B, I, dtype=F64))
    assert_match(state, tuple(inputs[5:]))
    outputs[6].sum().backward()
    assert inputs.grad.sum((1, 2)).tolist() == [0, 0, B * I, 0, 0, 0, 0, 0, 0]


def test_an_integer_leaf_counts_steps_and_has_no_part_in_the_gradient():
    cell = CountingCell(I).double()
    inputs = torch.randn(T, B, I, dtype=F64, requires_grad=True)
    _, state = ur.unroll(cell)(inputs)
    state.total.sum().backward()
    counts = torch.arange(1, T + 1, dtype=F64).view(T, 1, 1)
    assert state.count.tolist() == [T] * B
    assert_match(inputs.grad, (0.5 * counts).expand(T, B, I))
    assert_match(cell.rate.grad, (counts * inputs).sum((0, 1)))


# -- torch.func ------------------------------------------------------------------------------------------------------


def test_vmap_over_sequences_equals_the_batch():
    for name, make in NETWORKS.items():
        rnn, inputs = make(), torch.randn(T, B, I, dtype=F64)
        one_by_one = vmap(lambda x, rnn=rnn: rnn(x.unsqueeze(1))[0].squeeze(1), in_dims=1, out_dims=1)(inputs)
        assert_match(one_by_one, rnn(inputs)[0], name)


@pytest.mark.parametrize("name", NETWORKS)
def test_vmap_over_an_ensemble_of_weights_equals_one_network_at_a_time(name):
    networks = [NETWORKS[name]() for _ in range(3)]
    inputs = torch.randn(T, B, I, dtype=F64)
    weights, buffers = torch.func.stack_module_state(networks)
    got = vmap(lambda w, b: functional_call(networks[0], (w, b), (inputs,))[0])(weights, buffers)
    assert_match(got, torch.stack([network(inputs)[0] for network in networks]))


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_per_sequence_by_vmap_of_grad_add_up_to_the_gradient_of_the_batch(name):
    rnn, inputs = NETWORKS[name](), torch.randn(T, B, I, dtype=F64)
    weights = {key: parameter.detach() for key, parameter in rnn.named_parameters()}

    def loss(weights: dict[str, Tensor], sequence: Tensor) -> Tensor:
        return functional_call(rnn, weights, (sequence.unsqueeze(1),))[0].square().sum()

    each = vmap(grad(loss), in_dims=(None, 1))(weights, inputs)
    rnn(inputs)[0].square().sum().backward()
    assert each["weight_hh_l0" if "layer" in name else "cell.weight_hh"].shape[0] == B
    assert_match({k: g.sum(0) for k, g in each.items()}, {k: p.grad for k, p in rnn.named_parameters()})


# torch's forward mode loads its decompositions through its own torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is:DeprecationWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_jvp_and_vjp_are_adjoint(name):
    rnn, inputs = NETWORKS[name](), torch.randn(T, B, I, dtype=F64)
    weights = {key: parameter.detach() for key, parameter in rnn.named_parameters()}

    def run(weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return functional_call(rnn, weights, (inputs,))[0]

    tangents = map_leaves(torch.randn_like, (weights, inputs))
    outputs, pushed = jvp(run, (weights, inputs), tangents)
    cotangent = torch.randn_like(outputs)
    _, pull = vjp(run, weights, inputs)
    inner = sum((g * v).sum() for g, v in zip(leaves(list(pull(cotangent))), leaves(list(tangents)), strict=True))
    assert_match(outputs, rnn(inputs)[0])
    assert_match((cotangent * pushed).sum(), inner)


@pytest.mark.parametrize("name", NETWORKS)
def test_functional_call_runs_on_the_weights_it_is_given_and_restores_the_own(name):
    rnn, other, inputs = NETWORKS[name](), NETWORKS[name](), torch.randn(T, B, I, dtype=F64)
    before = rnn(inputs)[0]
    swapped = functional_call(rnn, dict(other.named_parameters()), (inputs,))[0]
    assert_match(swapped, other(inputs)[0])
    assert_match(rnn(inputs)[0], before)
    swapped.sum().backward()
    assert all(p.grad is None for p in rnn.parameters())
    assert all(p.grad is not None for p in other.parameters())


# -- parametrize -----------------------------------------------------------------------------------------------------


class Skew(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - 0.5 * weight.flip(0)


PARAMETRIZATIONS: dict[str, Callable[[nn.Module, str], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda module, name: parametrize.register_parametrization(module, name, Skew()),
}


@pytest.mark.parametrize("how", PARAMETRIZATIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_parametrized_weights_are_used_and_trained_through_their_originals(name, how):
    rnn, plain, inputs = NETWORKS[name](), NETWORKS[name](), torch.randn(T, B, I, dtype=F64)
    rnn(inputs)
    module, weight, path = (
        (rnn, "weight_hh_l0", "weight_hh_l0") if "layer" in name else (rnn.cell, "weight_hh", "cell.weight_hh")
    )
    PARAMETRIZATIONS[how](module, weight)
    originals = [p for key, p in rnn.named_parameters() if "parametrizations" in key]
    weights = {key: p for key, p in rnn.named_parameters() if "parametrizations" not in key}
    want = functional_call(plain, weights | {path: getattr(module, weight)}, (inputs,))[0]
    got = rnn(inputs)[0]
    assert_match(got, want)
    assert_match(torch.autograd.grad(uneven_loss(got), originals), torch.autograd.grad(uneven_loss(want), originals))


# -- precision and modes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(PROBLEMS) - {"counting"}))
def test_pure_bfloat16_is_near_float64_and_stays_bfloat16(name):
    problem = PROBLEMS[name](torch.bfloat16)
    got = problem.unrolled()(problem.inputs, context=problem.context)
    assert {leaf.dtype for leaf in leaves(list(got))} == {torch.bfloat16}
    wide = map_leaves(lambda x: x.double() if x.is_floating_point() else x, list(problem[1:]))
    want = ur.unroll(copy.deepcopy(problem.cell).double())(wide[0], context=wide[1])
    assert_match(map_leaves(Tensor.double, got), want, bound=0.05)


# relu's slope jumps where rounding to bfloat16 moves an entry across zero: no bound on its gradient has a meaning.
@pytest.mark.parametrize("name", sorted(set(PROBLEMS) - {"counting", "RNNCell relu"}))
def test_autocast_to_bfloat16_is_near_float32_in_values_and_gradients(name):
    problem = PROBLEMS[name](torch.float32)
    rnn = problem.unrolled()
    answers = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            first, state = rnn(problem.inputs, context=problem.context)
            second, _ = rnn(problem.inputs, state, context=problem.context)
        loss = uneven_loss(first, second)
        grads = torch.autograd.grad(loss, list(rnn.parameters()))
        answers.append((map_leaves(Tensor.float, (first, second)), grads))
    assert_match(*answers, bound=0.1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", PROBLEMS)
def test_modes_without_gradients_give_the_same_values_and_no_graph(name, mode):
    problem = PROBLEMS[name](F64)
    rnn = problem.unrolled()
    want = rnn(problem.inputs, context=problem.context)
    with mode():
        got = rnn(problem.inputs, context=problem.context)
    assert not any(leaf.requires_grad for leaf in leaves(list(got)))
    assert_match(got, want)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_reach_a_carried_state_across_windows(name):
    rnn, inputs = NETWORKS[name](), torch.randn(8, B, I, dtype=F64, requires_grad=True)
    whole, last = rnn(inputs)
    first, carried = rnn(inputs[:3])
    second, end = rnn(inputs[3:], carried)
    assert_match(torch.cat([first, second]), whole)
    assert_match(end, last)
    want = torch.autograd.grad(uneven_loss(whole[-1]), [inputs, *rnn.parameters()])
    assert_match(torch.autograd.grad(uneven_loss(second[-1]), [inputs, *rnn.parameters()]), want)
    detached = rnn(inputs[3:], map_leaves(Tensor.detach, carried))[0]
    (cut,) = torch.autograd.grad(uneven_loss(detached[-1]), [inputs])
    assert cut[:3].abs().max() == 0
    assert cut[3:].abs().max() > 0


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_batch_first_is_the_same_network_with_its_sequences_transposed(name, batch_first):
    problem = PROBLEMS[name](F64)
    outputs, state = problem.unrolled()(problem.inputs, context=problem.context)
    swapped, same = problem.unrolled(batch_first=True)(problem.inputs.transpose(0, 1), context=problem.context)
    assert_match(map_leaves(lambda x: x.transpose(0, 1), swapped), outputs)
    assert_match(same, state)


# -- as a module among modules ---------------------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.encoder, self.rnn, self.head = nn.Linear(2, I), rnn, nn.Linear(H, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.rnn(self.encoder(inputs))[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_inside_another_module_everything_upstream_and_downstream_is_trained(name):
    model, inputs = Tagger(NETWORKS[name]()).double(), torch.randn(T, B, 2, dtype=F64)
    model(inputs).square().sum().backward()
    norms = {key: parameter.grad.norm().item() for key, parameter in model.named_parameters()}
    assert min(norms.values()) > 0
    assert {key.split(".")[0] for key in norms} == {"encoder", "rnn", "head"}
    assert len(norms) == 2 + 4 + 2, "each parameter is listed once"


COPIERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@pytest.mark.parametrize("how", COPIERS)
@pytest.mark.parametrize("name", [*NETWORKS, "unrolled torch.nn.LSTMCell", "unrolled torch.nn.GRUCell"])
def test_a_copied_or_pickled_network_computes_the_same_with_weights_of_its_own(name, how):
    make = NETWORKS.get(name) or (lambda: ur.unroll(getattr(nn, name.split(".")[-1])(I, H)).double())
    rnn, inputs = make(), torch.randn(T, B, I, dtype=F64)
    before = rnn(inputs)[0]
    made = COPIERS[how](rnn)
    assert_match(made(inputs)[0], before)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert_match(rnn(inputs)[0], before)
    assert not torch.equal(made(inputs)[0], before)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_dict_moves_to_a_network_that_has_already_run(name):
    rnn, other, inputs = NETWORKS[name](), NETWORKS[name](), torch.randn(T, B, I, dtype=F64)
    other(inputs)
    other.load_state_dict(rnn.state_dict())
    assert_match(other(inputs)[0], rnn(inputs)[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_shallow_copy_shares_weights_and_options_are_read_from_the_copy(name):
    rnn, inputs = NETWORKS[name](), torch.randn(T, T, I, dtype=F64)
    rnn(inputs)
    made = copy.copy(rnn)
    made.batch_first = True
    assert_match(made(inputs)[0], rnn(inputs.transpose(0, 1))[0].transpose(0, 1))


@pytest.mark.parametrize("name", LAYERS)
def test_replicas_as_data_parallel_makes_them_read_their_own_weights(name):
    layer, other, inputs = LAYERS[name](I, H), LAYERS[name](I, H), torch.randn(T, B, I)
    layer(inputs)
    replica = layer._replicate_for_data_parallel()
    for key, parameter in other.named_parameters():
        setattr(replica, key, parameter * 1)  # a replica holds plain tensors, not parameters
    assert_match(replica(inputs)[0], other(inputs)[0])
    replica(inputs)[0].sum().backward()
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert all(parameter.grad is not None for parameter in other.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_moved_to_another_dtype_after_a_run_runs_in_it(name):
    rnn, inputs = NETWORKS[name](), torch.randn(T, B, I)
    rnn(inputs.double())
    assert rnn.float()(inputs)[0].dtype == torch.float32


# -- pytrees ---------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclasses.dataclass
class Frame:
    left: Tensor
    right: Tensor


SHAPES: dict[str, tuple[Callable[[Tensor, Tensor], Tree], Callable[[Tree], tuple[Tensor, Tensor]]]] = {
    "dict": (lambda a, b: {"a": a, "b": b}, lambda x: (x["a"], x["b"])),
    "tuple": (lambda a, b: (a, b), lambda x: x),
    "list": (lambda a, b: [a, b], lambda x: tuple(x)),
    "named tuple": (Pair, lambda x: (x.left, x.right)),
    "dataclass": (Frame, lambda x: (x.left, x.right)),
    "nested": (lambda a, b: {"a": [a, None], "c": {"b": (b,)}}, lambda x: (x["a"][0], x["c"]["b"][0])),
}


class TreeCell(nn.Module):
    """Takes, keeps and gives two tensors in a tree of some kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.wrap, self.unwrap = SHAPES[kind]
        self.weight = nn.Parameter(torch.randn(I, I))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tree:
        zeros = torch.zeros(batch_size, I, device=device, dtype=dtype)
        return self.wrap(zeros, zeros)

    def forward(self, input: Tree, state: Tree) -> tuple[Tree, Tree]:
        assert type(input) is type(state)
        (a, b), (h, k) = self.unwrap(input), self.unwrap(state)
        h, k = torch.tanh(a + k @ self.weight), torch.tanh(b - h @ self.weight)
        return self.wrap(k, h), self.wrap(h, k)


@pytest.mark.parametrize("kind", SHAPES)
def test_inputs_outputs_and_states_may_be_trees_of_any_kind(kind):
    plain, cell = TreeCell("tuple").double(), TreeCell(kind).double()
    cell.load_state_dict(plain.state_dict())
    wrap, unwrap = SHAPES[kind]
    a, b = torch.randn(2, T, B, I, dtype=F64, requires_grad=True).unbind()
    want_outputs, want_state = ur.unroll(plain)((a, b))
    outputs, state = ur.unroll(cell)(wrap(a, b))
    assert_match(unwrap(outputs), want_outputs)
    assert_match(unwrap(state), want_state)
    assert type(outputs) is type(state) is type(wrap(a, b))
    want = torch.autograd.grad(uneven_loss(want_outputs, want_state), [a, b, plain.weight])
    assert_match(torch.autograd.grad(uneven_loss(*unwrap(outputs), *unwrap(state)), [a, b, cell.weight]), want)


def test_a_context_is_the_same_at_every_step_and_gets_its_gradient_from_all():
    problem = PROBLEMS["attending"](F64)
    context = problem.context.requires_grad_()
    assert context.shape == (B, S, H)
    outputs, _ = problem.unrolled()(problem.inputs, context=context)
    by_hand = torch.stack(loop_by_hand(problem.cell, problem.inputs, own_state(problem), context)[0])
    assert_match(
        torch.autograd.grad(uneven_loss(outputs), [context]), torch.autograd.grad(uneven_loss(by_hand), [context])
    )


@pytest.mark.parametrize("engine", ["reference", "eager", "native"])
@pytest.mark.parametrize("given", [{}, {"lengths": [6, 3, 1]}, {"resets": torch.arange(18).view(6, 3) % 5 == 4}])
@pytest.mark.parametrize("cell", [ur.GRUCell, ur.LSTMCell, ur.LayerNormLSTMCell])
def test_a_gradient_by_the_returned_state_is_that_of_its_own_uses(cell, given, engine):
    """The last state is no part of the outputs: what a caller hangs on it sees what the caller made of it alone."""
    outputs, state = ur.unroll(cell(3, 4), engine=engine)(torch.randn(6, 3, 3), **given)
    hidden = state[0] if isinstance(state, tuple) else state
    hidden.retain_grad()
    (outputs.sum() + 2 * hidden.sum()).backward()
    assert torch.equal(hidden.grad, torch.full_like(hidden, 2.0))
