"""Whoever calls a network, traces it or looks on: the reference's numbers, or one clear error before work starts."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import unrolled as ur
from matching import assert_match

T, B, I, H = 5, 3, 3, 4
F64 = torch.float64

NETWORKS: dict[str, Callable[[str], nn.Module]] = {
    "unrolled": lambda engine: ur.unroll(ur.LSTMCell(I, H), engine=engine),
    "lengths": lambda engine: ur.unroll(ur.GRUCell(I, H), engine=engine),
    "horizon": lambda engine: ur.unroll(ur.GRUCell(I, H), engine=engine, horizon=2),
    "stack": lambda engine: ur.stack([ur.GRUCell(I, H), ur.LSTMCell(H, H)], engine=engine),
}


def call(name: str, rnn: nn.Module, x: Tensor) -> Tensor:
    return rnn(x, lengths=[5, 3, 2])[0] if name == "lengths" else rnn(x)[0]


# -- who looks on ----------------------------------------------------------------------------------------------------


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _counted(mode: Any, run: Callable[[], object]) -> int:
    with mode:
        run()
    return mode.count


def _packed(run: Callable[[], object]) -> int:
    count = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return count


LOOKING_ON: dict[str, Callable[[Callable[[], object]], int]] = {
    "dispatch mode": lambda run: _counted(Dispatched(), run),
    "function mode": lambda run: _counted(Called(), run),
    "hooks on saved tensors": _packed,
}


@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("looking_on", LOOKING_ON)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_first_call_shows_what_every_call_shows(name, looking_on, engine):
    rnn, x = NETWORKS[name](engine), torch.randn(T, B, I)
    seen = [LOOKING_ON[looking_on](lambda: call(name, rnn, x)) for _ in range(3)]
    assert seen[0] == seen[1] == seen[2] > 0


@pytest.mark.parametrize("lengths", [None, [5, 3, 2]])
def test_flops_are_the_same_whatever_the_engine(lengths):
    found = set()
    for engine in ("reference", "eager", "native"):
        rnn, x = ur.unroll(ur.LSTMCell(8, 8), engine=engine), torch.randn(T, B, 8)
        with FlopCounterMode(display=False) as counter:
            rnn(x, lengths=lengths)
        found.add(counter.get_total_flops())
    assert len(found) == 1


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "lengths"])
def test_what_is_traced_with_real_tensors_computes_with_what_it_is_given(name):
    rnn = NETWORKS[name]("auto")
    x, y = torch.randn(2, T, B, I)
    call(name, rnn, x)
    with torch.no_grad():
        traced = make_fx(lambda v: call(name, rnn, v))(x)
    assert_match(traced(y), call(name, rnn, y))


def test_anomaly_mode_keeps_the_engine():
    rnn = ur.unroll(ur.LSTMCell(I, H))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        anomaly = torch.autograd.detect_anomaly(check_nan=True)
    with anomaly:
        rnn(torch.randn(T, B, I))[0].sum().backward()
    assert rnn.ran == "native"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_first_call_inside_of_a_checkpoint(name, reentrant):
    rnn, x = NETWORKS[name]("auto").double(), torch.randn(T, B, I, dtype=F64, requires_grad=True)
    outputs = checkpoint(lambda v: call(name, rnn, v), x, use_reentrant=reentrant)
    got = torch.autograd.grad(outputs.square().sum(), x) if not reentrant else None
    if reentrant:
        outputs.square().sum().backward()
        got = (x.grad.clone(),)
    want = torch.autograd.grad(call(name, rnn, x).square().sum(), x)
    assert_match(got, want)


# -- many gradients at once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["reference", "eager", "native"])
@pytest.mark.parametrize("name", NETWORKS)
def test_vectorised_jacobians_are_those_taken_row_by_row(name, engine):
    rnn, x = NETWORKS[name](engine).double(), torch.randn(T, B, I, dtype=F64)

    def last(v: Tensor) -> Tensor:
        return call(name, rnn, v)[-1]

    want = torch.autograd.functional.jacobian(last, x)
    assert_match(torch.autograd.functional.jacobian(last, x, vectorize=True), want)


@pytest.mark.parametrize("lengths", [None, [T, 2]], ids=["whole", "ragged"])
@pytest.mark.parametrize("options", [{}, {"horizon": 2}, {"horizon": 3, "stride": 1}], ids=str)
@pytest.mark.parametrize("engine", ["eager", "native"])
def test_batched_gradients_of_weights(engine, options, lengths):
    rnn, x = ur.unroll(ur.LSTMCell(I, H), engine=engine, **options).double(), torch.randn(T, 2, I, dtype=F64)
    (outputs, _), weights = rnn(x, lengths=lengths)[1], list(rnn.parameters())
    basis = torch.eye(outputs.numel(), dtype=F64).view(-1, *outputs.shape)
    got = torch.autograd.grad(outputs, weights, basis, is_grads_batched=True, retain_graph=True)
    rows = [torch.autograd.grad(outputs, weights, row, retain_graph=True) for row in basis]
    assert_match(list(got), [torch.stack(column) for column in zip(*rows, strict=True)])


def test_batched_gradients_under_a_memory_budget_are_refused_in_words():
    rnn, x = ur.unroll(ur.GRUCell(I, H), checkpoint=lambda T: ur.segments(T, 2)), torch.randn(T, B, I)
    outputs = rnn(x)[0][-1]
    basis = torch.eye(outputs.numel()).view(-1, *outputs.shape)
    with pytest.raises(ur.GradientError, match="one at a time"):
        torch.autograd.grad(outputs, list(rnn.parameters()), basis, is_grads_batched=True)


def test_hessians():
    rnn, x = ur.unroll(ur.RNNCell(I, H)).double(), torch.randn(3, 2, I, dtype=F64)

    def energy(v: Tensor) -> Tensor:
        return rnn(v)[0].square().sum()

    row_by_row = torch.autograd.functional.hessian(energy, x)
    assert_match(torch.autograd.functional.hessian(energy, x, vectorize=True), row_by_row)
    assert_match(torch.func.hessian(energy)(x), row_by_row)


# -- cells of other makes --------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(I + H, H)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, H, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.linear(torch.cat([input, state], 1)))
        return hidden, hidden


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
@pytest.mark.parametrize(
    "make", [lambda cell: torch.jit.trace(cell, (torch.ones(2, I), torch.ones(2, H))), torch.fx.symbolic_trace]
)
def test_traced_cells_are_cells(make):
    plain = Plain()
    rnn = ur.unroll(ur.as_cell(make(plain), state=plain.initial_state))
    x = torch.randn(T, B, I)
    assert_match(rnn(x), ur.unroll(plain, engine="reference")(x))


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.T


@pytest.mark.parametrize("engine", ["reference", "eager", "native"])
@pytest.mark.parametrize("options", [{}, {"checkpoint": lambda T: ur.segments(T, 2)}, {"horizon": 3, "stride": 2}])
def test_cached_parametrisations(engine, options):
    cell = ur.RNNCell(I, H).double()
    parametrize.register_parametrization(cell, "weight_hh", Symmetric())
    rnn, slow = ur.unroll(cell, engine=engine, **options), ur.unroll(cell, engine="reference", **options)
    x = torch.randn(T, B, I, dtype=F64)
    for _ in range(3):
        with parametrize.cached():
            got = torch.autograd.grad(rnn(x)[0].square().sum(), list(cell.parameters()))
        assert_match(got, torch.autograd.grad(slow(x)[0].square().sum(), list(cell.parameters())))


class Rotating(nn.Module):
    """A complex state, turned at every step by phases that are real parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.rand(H))
        self.into = nn.Parameter(torch.randn(H, I, dtype=torch.cfloat))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, H, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = state * torch.polar(torch.ones_like(self.phase), self.phase) + input @ self.into.T
        return state.real, state


