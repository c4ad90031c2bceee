"""Cells as other libraries write them: parameters in objects, scratch in attributes, things that no step reads.

Their own cells are run in `tests/strangers`; here is each of their ways, small, and others of its kind.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import transforms

import unrolled as ur
from matching import assert_match
from random_cells import ENGINES, assert_as_reference, decision, unrolled

F64 = torch.float64
T, B, H = 4, 3, 5


def inputs(rows: int = B) -> Tensor:
    return torch.randn(T, rows, H, dtype=F64)


class Cell(nn.Module):
    """`h' = tanh(W h + x)`, with what a test lets it hold."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(H, H, dtype=F64)
        for name, value in held.items():
            setattr(self, name, value)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, H, dtype=F64)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.linear(state) + input)
        return hidden, hidden


def recorded(cell: nn.Module, engine: str = "native", x: Tensor | None = None) -> str:
    """The engine of a cell's plan, and the reason if it is the reference."""
    found = decision(cell, inputs() if x is None else x, engine)
    return found.engine if found.plan is not None else found.why


# -- scratch ----------------------------------------------------------------------------------------------------------


class MembraneInBuffer(Cell):
    """Takes its state as an argument and keeps it in a buffer all the same, anew where the batch is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mem", torch.zeros(0, dtype=F64), persistent=False)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.mem = state
        if self.mem.shape != input.shape:
            self.mem = torch.zeros_like(input)
        self.mem = torch.tanh(self.linear(self.mem) + input)
        return self.mem, self.mem


class ShapeNoted(Cell):
    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.shape, self.rows = tuple(input.shape), len(input)
        return super().forward(input, state)


class NotedInDict(Cell):
    def __init__(self) -> None:
        super().__init__(last={})

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.last["sum"] = self.linear(state) + input
        hidden = torch.tanh(self.last["sum"])
        return hidden, hidden


class NotedInPart(Cell):
    def __init__(self) -> None:
        super().__init__(part=nn.Identity())

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.part.trace = (self.linear(state), [input])
        hidden = torch.tanh(self.part.trace[0] + self.part.trace[1][0])
        return hidden, hidden


SCRATCH = [MembraneInBuffer, ShapeNoted, NotedInDict, NotedInPart]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", SCRATCH)
def test_what_no_step_reads_is_scratch_fresh_and_after_a_run_of_the_cells_own(kind, engine):
    cell, x = kind(), inputs()
    assert recorded(cell, engine, x) == engine
    assert_as_reference(cell, x, engine=engine)
    hidden = torch.zeros(2, H, dtype=F64)
    for step in inputs(2):
        _, hidden = cell(step, hidden)
    assert recorded(cell, engine, x) == engine
    assert_as_reference(cell, x, engine=engine)


def test_scratch_with_lengths_and_resets():
    cell, x, lengths = MembraneInBuffer(), inputs(), torch.tensor([4, 0, 2])
    fast, slow = unrolled(cell, "native"), unrolled(copy.deepcopy(cell), "reference")
    assert_match(fast(x, lengths=lengths), slow(x, lengths=lengths))
    assert fast.ran == "native"
    resets = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    assert_match(fast(x, resets=resets), slow(x, resets=resets))
    assert fast.ran == "native"


class ReadBack(Cell):
    """Reads a buffer before it replaces it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(H, dtype=F64))

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.linear(state) + input - self.mean)
        self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        return hidden, hidden


class OtherGain(Cell):
    """Multiplies by one number in its first step and by another one in all others."""

    def __init__(self) -> None:
        super().__init__(gain=2.0)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.linear(state) + self.gain * input)
        self.gain = 0.5
        return hidden, hidden


class AsksForTheLastShape(Cell):
    """Does something else where as many rows came before."""

    def __init__(self) -> None:
        super().__init__(last=torch.zeros(0))

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.linear(state) + (2 if self.last.shape == input.shape else 1) * input)
        self.last = hidden
        return hidden, hidden


class MadeWhenNeeded(Cell):
    def __init__(self) -> None:
        super().__init__(mask=None)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if self.mask is None:
            self.mask = torch.ones(H, dtype=F64).cumsum(0)
        hidden = torch.tanh(self.linear(state) + self.mask * input)
        return hidden, hidden


class Counting(Cell):
    calls = 0

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return super().forward(input, state)


STATE = {
    ReadBack: "its step reads mean, which the step before it left; attributes that keep a state are named: "
    "as_cell(module, state_attributes=('mean',))",
    OtherGain: "what its step does depends on gain, which the step before it left",
    AsksForTheLastShape: "what its step does depends on last, which the step before it left",
    MadeWhenNeeded: "its first step makes mask, and later ones read it; make it in __init__",
    Counting: "every step leaves something else in calls for the next one",
}


@pytest.mark.parametrize("kind", STATE)
def test_what_a_later_step_reads_is_state_and_the_plan_says_so(kind):
    assert recorded(kind()) == STATE[kind]


