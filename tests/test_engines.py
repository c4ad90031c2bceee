"""Every engine gives the reference's values and gradients: the cells of the library, and cells made to mislead it."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import unrolled as ur
from matching import assert_match
from problems import (
    AttendingCell,
    CountingCell,
    DelayCell,
    NestedCell,
    SharedStartCell,
    Surrogate,
    TokenCell,
    uneven_loss,
)
from random_cells import ENGINES, assert_as_reference, decision, gradients, unrolled
from unrolled.plan.plan import plan_step

F64, F32 = torch.float64, torch.float32
I, H = 3, 5


# -- the cells of the library ----------------------------------------------------------------------------------------


def _learned(kind: type[nn.Module], bias: bool = True) -> Callable[[int, int], nn.Module]:
    def made(input_size: int, hidden_size: int) -> nn.Module:
        cell = kind(input_size, hidden_size, bias, learn_initial_state=True)
        for name, parameter in cell.named_parameters():
            if name.startswith("initial"):
                nn.init.normal_(parameter)
        return cell

    return made


KINDS = (ur.LSTMCell, ur.GRUCell, ur.PeepholeLSTMCell, ur.LayerNormLSTMCell, ur.MinGRUCell, ur.SLSTMCell, ur.RNNCell)
TORCH_KINDS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
CELLS: dict[str, Callable[[int, int], nn.Module]] = {
    **{kind.__name__: kind for kind in KINDS},
    **{f"{kind.__name__} without bias": lambda i, h, kind=kind: kind(i, h, bias=False) for kind in KINDS},
    **{f"{kind.__name__} learned start": _learned(kind) for kind in KINDS},
    "RNNCell relu": lambda i, h: ur.RNNCell(i, h, nonlinearity="relu"),
    "SLSTMCell exponential": lambda i, h: ur.SLSTMCell(i, h, forget_gate="exponential"),
    **{f"nn.{kind.__name__}": lambda i, h, kind=kind: ur.as_cell(kind(i, h)) for kind in TORCH_KINDS},
    **{
        f"nn.{kind.__name__} without bias": lambda i, h, kind=kind: ur.as_cell(kind(i, h, False))
        for kind in TORCH_KINDS
    },
    "nn.RNNCell relu": lambda i, h: ur.as_cell(nn.RNNCell(i, h, nonlinearity="relu")),
}
LENGTHS, BATCHES, SIZES = (1, 2, 7, 64), (1, 2, 3, 4, 5, 8, 12, 13, 16, 17, 31, 32, 33), (1, 5, 16, 33)


def shapes_for(number: int) -> list[tuple[int, int]]:
    """Some (B, H) for a cell, such that all cells together meet every size and every batch."""
    sizes = itertools.islice(itertools.cycle(SIZES), number, number + 2)
    batches = itertools.islice(itertools.cycle(BATCHES), 3 * number, 3 * number + 2)
    return list(zip(batches, sizes, strict=True))


# One compilation an operation: minutes in all, so that `make slow` runs them.
SLOWLY = ["eager", pytest.param("native", marks=pytest.mark.slow)]


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CELLS)
def test_every_engine_gives_the_values_and_all_gradients_of_the_reference(name, dtype):
    for B, size in shapes_for(list(CELLS).index(name))[: 2 if dtype == F64 else 1]:
        if size == 1 and name.startswith("LayerNorm"):
            continue  # the norm of one number is 0 whatever it is: its gradients are rounding noise in every engine
        cell = CELLS[name](I, size).to(dtype)
        for T, engine in itertools.product(LENGTHS, ENGINES):
            x = torch.randn(T, B, I, dtype=dtype)
            assert decision(cell, x, engine).engine == engine
            assert_as_reference(cell, x, engine=engine, what=f"T={T} B={B} H={size}")
            carried = unrolled(cell, "reference")(x)[1]
            assert_as_reference(cell, x, carried, engine=engine, what=f"carried state, T={T} B={B} H={size}")


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("B", [1, 2, 3, 33])
@pytest.mark.parametrize("kind", [ur.LSTMCell, ur.LayerNormLSTMCell], ids=lambda kind: kind.__name__)
def test_two_threads_give_the_same(kind, B):
    assert_as_reference(kind(8, 65).double(), torch.randn(64, B, 8, dtype=F64), engine="native")


# -- layouts, states and losses --------------------------------------------------------------------------------------


def _laid_out(T: int, B: int, size: int) -> dict[str, Tensor]:
    whole = torch.randn(2 * T, B, 2 * size, dtype=F64)
    complex_parts = torch.randn(T, B, size, dtype=torch.complex128)
    return {
        "every second step": whole[::2, :, :size],
        "every second feature": whole[:T, :, ::2],
        "time from the end": whole[:T, :, :size].flip(0),
        "batch first in memory": torch.randn(B, T, size, dtype=F64).transpose(0, 1),
        "features first in memory": torch.randn(size, B, T, dtype=F64).permute(2, 1, 0),
        "expanded over time": torch.randn(1, B, size, dtype=F64).expand(T, B, size),
        "expanded over the batch": torch.randn(T, 1, size, dtype=F64).expand(T, B, size),
        "expanded over all": torch.randn(1, 1, 1, dtype=F64).expand(T, B, size),
        "a part of a larger one": torch.randn(T + 2, B + 2, size + 2, dtype=F64)[1:-1, 1:-1, 1:-1],
        "negated lazily": complex_parts.conj().imag,
    }


class RawInputCell(nn.Module):
    """Reads its input inside of the loop: `h' = tanh(a h x + x)`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(size, dtype=F64))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, len(self.a), device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.a * state * input + input)
        return hidden, hidden


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", _laid_out(1, 1, 1))
def test_inputs_and_states_of_any_layout(layout, engine):
    x = _laid_out(6, 4, 3)[layout]
    for cell in (RawInputCell(3), ur.GRUCell(3, 3).double()):
        assert_as_reference(cell, x, engine=engine)
        assert_as_reference(cell, torch.randn(6, 4, 3, dtype=F64), x[0], engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_batch_first(engine):
    cell, x = ur.LSTMCell(I, H).double(), torch.randn(4, 7, I, dtype=F64)
    got = unrolled(cell, engine, batch_first=True)(x)
    assert_match(got, unrolled(cell, "reference", batch_first=True)(x))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [ur.LSTMCell, ur.SLSTMCell, ur.LayerNormLSTMCell], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("loss", ["outputs", "last output", "one output", "state", "memory"])
def test_losses_that_read_only_a_part(loss, kind, engine):
    read = {
        "outputs": lambda outputs, state: uneven_loss(outputs),
        "last output": lambda outputs, state: uneven_loss(outputs[-1]),
        "one output": lambda outputs, state: outputs[3, 1, 2],
        "state": lambda outputs, state: uneven_loss(state),
        "memory": lambda outputs, state: state[1].sum(),
    }
    assert_as_reference(kind(I, H).double(), torch.randn(7, 2, I, dtype=F64), engine=engine, loss=read[loss])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("frozen", ["weight_hh", "weight_ih", "bias_hh", "all"])
def test_frozen_parameters(frozen, engine):
    cell = ur.LSTMCell(I, H).double()
    for name, parameter in cell.named_parameters():
        parameter.requires_grad_(frozen not in (name, "all"))
    assert_as_reference(cell, torch.randn(7, 2, I, dtype=F64), engine=engine)
    assert_as_reference(cell, torch.randn(7, 2, I, dtype=F64), engine=engine, inputs_require_grad=False)


# -- autograd as with any module -------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_second_backward_over_a_kept_graph_gives_the_same(engine):
    cell, x = ur.LSTMCell(I, H).double(), torch.randn(7, 2, I, dtype=F64)
    loss = uneven_loss(*unrolled(cell, engine)(x))
    first = torch.autograd.grad(loss, list(cell.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(cell.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [ur.LSTMCell, ur.GRUCell, ur.LayerNormLSTMCell], ids=lambda kind: kind.__name__)
def test_double_backward(kind, engine):
    cell, x = kind(I, H).double(), torch.randn(4, 2, I, dtype=F64, requires_grad=True)

    def second(engine: str) -> tuple[Tensor, ...]:
        asked = [x, *cell.parameters()]
        first = torch.autograd.grad(uneven_loss(*unrolled(cell, engine)(x)), asked, create_graph=True)
        return torch.autograd.grad(uneven_loss(*first), asked)

    assert_match(second(engine), second("reference"))


@pytest.mark.parametrize("engine", ENGINES)
def test_transforms_of_torch_func_are_still_right(engine):
    cell, x = ur.GRUCell(I, H).double(), torch.randn(4, 2, I, dtype=F64)
    fast, slow = unrolled(cell, engine), unrolled(cell, "reference")
    fast(x)
    parameters = dict(fast.named_parameters())

    def loss(rnn: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return uneven_loss(*functional_call(rnn, parameters, (x,)))

    for transform in (
        lambda rnn: grad(lambda p: loss(rnn, p, x))(parameters),
        lambda rnn: vmap(lambda y: rnn(y)[0])(torch.stack([x, 2 * x])),
        lambda rnn: vmap(grad(lambda p, y: loss(rnn, p, y)), in_dims=(None, 0))(parameters, torch.stack([x, 2 * x])),
        lambda rnn: jvp(lambda y: rnn(y)[0], (x,), (torch.ones_like(x),)),
    ):
        assert_match(transform(fast), transform(slow))


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_runs_as_the_reference_does(engine):
    cell, x = ur.LSTMCell(I, H), torch.randn(4, 2, I)
    fast = unrolled(cell, engine)
    fast(x)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = fast(x), unrolled(cell, "reference")(x)
    assert_match(got, want)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [ur.LSTMCell, ur.LayerNormLSTMCell], ids=lambda kind: kind.__name__)
def test_inference(kind, mode, engine):
    cell, x = kind(I, H).double(), torch.randn(7, 2, I, dtype=F64)
    with mode():
        got, want = unrolled(cell, engine)(x), unrolled(cell, "reference")(x)
        again = torch.randn(5, 3, I, dtype=F64)
        assert_match(unrolled(cell, engine)(again), unrolled(cell, "reference")(again))
    assert_match(got, want)
    assert not got[0].requires_grad
    assert_match(unrolled(cell, engine)(x), want)


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_may_be_written_to_in_place(engine):
    for cell in (ur.GRUCell(I, H).double(), HeldCell(), DelayCell(2, I)):

        def doubled(outputs: Tensor, state: Any) -> Tensor:
            return uneven_loss(outputs.mul_(2), state)

        assert_as_reference(cell, torch.randn(6, 2, I, dtype=F64), engine=engine, loss=doubled)


@pytest.mark.parametrize("engine", ENGINES)
def test_writing_to_the_outputs_leaves_inputs_and_state_alone(engine):
    cell, x = PassingCell(), torch.randn(6, 2, I, dtype=F64)
    state = torch.randn(2, I, dtype=F64)
    kept = x.clone(), state.clone()
    outputs, last = unrolled(cell, engine)(x, state)
    outputs["input"].zero_()
    outputs["state"].zero_()
    assert_match((x, state), kept)
    assert_match(last, kept[0][-1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("training", [True, False])
def test_a_first_call_uses_up_no_random_numbers(training, engine):
    cell, x = SpikingCell(), torch.randn(4, 2, I, dtype=F64)
    with torch.set_grad_enabled(training):
        before = torch.random.get_rng_state()
        unrolled(cell, engine)(x)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_no_copy_uses_has_no_gradient_and_what_it_uses_has_one(engine):
    cell, x = PartlyUsedCell(), torch.randn(4, 2, I, dtype=F64)
    for read in (lambda o, s: uneven_loss(o), lambda o, s: uneven_loss(s), lambda o, s: uneven_loss(o[0])):
        got, want = gradients(cell, x, engine=engine, loss=read), gradients(cell, x, engine="reference", loss=read)
        assert {name for name, g in got.items() if g is None} == {name for name, g in want.items() if g is None}


# -- cells that a user may write -------------------------------------------------------------------------------------


class UserCell(nn.Module):
    """What the cells below share: one hidden state `[B, H]` of zeros, in the dtype of the parameters."""

    size = H
    leaves = 1

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Any:
        zeros = [torch.zeros(batch_size, self.size, device=device, dtype=dtype) for _ in range(self.leaves)]
        return zeros[0] if self.leaves == 1 else tuple(zeros)


class PartlyUsedCell(UserCell):
    """One parameter only the output needs, one only the state, one nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.of_output, self.of_state, self.of_nothing, self.of_both = (
            nn.Parameter(torch.randn(H, I, dtype=F64)) for _ in range(4)
        )
        self.of_hidden = nn.Parameter(torch.randn(H, H, dtype=F64) / 4)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        both = input @ self.of_both.T
        return torch.tanh(both + input @ self.of_output.T), torch.tanh(
            both + input @ self.of_state.T + state @ self.of_hidden
        )


class HeldCell(UserCell):
    """One leaf that every copy hands on as it came, one that drives it."""

    leaves = 2
    size = I

    def forward(self, input: Tensor, state: Any) -> tuple[Tensor, Any]:
        held, moving = state
        return held + moving, (held, torch.tanh(moving * held + input))


class PassingCell(UserCell):
    """Gives out its input and its state as they are; the next state is the input."""

    size = I

    def forward(self, input: Tensor, state: Tensor) -> tuple[Any, Tensor]:
        return {"input": input, "state": state}, input


class SwappingCell(UserCell):
    """Two states that change places without a computation."""

    leaves = 2
    size = I

    def forward(self, input: Tensor, state: Any) -> tuple[Any, Any]:
        return input * state[0], (state[1], state[0])


class SpikingCell(UserCell):
    """Leaky integrate and fire, with a soft reset; the spike has a surrogate gradient."""

    leaves = 2

    def __init__(self) -> None:
        super().__init__()
        self.input, self.hidden = nn.Linear(I, H).double(), nn.Linear(H, H).double()
        self.beta = nn.Parameter(torch.tensor(0.9, dtype=F64))

    def forward(self, input: Tensor, state: Any) -> tuple[Tensor, Any]:
        spikes, membrane = state
        membrane = self.beta.clamp(0, 1) * membrane + self.input(input) + self.hidden(spikes) - spikes
        spikes = Surrogate.apply(membrane - 0.1)
        return spikes, (spikes, membrane)


class LiquidCell(UserCell):
    """A liquid time constant: six steps of a fused solver in each step, some 300 small operations."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"w": (H, H), "mu": (H, H), "sigma": (H, H), "erev": (H, H), "leak": (H,), "rest": (H,), "cm": (H,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.rand(shape, dtype=F64)))
        self.sensory = nn.Linear(I, H).double()

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        drive = self.sensory(input)
        w, cm, leak = F.softplus(self.w), F.softplus(self.cm), F.softplus(self.leak)
        for _ in range(6):
            active = w * torch.sigmoid(self.sigma * (state.unsqueeze(-1) - self.mu))
            numerator = cm * state + leak * self.rest + (active * self.erev).sum(1) + drive
            state = numerator / (cm + leak + active.sum(1) + 1e-8)
        return torch.tanh(state), state


class TwoLayerCell(UserCell):
    """Two LSTM layers by hand, a layer norm and a head: two loops, and products between and after them."""

    leaves = 4

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.LSTMCell(I, H).double(), nn.LSTMCell(H, H).double()
        self.norm, self.head = nn.LayerNorm(H).double(), nn.Linear(H, 7).double()

    def forward(self, input: Tensor, state: Any) -> tuple[Tensor, Any]:
        h1, c1 = self.one(input, state[:2])
        h2, c2 = self.two(self.norm(h1), state[2:])
        return self.head(h2), (h1, c1, h2, c2)


class Rowwise(UserCell):
    """`h' = tanh(W f(h) + V x)` for an f that may couple the rows of a batch."""

    def __init__(self, f: Callable[..., Tensor], *, on_input: bool = False, after: bool = False) -> None:
        super().__init__()
        self.f, self.on_input, self.after = f, on_input, after
        self.W, self.V = nn.Linear(H, H).double(), nn.Linear(H, H).double()

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        input = self.f(input) if self.on_input else input
        state = state if self.on_input or self.after else self.f(state)
        hidden = torch.tanh(self.W(state) + self.V(input))
        return self.f(hidden) if self.after else hidden, hidden


COUPLING: dict[str, Callable[[Tensor], Tensor]] = {
    "mean(0)": lambda x: x - x.mean(0),
    "mean(0, keepdim)": lambda x: x * x.mean(0, keepdim=True),
    "mean of all": lambda x: x * x.mean(),
    "softmax(0)": lambda x: x.softmax(0),
    "softmax(-2)": lambda x: x.softmax(-2),
    "sum(0) expanded": lambda x: x.sum(0).expand(x.shape[0], -1),
    "max(0)": lambda x: x / (1 + x.abs().amax(0)),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "std(0)": lambda x: x / (1 + x.std(0, unbiased=False)),
    "rows rolled": lambda x: x.roll(1, 0),
    "rows flipped": lambda x: x.flip(0),
    "cumsum(0)": lambda x: x.cumsum(0),
    "first row": lambda x: x + x[0],
    "first row kept": lambda x: x + x[:1],
    "rows with rows": lambda x: (x @ x.T).softmax(-1) @ x,
    "rows merged": lambda x: x.reshape(-1).cumsum(0).reshape(x.shape),
    "rows interleaved": lambda x: x.reshape(x.shape[1], x.shape[0]).T.contiguous(),
    "sorted": lambda x: x.sort(0).values,
    "divided by the batch": lambda x: x + x.sum(0) / x.shape[0],
    "bare squeeze": lambda x: x.unsqueeze(1).squeeze(),
    "squeeze(0)": lambda x: x.unsqueeze(0).squeeze(0),
    "norm of all": lambda x: x / (1 + x.norm()),
    "transposed twice": lambda x: (x.T * 2).T,
    "columns by rows": lambda x: x.T.softmax(-1).T,
    "group norm": lambda x: F.group_norm(x, 1),
    "weight scaled by the batch": lambda x: x @ (torch.eye(H, dtype=x.dtype) * x.mean()),
    "batch indexed": lambda x: x[torch.arange(x.shape[0]).flip(0)],
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("where", ["on state", "on input", "after"])
@pytest.mark.parametrize("name", COUPLING)
def test_cells_that_couple_rows(name, where, engine):
    cell = Rowwise(COUPLING[name], on_input=where == "on input", after=where == "after")
    fast = unrolled(cell, engine)
    for T, B in ((4, 3), (3, H), (4, 4), (5, 2), (2, 8)):
        x, state = torch.randn(T, B, H, dtype=F64), torch.randn(B, H, dtype=F64)
        assert_as_reference(cell, x, state, engine=engine, rnn=fast, what=f"T={T} B={B}")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["mean(0)", "bare squeeze", "softmax(0)", "first row", "rows with rows"])
def test_cells_that_couple_rows_and_are_first_called_with_many_and_then_with_one(name, engine):
    cell = Rowwise(COUPLING[name])
    fast, slow = unrolled(cell, engine), unrolled(cell, "reference")
    for B in (4, 1, 3):
        x, state = torch.randn(4, B, H, dtype=F64), torch.randn(B, H, dtype=F64)
        assert _told(slow, x, state) == _told(fast, x, state) or assert_match(fast(x, state), slow(x, state)) is None


def _told(rnn: nn.Module, x: Tensor, state: Any) -> str:
    """What a call is refused with; nothing if it is not."""
    try:
        rnn(x, state)
    except ur.UnrolledError as error:
        return str(error)
    return ""


class NormedCell(UserCell):
    """Batch norm between two steps."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner, self.norm = nn.RNNCell(I, H).double(), nn.BatchNorm1d(H, **options).double()

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.norm(self.inner(input, state))
        return hidden, hidden


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}, {"momentum": None}], ids=str)
def test_batch_norm_and_its_running_statistics(options, training, engine):
    cell = NormedCell(**options).train(training)
    cell.norm.weight.data.normal_()
    twin = copy.deepcopy(cell)
    x = torch.randn(4, 3, I, dtype=F64)
    got, want = unrolled(cell, engine)(x), unrolled(twin, "reference")(x)
    assert_match(got, want)
    assert_match(dict(cell.named_buffers()), dict(twin.named_buffers()))


class StatisticsCell(UserCell):
    """Batch norm as a function, which counts nothing, yet writes its running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.RNNCell(I, H).double()
        self.register_buffer("mean", torch.zeros(H, dtype=F64))
        self.register_buffer("var", torch.ones(H, dtype=F64))

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.inner(input, state)
        F.batch_norm(hidden.detach(), self.mean, self.var, training=True)
        return hidden, hidden


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_step_writes_into_buffers_is_what_the_reference_writes(engine):
    cell = StatisticsCell()
    twin = copy.deepcopy(cell)
    x = torch.randn(4, 3, I, dtype=F64)
    assert_match(unrolled(cell, engine)(x), unrolled(twin, "reference")(x))
    assert_match(dict(cell.named_buffers()), dict(twin.named_buffers()))


class BatchlessStateCell(UserCell):
    """A state without a batch: a moving average over all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.RNNCell(I, H).double()

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Any:
        return torch.zeros(batch_size, H, dtype=dtype), torch.zeros((), dtype=dtype)

    def forward(self, input: Tensor, state: Any) -> tuple[Tensor, Any]:
        hidden = self.inner(input, state[0] * torch.cos(state[1]))
        average = 0.9 * state[1] + 0.1 * hidden.mean()
        return hidden, (hidden, average)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "spiking": SpikingCell,
    "liquid time constant": LiquidCell,
    "two layers, norm and head": TwoLayerCell,
    "held state": HeldCell,
    "swapped states": SwappingCell,
    "delay": lambda: DelayCell(3, I),
    "counting": lambda: CountingCell(I).double(),
    "nested state": lambda: NestedCell(I, H).double(),
    "shared start": lambda: SharedStartCell(I).double(),
    "passing": PassingCell,
    "partly used": PartlyUsedCell,
    "state without batch": BatchlessStateCell,
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", OTHERS)
def test_cells_that_a_user_may_write(name, engine):
    cell = OTHERS[name]()
    fast = unrolled(cell, engine)
    for T, B in ((1, 2), (5, 1), (4, 4), (6, H), (7, 3)):
        x = torch.randn(T, B, I, dtype=F64)
        assert_as_reference(cell, x, engine=engine, rnn=fast, what=f"T={T} B={B}")
        carried = unrolled(cell, "reference")(x)[1]
        assert_as_reference(cell, x, carried, engine=engine, rnn=fast, what=f"carried, T={T} B={B}")


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_read_inside_of_the_cell(engine):
    assert_as_reference(TokenCell(7, H).double(), torch.randint(7, (6, 4)), engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_attention_over_a_context(engine):
    cell, x = AttendingCell(I, H).double(), torch.randn(6, 4, I, dtype=F64)
    context = torch.randn(4, 3, H, dtype=F64)
    assert_as_reference(cell, x, context=context, engine=engine)


@pytest.mark.parametrize("name", ["spiking", "liquid time constant", "two layers, norm and head", "held state"])
def test_cells_that_the_native_engine_runs(name):
    found = decision(OTHERS[name](), torch.randn(4, 2, I, dtype=F64), "native")
    assert found.engine == "native", found.why


def test_a_two_layer_cell_has_two_loops_and_its_products_with_inputs_in_none():
    cell, x = TwoLayerCell(), torch.randn(2, I, dtype=F64)
    plan = plan_step(cell, x, cell.initial_state(2, dtype=F64), None, 2, (True,))
    assert len(plan.loops) == 2
    ops = zip(plan.recording.program.ops, plan.places, strict=True)
    products = [place for op, place in ops if op.name in ("aten.mm", "aten.addmm")]
    assert sorted(products) == ["after", "before", "before", "through", "through"]


# -- NaN and infinity ------------------------------------------------------------------------------------------------

SPECIAL = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "largest": 1.7e308}


@pytest.mark.parametrize("engine", SLOWLY)
@pytest.mark.parametrize("number", SPECIAL)
@pytest.mark.parametrize("name", [*[kind.__name__ for kind in KINDS], "RNNCell relu", "raw input"])
def test_nan_and_infinity_come_out_where_the_reference_has_them(name, number, engine):
    torch.manual_seed(3)
    cell = RawInputCell(I) if name == "raw input" else CELLS[name](I, H).double()
    fast, slow = unrolled(cell, engine), unrolled(cell, "reference")
    x = torch.randn(5, 3, I, dtype=F64)
    fast(x)
    x[2, 1, 0] = SPECIAL[number]
    got, want = fast(x)[0], slow(x)[0]
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-10, equal_nan=True)


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in "tanh sigmoid exp reciprocal abs sign relu floor ceil round sin cos erf expm1 "
        "neg square sgn trunc frac sinh cosh atan tan asinh exp2 erfc sinc".split()
    },
    **{
        name: getattr(F, name)
        for name in "softplus elu gelu silu mish leaky_relu hardtanh hardswish logsigmoid hardsigmoid selu celu relu6 "
        "softsign tanhshrink hardshrink softshrink".split()
    },
    **{
        name: lambda x, name=name: getattr(torch, name)(x.abs() + 0.1)
        for name in "log log1p sqrt rsqrt log2 log10".split()
    },
    **{name: lambda x, name=name: getattr(torch, name)(0.9 * torch.tanh(x)) for name in "asin acos atanh".split()},
    "acosh": lambda x: torch.acosh(1.5 + x.abs()),
    **{
        name: lambda x, name=name: getattr(torch, name)(x).to(x.dtype)
        for name in "isnan isinf isfinite signbit".split()
    },
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp min": lambda x: x.clamp(min=-0.5),
    "clamp max": lambda x: x.clamp(max=0.5),
    "maximum": lambda x: torch.maximum(x, x.flip(-1)),
    "minimum": lambda x: torch.minimum(x.flip(-1), x),
    "where": lambda x: torch.where(x > 0, x, -x),
    "where not": lambda x: torch.where(~(x > 0), x, -x),
    "masked fill": lambda x: x.masked_fill(x < 0, 0.25),
    "as bool": lambda x: x.bool().to(x.dtype),
    "bools added": lambda x: ((x > 0) + (x > -1)).to(x.dtype),
    "bools added twice": lambda x: (((x > 0) + (x > -1)) == (x > -2)).to(x.dtype),
    "bools multiplied": lambda x: ((x > 0) * (x < 1)).to(x.dtype),
    "bools summed": lambda x: x * (x > 0).sum(-1, keepdim=True),
    "not equal": lambda x: (x != 0).to(x.dtype),
    "logical": lambda x: (torch.logical_and(x, x > 0) | torch.logical_not(x)).to(x.dtype),
    "pow 2": lambda x: x**2,
    "pow 3": lambda x: x**3,
    "pow -1": lambda x: x**-1,
    "pow 0.5": lambda x: (x.abs() + 0.1) ** 0.5,
    "pow -0.5": lambda x: (x.abs() + 0.1) ** -0.5,
    "pow 0": lambda x: x**0,
    "pow of two": lambda x: 2.0**x,
    "pow of rows": lambda x: x.abs() ** x,
    "divided down": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "divided to zero": lambda x: torch.div(x, 0.3, rounding_mode="trunc"),
    "remainder": lambda x: torch.remainder(x, 0.3),
    "rounded": lambda x: torch.round(x, decimals=1),
    "lerp": lambda x: torch.lerp(x, x.flip(-1), 0.3),
    "lerp far": lambda x: torch.lerp(x, x.flip(-1), x),
    "threshold": lambda x: F.threshold(x, 0.1, 0.7),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.3),
    "addcdiv": lambda x: torch.addcdiv(x, x, 1 + x.abs(), value=0.3),
    "add alpha": lambda x: torch.add(x, x, alpha=0.3),
    "sub alpha": lambda x: torch.sub(x, x.flip(-1), alpha=2),
    "rsub": lambda x: 1 - x,
    "softmax": lambda x: x.softmax(-1),
    "log softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1, keepdim=True) * x,
    "layer norm": lambda x: F.layer_norm(x, (H,)),
    "mean": lambda x: x - x.mean(-1, keepdim=True),
    "var": lambda x: x.var(-1, keepdim=True) * x,
    "std": lambda x: x.std(-1, unbiased=False, keepdim=True) * x,
    "var of one": lambda x: x[:, :1].var(-1, keepdim=True, unbiased=False) + x,
    "amax": lambda x: x - x.amax(-1, keepdim=True),
    "amin": lambda x: x - x.amin(-1, keepdim=True),
    "max": lambda x: x - x.max(-1, keepdim=True).values,
    "max without dim": lambda x: x * x.max(-1).values.unsqueeze(-1),
    "norm": lambda x: x * x.norm(dim=-1, keepdim=True),
    "norm 1": lambda x: x * x.norm(p=1, dim=-1, keepdim=True),
    "normalised": lambda x: F.normalize(x, dim=-1),
    "prod": lambda x: x * x.prod(-1, keepdim=True),
    "cumsum": lambda x: x.cumsum(-1),
    "argmax": lambda x: x * x.argmax(-1, keepdim=True),
    "one hot": lambda x: F.one_hot(x.argmax(-1), H).to(x.dtype) * x,
    "any": lambda x: x * (x > 0).any(-1, keepdim=True),
    "all": lambda x: x * (x > -1).all(-1, keepdim=True),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, -1),
    "sliced": lambda x: torch.cat([x[:, 3:], x[:, :3]], -1),
    "sliced by steps": lambda x: torch.cat([x[:, ::2], x[:, 1::2]], -1),
    "sliced from the end": lambda x: torch.cat([x[:, -2:], x[:, :-2]], -1),
    "sliced empty": lambda x: torch.cat([x[:, :0], x], -1),
    "sliced by the batch": lambda x: x + x[:, : min(x.shape[0], 1)],
    "split": lambda x: torch.cat(x.split([1, 3, 1], -1)[::-1], -1),
    "chunk": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "unbind": lambda x: torch.stack(x.unbind(-1)[::-1], -1),
    "stack": lambda x: torch.stack([x, 2 * x], -1).sum(-1),
    "stack first": lambda x: torch.stack([x, 2 * x], 1).mean(1),
    "stack rows": lambda x: torch.stack([x, 2 * x]).mean(0),
    "selected": lambda x: x * x[:, 2:3] + x[:, 1].unsqueeze(-1),
    "padded": lambda x: F.pad(x[:, 1:], (1, 0)),
    "padded by one": lambda x: F.pad(x[:, :-1], (0, 1), value=1.0),
    "outer": lambda x: (x.unsqueeze(2) * x.unsqueeze(1)).sum(2),
    "outer turned": lambda x: (x.unsqueeze(2) * x.unsqueeze(1)).transpose(1, 2).reshape(-1, H * H)[:, ::H] * x,
    "viewed": lambda x: torch.cat([x, x], -1).view(-1, 2, H).transpose(1, 2).reshape(-1, 2 * H)[:, :H],
    "unfolded": lambda x: x.unfold(-1, 2, 1).sum(-1).mean(-1, keepdim=True) * x,
    "expanded": lambda x: x[:, :1].expand(-1, H) * x,
    "repeated": lambda x: x[:, :1].repeat(1, H) * x,
    "indexed": lambda x: x[:, [4, 0, 3, 1, 2]],
    "gathered": lambda x: x.gather(-1, x.argsort(-1)),
    "sorted": lambda x: x.sort(-1).values,
    "top": lambda x: x * x.topk(2, -1).values.sum(-1, keepdim=True),
    "median": lambda x: x * x.median(-1, keepdim=True).values,
    "einsum": lambda x: torch.einsum("bi,bj->bj", x, x),
    "zeros like": lambda x: torch.where(x > 0, torch.zeros_like(x), torch.ones_like(x)) * x,
    "new zeros": lambda x: torch.cat([x.new_zeros(x.shape[0], 1), x[:, 1:]], -1),
    "full": lambda x: torch.maximum(x, torch.full_like(x, 0.1)),
    "arange": lambda x: x * torch.arange(H, dtype=x.dtype),
    "eye": lambda x: x @ torch.eye(H, dtype=x.dtype),
    "tril": lambda x: (x.unsqueeze(2) * x.unsqueeze(1)).tril().sum(-1),
    "detached": lambda x: x * x.detach(),
    "straight through": lambda x: x + ((x > 0).to(x.dtype) - x).detach(),
    "in place": lambda x: (x * 2).add_(1).mul_(x).tanh_(),
    "in place of a part": lambda x: _with_first_column_zero(x),
    "to float and back": lambda x: x.float().double(),
    "dropout of none": lambda x: F.dropout(x, 0.0),
    "conv": lambda x: F.conv1d(x.unsqueeze(1), torch.ones(1, 1, 3, dtype=x.dtype), padding=1).squeeze(1),
    "complex": lambda x: torch.complex(x, x.flip(-1)).abs(),
    "nan to num": lambda x: x.nan_to_num(),
    "heaviside": lambda x: torch.heaviside(x.detach(), x.detach()) + x,
    "atan2": lambda x: torch.atan2(x, 1 + x.abs()),
    "fmod": lambda x: torch.fmod(x, 0.3),
    "remainder of rows": lambda x: torch.remainder(x, x.flip(-1)),
    "divided down by rows": lambda x: torch.div(x, x.flip(-1), rounding_mode="floor"),
    "logaddexp": lambda x: torch.logaddexp(x, x.flip(-1)),
    "bools divided": lambda x: (x > 0) / (1 + (x > -1).to(x.dtype)),
    "hypot": lambda x: torch.hypot(x, 1 + x),
    "copysign": lambda x: torch.copysign(x, x.flip(-1)),
    "xlogy": lambda x: torch.xlogy(x, x.abs()),
    "glu": lambda x: F.glu(torch.cat([x, x.flip(-1)], -1), -1),
    "bmm": lambda x: torch.bmm(x.unsqueeze(1), (x.unsqueeze(2) * x.unsqueeze(1))).squeeze(1),
    "matmul by heads": lambda x: _by_heads(x),
}


def _with_first_column_zero(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 0.0
    return x


def _by_heads(x: Tensor) -> Tensor:
    q = torch.cat([x, x.flip(-1)], -1).view(-1, 2, H)
    return (torch.softmax(q @ q.transpose(1, 2), -1) @ q).flatten(1)[:, :H]


@pytest.mark.parametrize("engine", SLOWLY)
@pytest.mark.parametrize("where", ["on state", "after"])
@pytest.mark.parametrize("name", UNARY)
def test_operations_one_by_one(name, where, engine):
    """The first call is on zeros, on which many operations cannot be told from others."""
    cell = Rowwise(UNARY[name], after=where == "after")
    fast = unrolled(cell, engine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast(torch.zeros(2, 3, H, dtype=F64))
        for B in (3, 1, 4):
            x, state = torch.randn(5, B, H, dtype=F64), torch.randn(B, H, dtype=F64)
            assert_as_reference(cell, x, state, engine=engine, rnn=fast, what=f"B={B}")


@pytest.mark.parametrize("engine", SLOWLY)
@pytest.mark.parametrize("name", UNARY)
def test_operations_one_by_one_on_numbers_that_are_none(name, engine):
    f = UNARY[name]
    cell = SpecialCell(f)
    fast, slow = unrolled(cell, engine), unrolled(cell, "reference")
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0], dtype=F64)
    x = torch.stack(
        [torch.zeros(5, 5, dtype=F64), torch.stack([special.roll(n) for n in range(5)]), torch.eye(5, dtype=F64)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast(torch.zeros(2, 5, H, dtype=F64))
        got, want = fast(x)[0], slow(x)[0]
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-10, equal_nan=True)


class SpecialCell(UserCell):
    """What a function makes of the state before it, which is the input: inside of a loop, and finite again after."""

    leaves = 2

    def forward(self, input: Tensor, state: Any) -> tuple[Tensor, Any]:
        held = 0.0 * torch.tanh(state[1]).nan_to_num() + input
        result = self.f(held + 0.0 * state[1].abs().clamp(max=1).nan_to_num())
        return result, (input, torch.where(torch.tanh(result) > 2, state[1], torch.zeros_like(result)))

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f


class Scaled(nn.Module):
    """A weight for each row's own product: its gradient is no product that contracts the rows of all steps."""

    def __init__(self):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(4, 4) / 4), nn.Parameter(torch.zeros(4))

    def initial_state(self, batch_size, device=None, dtype=None):
        return torch.zeros(batch_size, 4, dtype=dtype)

    def forward(self, input, state):
        state = torch.tanh(input + (self.weight.cumsum(0) * state.mean(0).cos()).sum(1) + self.shift)
        return state, state


class Gained(Scaled):
    """A weight whose gradient of one step is a product of rows times what differs from step to step."""

    def forward(self, input, state):
        state = torch.tanh(input @ (self.weight * state.mean(0).cos()) + self.shift)
        return state, state


def test_a_gradient_is_not_added_up_before_a_factor_that_differs_from_step_to_step():
    cell, x = Gained().double(), torch.randn(7, 3, 4, dtype=F64)
    assert decision(cell, x, "eager").engine == "eager"
    assert_as_reference(cell, x, engine="eager")


@pytest.mark.parametrize("steps", [1, 7, 64])
def test_gradients_without_a_contraction_are_added_up_in_chunks(steps, monkeypatch):
    monkeypatch.setattr("unrolled.execution.batched.CHUNK_BYTES", 300)
    cell, x = Scaled().double(), torch.randn(steps, 3, 4, dtype=F64)
    assert decision(cell, x, "eager").engine == "eager"
    assert_as_reference(cell, x, engine="eager")


class ScaledProduct(torch.autograd.Function):
    """`a x y`, with gradients of its own; what is no tensor, and what has no gradient, may stand anywhere."""

    @staticmethod
    def forward(ctx: Any, a: float, x: Tensor, how: str, mask: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, mask)
        return a * x * y + mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, y, mask = ctx.saved_tensors
        return None, grad * y * mask, None, None, 2 * grad * x


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("constant", ["x", "y", "none"])
def test_arguments_of_a_function_that_have_no_gradient_stand_anywhere(engine, constant):
    class Cell(UserCell):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(I, H).double()

        def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            x, y = self.linear(input), torch.tanh(state)
            given = (x.detach() if constant == "x" else x, y.detach() if constant == "y" else y)
            state = ScaledProduct.apply(0.5, given[0], "by hand", (x > 0).to(x.dtype), given[1]) + 0.1 * x
            return state, state

    inputs = torch.randn(4, 3, I, dtype=F64)
    assert decision(Cell(), inputs, engine).engine == engine
    assert_as_reference(Cell(), inputs, engine=engine)


def _unseen(x: Tensor) -> Tensor:
    y = x * 1.5
    with torch.no_grad():
        y[:, ::2].clamp_(min=-0.1)
    return y


STATISTICS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "batch norm": lambda cell, x: F.batch_norm(x, cell.a.detach(), (cell.a * cell.a).detach() + 1, cell.b, cell.a),
    "of a count": lambda cell, x: F.batch_norm(x, (cell.a > 0).to(x.dtype), cell.b.detach().abs() + 1, cell.a, cell.b),
    "instance norm": lambda cell, x: F.instance_norm(
        x.unsqueeze(-1), cell.a.detach(), cell.b.detach().exp(), cell.b, cell.a, use_input_stats=False
    ).squeeze(-1),
}
BESIDE_COMPLEX: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a Function": lambda cell, x: Surrogate.apply(x - 0.1) + x,
    "a Function of several": lambda cell, x: ScaledProduct.apply(0.5, x, "by hand", (x > 0).to(x.dtype), torch.tanh(x)),
    "a write that autograd does not see": lambda cell, x: _unseen(x),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [*STATISTICS, *BESIDE_COMPLEX])
def test_functions_beside_complex_numbers_and_statistics_without_gradients(engine, name):
    class Cell(UserCell):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(I, H).double()
            self.a, self.b = nn.Parameter(torch.randn(H, dtype=F64)), nn.Parameter(torch.randn(H, dtype=F64))

        def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            x = self.linear(input) + state
            made = (STATISTICS | BESIDE_COMPLEX)[name](self, x)
            if name in BESIDE_COMPLEX:
                made = made + (torch.complex(made, x) * torch.exp(1j * self.a)).imag
            return made, torch.tanh(made)

    inputs, cell = torch.randn(4, 3, I, dtype=F64), Cell()
    assert decision(cell, inputs, engine).engine == engine, decision(cell, inputs, engine).why
    assert_as_reference(cell, inputs, engine=engine)
