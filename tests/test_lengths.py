"""Rows that end early: in every engine the numbers of each row on its own, and no work past its end."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import unrolled as ur
from matching import assert_match
from problems import AttendingCell, CountingCell, DelayCell, NestedCell, SharedStartCell, TokenCell
from row_by_row import Batch, answers, garbage_in, padding_of
from unrolled.engine.native import bind
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


class Spike(torch.autograd.Function):
    """Written the old way, which no transform and no batching over steps can look into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (1 + 5 * x.abs()) ** 2


class SpikingCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input, self.hidden = nn.Linear(I, H), nn.Linear(H, H)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tree:
        return tuple(torch.zeros(batch_size, H, device=device, dtype=dtype) for _ in range(2))

    def forward(self, input: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        spikes, membrane = state
        membrane = 0.9 * membrane + self.input(input) + self.hidden(spikes) - spikes
        spikes = Spike.apply(membrane - 0.1)
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
    """Inside of its step the rows are the last dimension, or folded with features."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.input = nn.Parameter(torch.randn(H, H) / 2), nn.Parameter(torch.randn(H, I) / 2)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, H, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tree, Tensor]:
        columns = torch.tanh(self.weight @ state.T + self.input @ input.T)
        heads = state.view(-1, H // 2) @ self.weight[: H // 2, : H // 2]
        h = columns.T.contiguous() + 0.1 * heads.view(-1, H)
        return {"h": h, "heads": torch.sigmoid(heads).reshape(-1, 2, H // 2).transpose(1, 2)}, h


def learned(kind: type[nn.Module]) -> nn.Module:
    cell = kind(I, H, learn_initial_state=True)
    for name, parameter in cell.named_parameters():
        if name.startswith("initial"):
            nn.init.normal_(parameter)
    return cell


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