@pytest.mark.parametrize("kind", [ReadBack, OtherGain, AsksForTheLastShape, Counting])
def test_state_in_attributes_is_run_as_the_loop_runs_it(kind):
    cell, x = kind(), inputs()
    twin = copy.deepcopy(cell)
    fast, slow = unrolled(cell, "native"), unrolled(twin, "reference")
    for _ in range(2):
        assert_match(fast(x), slow(x))


def test_what_a_first_step_made_is_recorded_once_it_is_there():
    cell, x = MadeWhenNeeded(), inputs()
    cell(x[0], cell.initial_state(B))
    assert recorded(cell, x=x) == "native"
    assert_as_reference(cell, x, engine="native")


# -- tensors wherever a cell keeps them -------------------------------------------------------------------------------


class Constants(NamedTuple):
    gain: Tensor
    bias: Tensor
    method: str = "tanh"


@dataclasses.dataclass
class Settings:
    gain: Tensor
    bias: Tensor


@dataclasses.dataclass(slots=True)
class Slots:
    gain: Tensor
    bias: Tensor


class Anything:
    def __init__(self, gain: Tensor, bias: Tensor) -> None:
        self.inner = {"gain": [gain], 0: (bias,)}

    gain = property(lambda self: self.inner["gain"][0])
    bias = property(lambda self: self.inner[0][0])


class WithConstants(Cell):
    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        gain, bias = self.read()
        hidden = torch.tanh(self.linear(state) + gain * input + bias)
        return hidden, hidden

    def read(self) -> tuple[Tensor, Tensor]:
        return self.constants.gain, self.constants.bias


class InPairs(WithConstants):
    def read(self) -> tuple[Tensor, Tensor]:
        return self.constants[0][0], self.constants[1]["bias"]


class InPartial(WithConstants):
    def read(self) -> tuple[Tensor, Tensor]:
        return self.constants()