def test_a_cell_with_a_complex_parameter_is_asked_for_a_complex_state():
    rnn, x = ur.unroll(Rotating()), torch.randn(T, B, I, dtype=torch.cfloat)
    outputs, last = rnn(x)
    assert last.dtype == torch.cfloat
    assert_match((outputs, last), ur.unroll(rnn.cell, engine="reference")(x))
    assert ur.verify(rnn, x)


# -- chance ----------------------------------------------------------------------------------------------------------


def test_other_threads_never_see_a_random_number_twice():
    rnn, x, state = ur.unroll(ur.GRUCell(I, H)), torch.randn(2, 2, I), torch.zeros(2, H)
    stop, seen = threading.Event(), list[float]()

    def draw() -> None:
        while not stop.is_set():
            seen.extend(torch.rand(64, dtype=F64).tolist())

    thread = threading.Thread(target=draw)
    thread.start()
    for n in range(40):
        rnn(x, state)
        rnn.plan(torch.randn(2, 2 + n % 3, I, generator=torch.Generator()))
    stop.set()
    thread.join()
    assert len(set(seen)) == len(seen)


SHARED = np.random.default_rng(3)


@pytest.mark.filterwarnings("ignore:engine=")
@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("lengths", [None, [T] * B, [T, 3, 1]])
@pytest.mark.parametrize("draw", [np.random.normal, SHARED.normal, lambda: np.random.rand(1)[0]])
def test_noise_of_numpys_is_that_of_the_loop(draw, lengths, engine):
    class Noisy(Plain):
        def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            hidden, _ = super().forward(input, state)
            return hidden + float(draw()), hidden + float(draw())

    cell, x = Noisy(), torch.randn(T, B, I)
    rnn, slow = ur.unroll(cell, engine=engine), ur.unroll(cell, engine="reference")

    def seeded(network: nn.Module) -> Any:
        np.random.seed(5)
        SHARED.bit_generator.state = np.random.default_rng(5).bit_generator.state
        return network(x, lengths=lengths)

    for _ in range(2):
        assert_match(seeded(rnn), seeded(slow))
    assert "numpy's" in rnn.plan(x).why


