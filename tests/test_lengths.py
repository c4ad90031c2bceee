"""Rows that end early: in every engine the numbers of each row on its own, and no work past its end."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, func, nn

import unrolled as ur
from matching import assert_match
from problems import AttendingCell, CountingCell, DelayCell, NestedCell, SharedStartCell, Surrogate, TokenCell, learned
from row_by_row import Batch, answers, padding_of
from unrolled.engine.native import bind, threads
from unrolled.engine.native.threads import shares
from unrolled.lengths import Extent
from unrolled.trees import Tree, leaves, map_leaves

F64 = torch.float64
ENGINES = ("reference", "eager", "native")
GARBAGE = [float("nan"), float("inf"), 1e300]
T, I, H, S = 6, 3, 4, 2


def drawn(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )


# -- cells -----------------------------------------------------------------------------------------------------------


class PairCell(nn.Module):
    """A pytree goes in, comes out and is handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ur.GRUCell(I, H)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tree:
        return {"h": torch.zeros(batch_size, H, device=device, dtype=dtype)}

    def forward(self, input: Tree, state: Tree) -> tuple[Tree, Tree]:
        x, (gate,) = input["x"], input["rest"]
        h, _ = self.inner(x, state["h"] * gate)
        return {"h": h, "both": (x.sum(-1), h * gate)}, {"h": h}


class SpikingCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input, self.hidden = nn.Linear(I, H), nn.Linear(H, H)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tree:
        return tuple(torch.zeros(batch_size, H, device=device, dtype=dtype) for _ in range(2))

    def forward(self, input: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        spikes, membrane = state
        membrane = 0.9 * membrane + self.input(input) + self.hidden(spikes) - spikes
        spikes = Surrogate.apply(membrane - 0.1)
        return spikes, (spikes, membrane)


class TwinStatesCell(nn.Module):
    """Two leaves that are handed the same value but do not begin alike, and one that holds what it began with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(H, H) / 2)
        self.input = nn.Linear(I, H)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tree:
        zeros = torch.zeros(batch_size, H, device=device, dtype=dtype)
        return zeros, zeros + 1, zeros - 1

    def forward(self, input: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        one, other, held = state
        h = torch.tanh(one @ self.weight + other * self.input(input) + held)
        return h + other, (h, h, held)


class RowsLastCell(nn.Module):
    """Inside of its step the rows are the last dimension; in an output they are folded with heads on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.input = nn.Parameter(torch.randn(H, H) / 2), nn.Parameter(torch.randn(H, I) / 2)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, H, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tree, Tensor]:
        columns = torch.tanh(self.weight @ state.T + self.input @ input.T)
        heads = F.linear(input.view(-1, I, 1) * state.unsqueeze(1), self.weight)
        return {"columns": columns.T, "heads": torch.sigmoid(heads).transpose(1, 2)}, columns.T


