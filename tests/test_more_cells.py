"""Peephole, layer-norm, minimal-GRU and xLSTM cells: their papers' formulas, every engine, and extreme numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import unrolled as ur
from matching import assert_match
from problems import B, H, I, T, uneven_loss
from unrolled.cells import LayerNormLSTMCell, MinGRUCell, PeepholeLSTMCell, SLSTMCell, SLSTMState
from unrolled.errors import InputError, OptionError
from unrolled.networks.unroll import ENGINES
from unrolled.trees import Tree, flatten, leaves, map_leaves, unflatten

F64 = torch.float64

KINDS: dict[str, Callable[..., nn.Module]] = {
    "PeepholeLSTMCell": PeepholeLSTMCell,
    "LayerNormLSTMCell": LayerNormLSTMCell,
    "MinGRUCell": MinGRUCell,
    "SLSTMCell sigmoid": SLSTMCell,
    "SLSTMCell exponential": lambda *sizes, **options: SLSTMCell(*sizes, forget_gate="exponential", **options),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without bias": {"bias": False},
    "learned start": {"learn_initial_state": True},
}
CASES = [f"{kind}, {options}" for kind in KINDS for options in OPTIONS]


def make(case: str, input_size: int = I, hidden_size: int = H) -> nn.Module:
    """A float64 cell whose every parameter is random, those that start at zero or one included."""
    kind, options = case.split(", ")
    cell = KINDS[kind](input_size, hidden_size, **OPTIONS[options], dtype=F64)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return cell


def engine_problem(case: str, given: bool) -> tuple[nn.Module, Tensor, Tree]:
    """A cell, inputs, and a state: what two steps leave behind, or None for the cell's own."""
    cell, inputs = make(case), torch.randn(T, B, I, dtype=F64, requires_grad=True)
    state = ur.unroll(cell, engine="reference")(torch.randn(2, B, I, dtype=F64))[1] if given else None
    return cell, inputs, map_leaves(lambda x: x.detach().requires_grad_(), state) if given else None


# -- the papers' formulas, in numpy, gate by gate and row by row -----------------------------------------------------


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class Parts:
    """A cell's parameters as numpy arrays, cut into one block per gate."""

    def __init__(self, cell: nn.Module, gates: str) -> None:
        self.all = {name: parameter.detach().numpy() for name, parameter in cell.named_parameters()}
        self.gates = gates

    def __getitem__(self, name: str) -> Any:
        return self.all.get(name, 0.0)

    def block(self, name: str, gate: str) -> Any:
        whole, k = self[name], self.gates.index(gate)
        return whole[k * H : (k + 1) * H] if name in self.all else 0.0

    def gate(self, gate: str, x: np.ndarray, h: np.ndarray) -> np.ndarray:
        by_input = self.block("weight_ih", gate) @ x + self.block("bias_ih", gate)
        return by_input + self.block("weight_hh", gate) @ h + self.block("bias_hh", gate)


def peephole_step(cell: nn.Module, x: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, ...]:
    p = Parts(cell, "ifgo")
    i = sigmoid(p.gate("i", x, h) + np.diag(p["weight_ci"]) @ c)
    f = sigmoid(p.gate("f", x, h) + np.diag(p["weight_cf"]) @ c)
    new = f * c + i * np.tanh(p.gate("g", x, h))
    o = sigmoid(p.gate("o", x, h) + np.diag(p["weight_co"]) @ new)
    return o * np.tanh(new), new


def normalised(a: np.ndarray, gain: np.ndarray, bias: Any, eps: float = 1e-5) -> np.ndarray:
    mean = sum(a) / len(a)
    variance = sum((entry - mean) ** 2 for entry in a) / len(a)
    return gain * (a - mean) / np.sqrt(variance + eps) + bias


def layer_norm_step(cell: nn.Module, x: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, ...]:
    p = Parts(cell, "ifgo")
    by_input = normalised(p["weight_ih"] @ x, p["gain_ih"], p["bias_ih"])
    by_hidden = normalised(p["weight_hh"] @ h, p["gain_hh"], p["bias_hh"])
    i, f, g, o = np.split(by_input + by_hidden, 4)
    new = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(normalised(new, p["gain_c"], p["bias_c"])), new


def min_gru_step(cell: nn.Module, x: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, ...]:
    p = Parts(cell, "zn")
    z = sigmoid(p.block("weight_ih", "z") @ x + p.block("bias_ih", "z"))
    return (h - z * h + z * (p.block("weight_ih", "n") @ x + p.block("bias_ih", "n")),)