def test_asking_for_a_plan_uses_up_no_random_numbers():
    class Random(Plain):
        def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
            return torch.rand(batch_size, H)

    rnn = ur.unroll(Random())
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    rnn.plan(torch.zeros(T, B, I))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


# -- returned states, hooks, flags -----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["reference", "eager", "native"])
@pytest.mark.parametrize("lengths", [None, [5, 3, 1]])
def test_the_returned_state_is_no_part_of_the_outputs(engine, lengths):
    outputs, last = ur.unroll(ur.GRUCell(I, H), engine=engine)(torch.randn(T, B, I), lengths=lengths)
    last.retain_grad()
    (outputs.sum() + 2 * last.sum()).backward()
    assert_match(last.grad, torch.full_like(last, 2.0))


def test_a_hook_on_a_layer_does_not_concern_its_steps():
    layer, seen = ur.LSTM(I, H), []
    layer.register_forward_hook(lambda module, given, result: seen.append(1))
    layer(torch.randn(T, B, I))
    assert (layer.network.ran, seen) == ("native", [1])


@pytest.mark.parametrize("layer", [ur.RNN, ur.GRU, ur.LSTM])
@pytest.mark.parametrize("flag", ["bias", "batch_first", "bidirectional"])
@pytest.mark.parametrize("value", [1, 0, "True", "False", None])
def test_a_flag_is_a_bool(layer, flag, value):
    with pytest.raises(ur.OptionError, match=f"{flag} must be True or False"):
        layer(I, H, **{flag: value})
    with pytest.raises(TypeError):
        layer(I, H, **{flag: value})


def test_numpy_rows_make_a_batch():
    samples = [{"x": np.full((n, 2), float(n), dtype=np.float32), "y": n} for n in (3, 1, 2)]
    batch, lengths = ur.collate_padded(samples, sequences=["x"])
    assert lengths.tolist() == [3, 1, 2]
    assert batch["x"].sum((0, 2)).tolist() == [18.0, 2.0, 8.0]
    packed = ur.collate_packed([(np.arange(4)[::-2],), (np.arange(3),)], sequences=[0])[0]
    assert packed.data.tolist() == [0, 3, 1, 1, 2]


# -- compiled around, on every torch ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # where a graph is broken, torch looks at what it is given
@pytest.mark.parametrize("engine", ["reference", "eager", "native"])
def test_a_compiled_model_has_the_numbers_of_the_call(engine):
    rnn, head = ur.unroll(ur.GRUCell(I, H), engine=engine).double(), nn.Linear(H, 2).double()

    def model(x: Tensor) -> Tensor:
        return head(rnn(x)[0])

    for steps in (T, 2 * T):
        x = torch.randn(steps, B, I, dtype=F64)
        assert_match(torch.compile(model, backend="eager")(x), model(x))