class HeadsCell(RowsLastCell):
    """Inside of its step the rows are folded with heads."""

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        heads = F.linear(state.view(-1, 2, H // 2), self.weight[: H // 2, : H // 2])
        h = torch.tanh(heads.flatten(1) + F.linear(input, self.input))
        return h, h


CELLS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: ur.LSTMCell(I, H),
    "GRU": lambda: ur.GRUCell(I, H),
    "RNN": lambda: ur.RNNCell(I, H),
    "LayerNormLSTM": lambda: ur.LayerNormLSTMCell(I, H),
    "PeepholeLSTM": lambda: ur.PeepholeLSTMCell(I, H),
    "SLSTM": lambda: ur.SLSTMCell(I, H),
    "MinGRU": lambda: ur.MinGRUCell(I, H),
    "learned start": lambda: learned(ur.LSTMCell),
    "shared start": lambda: SharedStartCell(I),
    "attending": lambda: AttendingCell(I, H),
    "pytrees": PairCell,
    "nested state": lambda: NestedCell(I, H),
    "counting": lambda: CountingCell(I),
    "delay": lambda: DelayCell(2, I),
    "tokens": lambda: TokenCell(7, H),
    "spiking": SpikingCell,
    "twin states": TwinStatesCell,
    "rows last": RowsLastCell,
    "heads": HeadsCell,
    "dropout": lambda: ur.DropoutCell(ur.LSTMCell(I, H), p=0.3),
    "zoneout": lambda: ur.ZoneoutCell(ur.GRUCell(I, H), p=0.2),
}


@cache
def network(name: str, engine: str, *, reverse: bool = False, batch_first: bool = False) -> ur.Unrolled:
    """One network for all tests: plans are made once."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        cell = CELLS[name]().double()
    return ur.Unrolled(cell, engine=engine, reverse=reverse, batch_first=batch_first, quiet=True)


def inputs_for(name: str, batch: int) -> Tree:
    if name == "tokens":
        return torch.randint(7, (T, batch))
    x = torch.randn(T, batch, I, dtype=F64)
    return {"x": x, "rest": (torch.rand(T, batch, H, dtype=F64),)} if name == "pytrees" else x


def batch_for(name: str, lengths: list[int], *, state: bool = False, resets: bool = False) -> Batch:
    """Random numbers of all that a cell is called with."""
    many = len(lengths)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        cell = network(name, "reference").cell
        first = cell.initial_state(many, dtype=F64) if state else None
        if state:
            first = map_leaves(lambda x: torch.randn_like(x) if x.is_floating_point() else x + 1, first)
            if name == "SLSTM":  # its n is a sum of exponentials: positive
                first = map_leaves(torch.abs, first)
        return Batch(
            inputs_for(name, many),
            lengths,
            first,
            torch.rand(T, many) < 0.4 if resets else None,
            torch.randn(many, S, H, dtype=F64) if name == "attending" else None,
        )


def assert_each_row_alone(net: nn.Module, batch: Batch, form: str, garbage: float = float("nan")) -> None:
    got, want = answers(net, batch, form, garbage), answers(net, batch)
    assert_match(got["outputs"], want["outputs"], "outputs")
    assert_match(got["last"], want["last"], "last state")
    largest = max(grad.abs().max().item() for grad in want["gradients"].values())
    for name, grad in want["gradients"].items():
        off = (got["gradients"][name] - grad).abs().max().item()
        assert off <= 1e-10 * largest, f"gradient by {name} is off by {off}"
    ended = padding_of(batch.lengths, batch.steps)
    assert all((leaf[ended] == 0).all() for leaf in leaves(got["outputs"]))
    assert all((g[ended] == 0).all() for name, g in got["gradients"].items() if name.startswith("inputs"))


# -- every cell in every engine --------------------------------------------------------------------------------------

FORMS = st.sampled_from(["list", "tensor", "packed"])


@st.composite
def five_rows(draw: Any) -> list[int]:
    """Lengths among which are 0, 1 and T; four rows have steps, so that all examples have one plan."""
    return draw(st.permutations([0, 1, T, draw(st.integers(1, T)), draw(st.integers(1, T))]))


def with_steps(lengths: list[int], form: str, *, ordered: bool) -> list[int]:
    """What a PackedSequence can hold: no row without a step."""
    if form != "packed":
        return lengths
    found = [n for n in lengths if n]
    return sorted(found, reverse=True) if ordered else found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CELLS)
def test_every_row_has_the_numbers_it_has_alone(name, engine):
    @drawn(8)
    @given(five_rows(), FORMS, st.booleans(), st.booleans(), st.sampled_from(GARBAGE))
    def check(lengths, form, reverse, state, garbage):
        form = "list" if name == "pytrees" else form
        lengths = with_steps(lengths, form, ordered=state)
        net = network(name, engine, reverse=reverse)
        assert_each_row_alone(net, batch_for(name, lengths, state=state), form, garbage)

    check()


RESETTING = ("learned start", "shared start", "attending", "pytrees", "counting", "delay", "twin states", "zoneout")
EVERY_ENGINE = [*itertools.product(CELLS, ENGINES[:2]), *itertools.product(RESETTING, ENGINES[2:])]


@pytest.mark.parametrize(("name", "engine"), EVERY_ENGINE)
def test_rows_start_afresh_where_they_are_told_to(name, engine):
    @drawn(6)
    @given(five_rows(), FORMS, st.booleans(), st.booleans())
    def check(lengths, form, reverse, state):
        form = "list" if name == "pytrees" else form
        lengths = with_steps(lengths, form, ordered=state)
        net = network(name, engine, reverse=reverse)
        assert_each_row_alone(net, batch_for(name, lengths, state=state, resets=True), form)
        whole = [T] * 4
        assert_each_row_alone(net, batch_for(name, whole, state=state, resets=True), "list")

    check()


@pytest.mark.parametrize("name", sorted({*CELLS} - {"tokens"}))
def test_each_engine_that_is_asked_for_is_the_one_that_runs(name):
    batch = batch_for(name, [0, 1, T, 2, 3])
    for engine in ENGINES:
        plan = network(name, engine).plan(batch.inputs, lengths=batch.lengths, context=batch.context)
        wanted = "eager" if (name, engine) == ("rows last", "native") else engine  # its product is none of rows
        assert plan.engine == wanted, plan.why


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch_first", [False, True])
def test_batches_of_any_size_and_rows_of_any_length(batch_first, engine):
    nets = [network("GRU", engine, reverse=reverse, batch_first=batch_first) for reverse in (False, True)]

    @drawn(12)
    @given(st.lists(st.integers(0, T), min_size=1, max_size=4).filter(any), FORMS, st.booleans(), st.booleans())
    def check(lengths, form, reverse, resets):
        form = "list" if 0 in lengths else form
        resets = resets and engine != "native"
        assert_each_row_alone(nets[reverse], batch_for("GRU", lengths, resets=resets), form)

    check()


# -- directions and layers -------------------------------------------------------------------------------------------


def layers(many: int, kind: str) -> list[Any]:
    cells = [learned(ur.GRUCell)] + [ur.GRUCell(H, H) for _ in range(many - 1)]
    if kind == "one way":
        return cells
    return [(cell, ur.GRUCell(cell.input_size, H)) for cell in (learned(ur.GRUCell), *(ur.GRUCell(2 * H, H),) * 2)][
        :many
    ]


@cache
def stacked(many: int, kind: str, engine: str, *, batch_first: bool = False) -> ur.Stack:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return ur.stack(layers(many, kind), engine=engine, batch_first=batch_first).double()


def states_for(net: nn.Module, many: int) -> Tree:
    if isinstance(net, ur.Unrolled):
        return torch.randn(many, H, dtype=F64)
    return tuple(states_for(part, many) for part in net.parts)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["one way", "both ways"])
@pytest.mark.parametrize("many", [1, 2, 3])
def test_layers_and_directions_row_by_row(many, kind, engine):
    @drawn(4)
    @given(five_rows(), FORMS, st.booleans(), st.booleans(), st.booleans())
    def check(lengths, form, batch_first, state, resets):
        lengths = with_steps(lengths, form, ordered=state)
        net = stacked(many, kind, engine, batch_first=batch_first)
        batch = batch_for("GRU", lengths, resets=resets and engine != "native")
        states = states_for(net, len(lengths)) if state else None
        assert_each_row_alone(net, batch._replace(state=states), form)

    check()


@pytest.mark.parametrize("engine", ENGINES)
def test_bidirectional_networks_row_by_row(engine):
    net = stacked(1, "both ways", engine).parts[0]
    for form, lengths in (("list", [T, 0, 1, 2, 3]), ("packed", [2, T, 1, 5]), ("packed", [T, 4, 3, 1])):
        batch = batch_for("GRU", lengths)
        assert_each_row_alone(net, batch._replace(state=states_for(net, len(lengths))), form)


def test_reversing_is_turning_each_row_around():
    """What a reversed network gives is what the cell gives on each row backwards, put back."""
    lengths, x = [2, T, 0, 5, 1], torch.randn(T, 5, I, dtype=F64)
    forwards, backwards = network("LSTM", "eager"), network("LSTM", "eager", reverse=True)
    turned = x.clone()
    for b, n in enumerate(lengths):
        turned[:n, b] = x[:n, b].flip(0)
    want, last = forwards(turned, lengths=lengths)
    got, got_last = backwards(x, lengths=lengths)
    for b, n in enumerate(lengths):
        assert_match(got[:n, b], want[:n, b].flip(0))
    assert_match(got_last, last)


# -- what padding, length 0 and full length mean ---------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "twin states", "rows last", "spiking"])
def test_garbage_in_the_padding_changes_not_one_bit(name, reverse, engine):
    net, batch = network(name, engine, reverse=reverse), batch_for(name, [3, 0, T, 1, 5], state=True)
    clean = answers(net, batch, "list", 0.0)
    for garbage in (*GARBAGE, -float("inf")):
        assert_match(answers(net, batch, "list", garbage), clean, bound=0.0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "twin states", "counting", "delay"])
def test_a_row_without_a_step_hands_on_what_it_was_given_with_a_gradient_of_one(name, reverse, engine):
    batch = batch_for(name, [0, T, 0, 2, 1], state=True)
    state = map_leaves(lambda x: x.requires_grad_() if x.is_floating_point() else x, batch.state)
    outputs, last = network(name, engine, reverse=reverse)(batch.inputs, state, lengths=batch.lengths)
    empty = [0, 2]
    for first, end in zip(leaves(state), leaves(last), strict=True):
        assert torch.equal(first[empty], end[empty])
        if first.is_floating_point():
            (grad,) = torch.autograd.grad(end[empty].sum(), first, retain_graph=True)
            assert (grad[empty] == 1).all()
            assert (grad[[1, 3, 4]] == 0).all()
    assert all((leaf[:, empty] == 0).all() for leaf in leaves(outputs))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["LSTM", "learned start", "pytrees", "tokens", "counting", "attending"])
def test_when_no_row_has_a_step_outputs_are_zero_and_states_what_they_were(name, engine):
    batch, net = batch_for(name, [0, 0, 0]), network(name, engine)
    outputs, last = net(batch.inputs, lengths=[0, 0, 0], context=batch.context)
    some, _ = net(batch.inputs, lengths=[1, 1, 1], context=batch.context)
    assert_match(outputs, map_leaves(torch.zeros_like, some), bound=0.0)
    assert_match(last, net.cell.initial_state(3, dtype=F64), bound=0.0)
    for leaf in leaves([outputs, last]):
        if leaf.requires_grad:
            leaf.sum().backward()  # gives zeros or ones, and above all: does not fail
    net.zero_grad()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reverse", [False, True])
def test_rows_that_all_reach_the_end_are_the_dense_run_to_the_bit(reverse, engine):
    net, batch = network("LSTM", engine, reverse=reverse), batch_for("LSTM", [T] * 4, state=True)
    outputs, last = net(batch.inputs, batch.state)
    for lengths in ([T] * 4, torch.full((4,), T), torch.full((4,), T, dtype=torch.uint8)):
        assert_match(net(batch.inputs, batch.state, lengths=lengths), (outputs, last), bound=0.0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_after_the_longest_row_is_as_if_it_were_cut_off(reverse, engine):
    net, batch = network("LSTM", engine, reverse=reverse), batch_for("LSTM", [4, 1, 4, 2])
    outputs, last = net(batch.inputs, lengths=batch.lengths)
    cut, cut_last = net(batch.inputs[:4], lengths=batch.lengths)
    assert_match((outputs[:4], last), (cut, cut_last), bound=0.0)
    assert (outputs[4:] == 0).all()
    assert_each_row_alone(net, batch_for("LSTM", [3, 3, 3, 3]), "list")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_has_the_same_numbers_in_any_order_of_rows(engine):
    net, batch = network("GRU", engine), batch_for("GRU", [3, 1, T, 0, 2])
    outputs, last = net(batch.inputs, lengths=batch.lengths)
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 17):
        turned, turned_last = net(batch.inputs[:, order], lengths=[batch.lengths[b] for b in order])
        assert_match((turned, turned_last), (outputs[:, order], last[list(order)]))


def _laid_out(x: Tensor) -> dict[str, Tensor]:
    """The same numbers in other layouts."""
    wide = torch.randn(2 * len(x), x.shape[1], 2 * x.shape[2], dtype=x.dtype)
    wide[::2, :, ::2] = x
    return {
        "every second": wide[::2, :, ::2],
        "batch first in memory": x.transpose(0, 1).contiguous().transpose(0, 1),
        "features first in memory": x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "turned in time": x.flip(0).contiguous().flip(0),
    }


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reverse", [False, True])
def test_inputs_and_states_of_any_layout(reverse, engine):
    net, batch = network("LSTM", engine, reverse=reverse), batch_for("LSTM", [3, 0, T, 1, 5], state=True)
    want = net(batch.inputs, batch.state, lengths=batch.lengths)
    state = map_leaves(lambda h: h.T.contiguous().T, batch.state)
    for name, inputs in _laid_out(batch.inputs).items():
        asked = inputs.detach().requires_grad_()
        assert_match(net(asked, state, lengths=batch.lengths), want, name)
    same = batch.inputs[:1, :1].expand(T, 5, I)
    got = net(same, batch.state, lengths=batch.lengths)
    assert_match(got, net(same.contiguous(), batch.state, lengths=batch.lengths))


# -- autograd, compilers, threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "learned start", "counting", "twin states"])
def test_second_derivatives(name, reverse, engine):
    def found(engine: str) -> list[Tensor]:
        net, batch = network(name, engine, reverse=reverse), batch_for(name, [3, 0, T, 1, 5])
        x = batch.inputs.clone().requires_grad_()
        outputs, last = net(x, lengths=batch.lengths)
        total = (outputs**2).sum() + sum((leaf**2).sum() for leaf in leaves(last) if leaf.is_floating_point())
        by = [x, *net.parameters()]
        first = torch.autograd.grad(total, by, create_graph=True)
        return [*first, *torch.autograd.grad(sum((g**2).sum() for g in first), by, allow_unused=True)]

    assert_match(found(engine), found("reference"))


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_against_finite_differences(engine):
    net = network("GRU", engine)

    def run(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return net(x, h, lengths=[2, 0, 3])

    x, h = torch.randn(3, 3, I, dtype=F64, requires_grad=True), torch.randn(3, H, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, h))
    assert torch.autograd.gradgradcheck(run, (x, h))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reverse", [False, True])
def test_transforms_of_torch_func(reverse, engine):
    net, batch = network("LSTM", engine, reverse=reverse), batch_for("LSTM", [3, 0, T, 1, 5])

    def loss(x: Tensor) -> Tensor:
        outputs, last = net(x, lengths=batch.lengths)
        return (outputs**2).sum() + sum(leaf.sum() for leaf in leaves(last))

    x, v = batch.inputs.clone().requires_grad_(), torch.randn_like(batch.inputs)
    (want,) = torch.autograd.grad(loss(x), x)
    x = x.detach()
    assert_match(func.grad(loss)(x), want)
    assert_match(func.jvp(loss, (x,), (v,))[1], (want * v).sum())
    many = torch.stack([x, v])
    assert_match(func.vmap(loss)(many), torch.stack([loss(x), loss(v)]))
    assert_match(func.vmap(func.grad(loss))(many)[0], want)
    net.zero_grad()


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_of_the_outputs_alone_or_of_the_last_states_alone(engine):
    def found(engine: str) -> list[Tensor]:
        net, batch = network("LSTM", engine), batch_for("LSTM", [3, 0, T, 1, 5], state=True)
        x, first = batch.inputs.clone().requires_grad_(), map_leaves(lambda h: h.requires_grad_(), batch.state)
        outputs, (h, c) = net(x, first, lengths=batch.lengths)
        by = [x, *leaves(first), *net.parameters()]
        return [
            grad
            for loss in (outputs.sum(), outputs[2, 0].sum(), h.sum(), c[3].sum())
            for grad in torch.autograd.grad(loss, by, retain_graph=True)
        ]

    assert_match(found(engine), found("reference"))


@pytest.mark.parametrize("engine", ENGINES)
def test_modes_without_gradients(engine):
    net, batch = network("LSTM", engine), batch_for("LSTM", [3, 0, T, 1, 5])
    want = net(batch.inputs, lengths=batch.lengths)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_match(net(batch.inputs, lengths=batch.lengths), want)


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_and_states_are_the_callers_to_write_into(engine):
    net, batch = network("twin states", engine), batch_for("twin states", [3, 0, T, 1, 5], state=True)
    kept = map_leaves(torch.clone, (batch.inputs, batch.state))
    outputs, last = net(batch.inputs, batch.state, lengths=batch.lengths)
    with torch.no_grad():
        before = [leaf.clone() for leaf in leaves([outputs, last])]
        for leaf in leaves([outputs, last]):
            leaf += 1
    assert_match((batch.inputs, batch.state), kept, bound=0.0)
    assert_match(leaves([outputs, last]), [leaf + 1 for leaf in before], bound=0.0)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("engine", ["reference", "eager"])
def test_a_compiled_caller_gets_the_same_numbers(engine):
    net, batch = network("GRU", engine), batch_for("GRU", [3, 0, T, 1, 5], resets=True)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        outputs, last = net(2 * x, lengths=batch.lengths, resets=batch.resets)
        return outputs * 3, last

    compiled = torch.compile(run, backend="eager")
    asked = [batch.inputs.clone().requires_grad_() for _ in range(2)]
    got, want = compiled(asked[0]), run(asked[1])
    assert_match(got, want)
    for result in (got, want):
        sum(leaf.sum() for leaf in leaves(result)).backward()
    assert_match(asked[0].grad, asked[1].grad)
    net.zero_grad()


@pytest.fixture
def a_team(monkeypatch):
    """Two threads, which share even the smallest work."""
    monkeypatch.setattr(threads, "_WORTH_A_TEAM", 0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("a_team")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "LayerNormLSTM", "twin states", "rows last"])
def test_threads_that_share_the_rows_by_length_give_each_row_its_numbers(name, reverse):
    net = network(name, "native", reverse=reverse)
    for lengths in (
        [T, 0, 1, 1, 1],
        [1, 2, 3, 4, 5],
        [T, T, T, T, 1],
        [2, 1, 0, 0, 0],
        [3, 0, 0, 0, 0],
        [T, T, 0, 1, 4],
    ):
        batch = batch_for(name, lengths, state=True)
        assert_each_row_alone(net, batch, "list")
        once = answers(net, batch, "list")
        assert_match(answers(net, batch, "list"), once, bound=0.0)


@drawn(200)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 8))
def test_shares_are_all_rows_in_order_and_none_has_much_more_to_do(lengths, threads):
    lengths = sorted(lengths, reverse=True)
    extent = Extent(lengths[0], len(lengths), tuple(sum(n > t for n in lengths) for t in range(lengths[0])))
    if not extent.ragged or len(set(lengths)) == 1:
        return
    bounds = shares(extent, threads)
    assert len(bounds) == threads + 1
    assert (bounds[0], bounds[-1]) == (0, len(lengths))
    assert bounds == sorted(bounds)
    work = [sum(lengths[a:b]) + 3 * lengths[a] for a, b in itertools.pairwise(bounds) if a < b]
    assert max(work) <= sum(lengths) / threads + 4 * lengths[0] + 1


# -- a row that has ended costs nothing ------------------------------------------------------------------------------


class Tally(nn.Module):
    """Counts the rows that it is run on."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.inner = ur.RNNCell(I, H)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return self.inner.initial_state(batch_size, device, dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.rows.append(len(input))
        return self.inner(input, state)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [[3, 0, T, 1, 5], [1, 1, 1], [T], [2]], ids=str)
def test_the_reference_runs_a_cell_on_as_many_rows_as_have_steps(lengths, reverse):
    cell = Tally()
    rnn = ur.unroll(cell, engine="reference", reverse=reverse)
    x = torch.randn(T, len(lengths), I)
    rnn(x, lengths=lengths)
    alive = [sum(n > t for n in lengths) for t in range(max(lengths))]
    assert cell.rows == (alive[::-1] if reverse else alive)


def test_engines_are_given_no_row_that_has_ended(monkeypatch):
    seen = []
    run = bind.NativeLoop.__call__

    def spied(loop: Any, request: Any) -> Any:
        seen.append(request.extent.rows)
        assert all(len(sequence) == request.extent.rows for sequence in request.sequences)
        return run(loop, request)

    net, batch = network("LSTM", "native"), batch_for("LSTM", [3, 0, T, 1, 5])
    net(batch.inputs, lengths=batch.lengths)
    monkeypatch.setattr(bind.NativeLoop, "__call__", spied)
    monkeypatch.setattr("unrolled.engine.witness.Turns.next", lambda self, steps, always: None)
    net(batch.inputs, lengths=batch.lengths)[0].sum().backward()
    net.zero_grad()
    assert seen == [15, 15]