def pair(gain: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return gain, bias


HOLDERS: dict[str, Callable[[Tensor, Tensor], nn.Module]] = {
    "named tuple": lambda gain, bias: WithConstants(constants=Constants(gain, bias)),
    "dataclass": lambda gain, bias: WithConstants(constants=Settings(gain, bias)),
    "slots": lambda gain, bias: WithConstants(constants=Slots(gain, bias)),
    "object": lambda gain, bias: WithConstants(constants=Anything(gain, bias)),
    "tuples and dicts": lambda gain, bias: InPairs(constants=((gain,), {"bias": bias})),
    "partial": lambda gain, bias: InPartial(constants=functools.partial(pair, gain, bias=bias)),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", HOLDERS)
def test_tensors_in_objects_are_read_anew_at_every_call(name, engine):
    gain, bias = torch.tensor(0.7, dtype=F64), torch.randn(H, dtype=F64)
    cell, x = HOLDERS[name](gain, bias), inputs()
    assert recorded(cell, engine, x) == engine
    assert_as_reference(cell, x, engine=engine)
    rnn = unrolled(cell, engine)
    rnn(x)
    with torch.no_grad():
        gain.fill_(1.3)
        bias.mul_(2)
    assert_match(rnn(x), unrolled(cell, "reference")(x))


def test_a_tensor_in_an_object_may_be_trained_and_be_another_one():
    gain, bias = torch.tensor(0.7, dtype=F64, requires_grad=True), torch.zeros(H, dtype=F64, requires_grad=True)
    cell, x = WithConstants(constants=Settings(gain, bias)), inputs()
    rnn, slow = unrolled(cell, "native"), unrolled(cell, "reference")
    optimiser = torch.optim.SGD([gain, bias, *cell.parameters()], 0.1)
    for _ in range(5):
        wanted = torch.autograd.grad(slow(x)[0].square().sum(), [gain, bias, cell.linear.weight])
        optimiser.zero_grad()
        rnn(x)[0].square().sum().backward()
        assert_match((gain.grad, bias.grad, cell.linear.weight.grad), wanted)
        optimiser.step()
    assert rnn.ran == "native"
    cell.constants = Settings(torch.randn(H, dtype=F64), torch.tensor(0.1, dtype=F64))  # of other shapes
    assert_match(rnn(x), slow(x))
    cell.constants.gain = torch.tensor(2.0, dtype=F64)
    assert_match(rnn(x), slow(x))


GAIN = torch.tensor(0.7, dtype=F64, requires_grad=True)
TABLE = {"gains": [torch.tensor(0.7, dtype=F64)]}


class ReadsAGlobal(Cell):
    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.linear(state) + GAIN * input + TABLE["gains"][0])
        return hidden, hidden


@pytest.mark.parametrize("engine", ENGINES)
def test_tensors_in_globals_and_closures(engine, monkeypatch):
    x, scale = inputs(), torch.linspace(0.5, 1.5, H, dtype=F64).requires_grad_()
    cell = ReadsAGlobal()
    rnn = unrolled(cell, engine)
    found, wanted = ([r(x)[0], GAIN] for r in (rnn, unrolled(cell, "reference")))
    assert_match(found[0], wanted[0])
    grads = [torch.autograd.grad(out.square().sum(), GAIN) for out, _ in (found, wanted)]
    assert_match(*grads)
    assert rnn.ran == engine
    monkeypatch.setitem(TABLE, "gains", [torch.tensor(-1.0, dtype=F64)])  # another tensor
    assert_match(rnn(x), unrolled(cell, "reference")(x))
    assert rnn.ran == engine

    scaled = ur.as_cell(lambda x, state: (state * scale, torch.tanh(state * scale + x)))
    start = torch.zeros(B, H, dtype=F64)
    fast, slow = unrolled(scaled, engine)(x, start)[0], unrolled(scaled, "reference")(x, start)[0]
    assert_match(fast, slow)
    assert_match(*(torch.autograd.grad(out.square().sum(), scale) for out in (fast, slow)))
    assert decision(scaled, x, engine, start).engine == engine


# -- what no step reads -----------------------------------------------------------------------------------------------


class Wiring:
    """Drawn once: nothing of it is read by a step but how many there are."""

    def __init__(self) -> None:
        self.rng = np.random.RandomState(0)
        self.matrix = self.rng.rand(100, 100)
        self.units = H


class Wired(Cell):
    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(input * self.wiring.units, state)


class ReadsTheMatrix(Cell):
    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(input * float(self.wiring.matrix[0, 0]), state)


class ReadsByName(Cell):
    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(input * float(getattr(self.wiring, "mat" + "rix")[0, 0]), state)


def test_what_no_step_reads_need_not_be_compared():
    cell, x = Wired(wiring=Wiring()), inputs()
    rnn = unrolled(cell, "native")
    rnn(x)
    assert rnn.ran == "native"
    cell.wiring.units = 2  # which is read
    assert_match(rnn(x), unrolled(cell, "reference")(x))
    cell.wiring.rng = np.random.RandomState(1)
    assert_match(rnn(x), unrolled(cell, "reference")(x))
    assert rnn.ran == "native"


@pytest.mark.parametrize("kind", [ReadsTheMatrix, ReadsByName])
def test_what_a_step_reads_must_be_seen_to_change(kind):
    cell, x = kind(wiring=Wiring()), inputs()
    assert "whose changes cannot be seen" in recorded(cell)
    rnn = unrolled(cell, "native")
    rnn(x)
    cell.wiring.matrix *= 2
    assert_match(rnn(x), unrolled(cell, "reference")(x))


class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


class Spiking(Cell):
    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.linear(state) + input
        return Half.apply(hidden), hidden


def test_a_function_of_autograds_is_followed(monkeypatch):
    cell, x = Spiking(), inputs()
    assert decision(cell, x, "native").open == ""
    rnn = unrolled(cell, "native")
    assert_match(rnn(x), unrolled(cell, "reference")(x))
    monkeypatch.setattr(Half, "backward", staticmethod(lambda ctx, grad: grad * 3))
    grads = [torch.autograd.grad(r(x)[0].sum(), cell.linear.weight) for r in (rnn, unrolled(cell, "reference"))]
    assert_match(*grads)


# -- tensors with a graph ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", [lambda t: [t], lambda t: {"t": (t,)}, lambda t: Settings(t, t), lambda t: t])
def test_a_cell_that_ran_before_holds_tensors_with_a_graph(hold):
    cell = Cell()
    cell.last = hold(cell(inputs()[0], cell.initial_state(B))[0])
    assert recorded(cell) == "native"


def test_a_tensor_with_a_graph_out_of_reach_is_named_as_what_it_is():
    cell = Cell()
    cell.last = {cell(inputs()[0], cell.initial_state(B))[0]}
    assert recorded(cell) == (
        "it cannot be copied to be recorded: it holds a tensor with a graph where it cannot be found; detach it"
    )


class Transformed(Cell):
    """Calls an object of torch's that has settings."""

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(input, self.call(state))


def normed(cell: Cell) -> Cell:
    cell.linear = nn.utils.spectral_norm(cell.linear)
    return cell


def settings_of(cell: nn.Module) -> Any:
    """What holds the settings that a test changes."""
    return next(iter(cell.linear._forward_pre_hooks.values()), None) or cell.call


@pytest.mark.parametrize(
    ("made", "changed"),
    [
        (lambda: Transformed(call=transforms.AffineTransform(0.5, 1.0)), ("scale", 3.0)),
        (lambda: Transformed(call=transforms.PowerTransform(torch.tensor(2.0))), ("exponent", torch.tensor(4.0))),
        (lambda: normed(Cell()), ("dim", 1)),
    ],
    ids=["transform", "power", "hook"],
)
def test_settings_of_torchs_own_objects_are_compared(made, changed):
    cell, x = made().eval(), inputs()
    rnn = unrolled(cell, "eager")
    for _ in range(4):  # the latest of them has a witness
        rnn(x)
    setattr(settings_of(cell), *changed)
    assert_match(rnn(x), unrolled(cell, "reference")(x))
    assert rnn.ran == "eager"