def slstm_step(
    cell: nn.Module, x: np.ndarray, h: np.ndarray, c: np.ndarray, n: np.ndarray, m: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Without the stabiliser: the m that comes in is multiplied out, and the m that is handed on is zero."""
    p = Parts(cell, "ifzo")
    forget = np.exp if cell.forget_gate == "exponential" else sigmoid
    kept, taken = forget(p.gate("f", x, h)) * np.exp(m), np.exp(p.gate("i", x, h))
    memory, normaliser = kept * c + taken * np.tanh(p.gate("z", x, h)), kept * n + taken
    return sigmoid(p.gate("o", x, h)) * memory / normaliser, memory, normaliser, np.zeros(H)


STEPS = {
    "PeepholeLSTMCell": peephole_step,
    "LayerNormLSTMCell": layer_norm_step,
    "MinGRUCell": min_gru_step,
    "SLSTMCell": slstm_step,
}


def by_formula(cell: nn.Module, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs `[T, B, H]` and the last state's tensors, one row of the batch after the other."""
    step, rows = STEPS[type(cell).__name__], []
    start = [leaf.detach().numpy() for leaf in leaves(cell.initial_state(B, dtype=F64))]
    for b in range(B):
        state, outputs = tuple(leaf[b] for leaf in start), []
        for x in inputs[:, b].detach().numpy():
            state = step(cell, x, *state)
            outputs.append(state[0])
        rows.append((np.stack(outputs), *state))
    outputs, *state = (torch.from_numpy(np.stack(parts)) for parts in zip(*rows, strict=True))
    return outputs.transpose(0, 1), state


@pytest.mark.parametrize("case", CASES)
def test_a_cell_is_its_papers_formula(case):
    cell, inputs = make(case), torch.randn(T, B, I, dtype=F64)
    want_outputs, want_state = by_formula(cell, inputs)
    outputs, state = ur.unroll(cell, engine="reference")(inputs)
    if isinstance(state, SLSTMState):
        scale = torch.exp(state.m)
        state = (state.h, state.c * scale, state.n * scale, torch.zeros_like(scale))
    assert_match(outputs, want_outputs, "outputs", bound=1e-12)
    assert_match(list(leaves(state)), want_state, "state", bound=1e-12)


def test_the_first_copy_of_an_slstm_stores_its_input_whole():
    """Where n is zero the authors' code takes m' = i, and with it c' / n' = z."""
    cell, x = make("SLSTMCell sigmoid, plain"), torch.randn(B, I, dtype=F64)
    i, _, z, o = torch.nn.functional.linear(x, cell.weight_ih, cell.bias_ih + cell.bias_hh).chunk(4, dim=-1)
    output, state = cell(x, cell.initial_state(B, dtype=F64))
    assert_match(state.m, i)
    assert_match(state.n, torch.ones(B, H, dtype=F64))
    assert_match(output, torch.sigmoid(o) * torch.tanh(z))


def test_any_positive_normaliser_is_one_at_another_stabiliser():
    """Why a learned start needs no n of its own."""
    cell, inputs = make("SLSTMCell sigmoid, plain"), torch.randn(T, B, I, dtype=F64)
    h, c, n, m = torch.randn(B, H, dtype=F64), torch.randn(B, H, dtype=F64), torch.rand(B, H, dtype=F64) + 0.1, 0.7
    m = torch.full((B, H), m, dtype=F64)
    rnn = ur.unroll(cell, engine="reference")
    one = SLSTMState(h, c / n, torch.ones_like(n), m + n.log())
    assert_match(rnn(inputs, one)[0], rnn(inputs, SLSTMState(h, c, n, m))[0])


# -- gradients -------------------------------------------------------------------------------------------------------


def as_function(cell: nn.Module, inputs: Tensor, state: Tree) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """A run as a function of the inputs, the state passed (if any) and every parameter."""
    rnn = ur.unroll(cell, engine="reference")
    tensors, structure = flatten((inputs, state, dict(rnn.named_parameters())))

    def run(*asked: Tensor) -> tuple[Tensor, ...]:
        inputs, state, weights = unflatten(structure, list(asked))
        return tuple(leaves(list(functional_call(rnn, weights, (inputs, state)))))

    return run, [x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("given", [False, True], ids=["own state", "given state"])
@pytest.mark.parametrize("case", CASES)
def test_gradcheck_and_gradgradcheck_pass(case, given):
    cell, inputs, state = engine_problem(case, given)
    run, tensors = as_function(cell, inputs[:3], state)
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("given", [False, True], ids=["own state", "given state"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_every_engine_gives_the_references_values_and_gradients(case, engine, given):
    cell, inputs, state = engine_problem(case, given)
    asked = [inputs, *cell.parameters(), *(leaves(state) if given else [])]

    def run(engine: str) -> tuple[Tree, Tree]:
        outputs, last = ur.unroll(cell, engine=engine)(inputs, state)
        return (outputs, last), torch.autograd.grad(uneven_loss(outputs, last), asked, allow_unused=True)

    (got, got_grads), (want, want_grads) = run(engine), run("reference")
    assert_match(got, want, "values", bound=1e-10)
    assert_match(got_grads, want_grads, "gradients", bound=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_trains_its_learned_initial_state_from_the_start(kind, engine):
    cell = KINDS[kind](I, H, learn_initial_state=True, dtype=F64)
    learned = {name: p for name, p in cell.named_parameters() if name.startswith("initial_")}
    outputs, _ = ur.unroll(cell, engine=engine)(torch.randn(T, B, I, dtype=F64))
    uneven_loss(outputs).backward()
    assert learned
    for name, parameter in learned.items():
        assert not parameter.detach().any(), name
        assert parameter.grad.abs().min() > 0, name


# -- extreme numbers and sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [1e3, 1e6, 1e15])
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exponential"])
@pytest.mark.parametrize("learned", [False, True])
def test_an_slstm_with_huge_preactivations_has_finite_values_and_gradients(forget_gate, scale, dtype, engine, learned):
    cell = SLSTMCell(I, H, forget_gate=forget_gate, learn_initial_state=learned, dtype=dtype)
    inputs = (scale * torch.randn(20, B, I, dtype=dtype)).requires_grad_()
    outputs, state = ur.unroll(cell, engine=engine)(inputs)
    grads = torch.autograd.grad(outputs.sum(), [inputs, *cell.parameters()])
    assert all(x.isfinite().all() for x in (outputs, *state, *grads))
    assert outputs.abs().max() <= 1, "a gated average of numbers between -1 and 1"
    assert state.n.min() >= 1


@pytest.mark.parametrize("gate", [-1e5, 1e5])
def test_an_slstm_whose_input_gates_are_all_shut_or_open_is_an_average(gate):
    """However small the input gates are, the average is of what came in: nothing is 0 / 0."""
    cell = SLSTMCell(I, H, dtype=torch.float32)
    with torch.no_grad():
        cell.bias_ih[:H] += gate
    outputs, state = ur.unroll(cell, engine="reference")(torch.randn(T, B, I))
    assert outputs.isfinite().all()
    assert outputs.abs().min() > 0
    assert all(x.isfinite().all() for x in state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_the_initial_state_of_an_slstm_is_finite_in_every_dtype(dtype):
    state = SLSTMCell(I, H, dtype=dtype).initial_state(B)
    assert all(x.isfinite().all() and x.dtype == dtype and x.shape == (B, H) for x in state)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_a_single_feature_is_defined(case, engine):
    cell, inputs = make(case, 1, 1), torch.randn(T, B, 1, dtype=F64, requires_grad=True)
    outputs, state = ur.unroll(cell, engine=engine)(inputs)
    grads = torch.autograd.grad(outputs.sum(), [inputs, *cell.parameters()])
    assert all(x.isfinite().all() for x in (outputs, *leaves(state), *grads))


def test_the_memory_of_a_layer_norm_cell_with_one_feature_normalises_to_its_bias():
    cell = make("LayerNormLSTMCell, plain", 2, 1)
    output, (h, c) = cell(torch.randn(B, 2, dtype=F64), cell.initial_state(B))
    assert output is h
    assert c.abs().min() > 0
    gate = output / torch.tanh(cell.bias_c)
    assert 0 < gate.min() <= gate.max() < 1


# -- as modules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_the_same_numbers_to_a_new_cell_and_to_a_reset_one(kind):
    torch.manual_seed(3)
    cell = KINDS[kind](I, H, learn_initial_state=True)
    made = copy.deepcopy(cell.state_dict())
    for parameter in cell.parameters():
        nn.init.constant_(parameter, 9.0)
    torch.manual_seed(3)
    cell.reset_parameters()
    assert_match(dict(cell.state_dict()), dict(made))


@pytest.mark.parametrize("kind", ["PeepholeLSTMCell", "SLSTMCell sigmoid"])
def test_weights_are_drawn_as_those_of_the_lstm_cell(kind):
    torch.manual_seed(3)
    drawn = dict(KINDS[kind](I, H).named_parameters())
    torch.manual_seed(3)
    for name, parameter in ur.LSTMCell(I, H).named_parameters():
        assert torch.equal(drawn[name], parameter)
    assert all(0 < parameter.abs().max() <= H**-0.5 for parameter in drawn.values())


def test_a_min_gru_is_drawn_as_the_linear_layer_it_is():
    torch.manual_seed(3)
    cell = MinGRUCell(I, H)
    torch.manual_seed(3)
    linear = nn.Linear(I, 2 * H)
    assert_match([cell.weight_ih, cell.bias_ih], [linear.weight, linear.bias])


def test_a_layer_norm_cell_starts_with_gains_of_one_and_biases_of_zero():
    cell = LayerNormLSTMCell(I, H, learn_initial_state=True)
    for name, parameter in cell.named_parameters():
        if not name.startswith("weight_"):
            assert (parameter == float(name.startswith("gain_"))).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_bad_sizes_and_inputs_are_refused(kind):
    for sizes, name in [((0, 4), "input_size"), ((3, -1), "hidden_size"), ((3, 4.0), "hidden_size")]:
        with pytest.raises(OptionError, match=f"{name} must be a positive integer"):
            KINDS[kind](*sizes)
    cell = KINDS[kind](I, H)
    for shape in [(B, I + 1), (I,), (1, B, I)]:
        with pytest.raises(InputError, match=rf"\[B, I\] with I = {I}"):
            cell(torch.zeros(shape), cell.initial_state(B))


@pytest.mark.parametrize("eps", [0, -1e-5, float("nan"), float("inf"), True, "1e-5"])
def test_a_bad_eps_is_refused(eps):
    with pytest.raises(OptionError, match="eps must be a number above zero"):
        LayerNormLSTMCell(I, H, eps=eps)


def test_an_unknown_forget_gate_is_refused():
    with pytest.raises(OptionError, match="forget_gate must be one of sigmoid, exponential, got 'relu'"):
        SLSTMCell(I, H, forget_gate="relu")


@pytest.mark.parametrize("kind", KINDS)
def test_device_and_dtype_are_those_asked_for(kind):
    cell = KINDS[kind](I, H, learn_initial_state=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in cell.parameters()} == {("meta", torch.bfloat16)}
    state = KINDS[kind](I, H).initial_state(B, torch.device("meta"), F64)
    assert {(x.device.type, x.dtype, x.shape) for x in leaves(state)} == {("meta", F64, (B, H))}


@pytest.mark.parametrize("case", CASES)
def test_a_pickled_cell_computes_the_same(case):
    cell, inputs = make(case), torch.randn(T, B, I, dtype=F64)
    other = pickle.loads(pickle.dumps(cell))
    assert_match(ur.unroll(other)(inputs), ur.unroll(cell)(inputs))


def test_a_cell_prints_the_options_that_differ():
    assert repr(PeepholeLSTMCell(3, 4, bias=False)) == "PeepholeLSTMCell(3, 4, bias=False)"
    assert repr(LayerNormLSTMCell(3, 4, eps=0.1)) == "LayerNormLSTMCell(3, 4, eps=0.1)"
    assert repr(MinGRUCell(3, 4, learn_initial_state=True)) == "MinGRUCell(3, 4, learn_initial_state=True)"
    assert repr(SLSTMCell(3, 4, forget_gate="exponential")) == "SLSTMCell(3, 4, forget_gate=exponential)"


class HeadedGRUCell(ur.GRUCell):
    """A subclass whose output is not its hidden state, and which says so."""

    def __init__(self) -> None:
        super().__init__(I, H)
        self.output_size = 2
        self.head = torch.nn.Linear(H, 2)

    def forward(self, input, state):
        output, state = super().forward(input, state)
        return self.head(output), state


def test_a_subclass_may_say_that_its_output_has_another_size():
    rnn = ur.stack([HeadedGRUCell(), ur.GRUCell(2, H)])
    assert rnn(torch.randn(T, B, I))[0].shape == (T, B, H)
    with pytest.raises(OptionError, match="gives out 2; make its input_size 2"):
        ur.stack([HeadedGRUCell(), ur.GRUCell(H, H)])
