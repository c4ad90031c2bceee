"""What cannot be followed is witnessed; what moves at every call, or is changed by the step, is the reference's."""

from __future__ import annotations

import collections
import functools
import gc
import operator
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from matching import assert_match
from unrolled.recording.guards.environment import Environment

T, B, H = 5, 2, 3


class Cell(nn.Module):
    """`h' = tanh(W h + f(x))`."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(H, H).double()
        self.f = f

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, H, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.linear(state) + self.f(input))
        return hidden, hidden


class Box:
    """Holds a number."""

    def __init__(self) -> None:
        self.gain = 1.5


BOX, LOCAL, LARGE = Box(), threading.local(), np.full(4096, 1.5)
LOCAL.gain = 1.5
ENVIRONMENT = "UNROLLED_TEST_GAIN"
SEEN: list[int] = []
LATEST = SimpleNamespace(size=0, gain=1.5)
ENDLESS = iter(collections.deque([1.5] * 10_000))


@functools.lru_cache
def remembered() -> float:
    return BOX.gain


def _forgetful(gain: float) -> None:
    BOX.gain = gain
    remembered.cache_clear()


def _set(owner: Any, name: str) -> Callable[[float], None]:
    return lambda gain: setattr(owner, name, gain)


OUT_OF_SIGHT: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], None]]] = {
    "lru_cache": (lambda x: remembered() * x, _forgetful),
    "attrgetter": (lambda x: operator.attrgetter("gain")(BOX) * x, _set(BOX, "gain")),
    "thread's own": (lambda x: LOCAL.gain * x, _set(LOCAL, "gain")),
    "large array": (lambda x: float(LARGE[7]) * x, LARGE.fill),
    "environment": (
        lambda x: float(os.environ.get(ENVIRONMENT, "1.5")) * x,
        lambda gain: os.environ.update({ENVIRONMENT: str(gain)}),
    ),
    "eval": (lambda x: eval("BOX.gain") * x, _set(BOX, "gain")),
    "globals()": (lambda x: globals()["BOX"].gain * x, _set(BOX, "gain")),
    "sys.modules": (lambda x: sys.modules[__name__].BOX.gain * x, _set(BOX, "gain")),
}


@pytest.fixture(autouse=True)
def as_before():
    yield
    os.environ.pop(ENVIRONMENT, None)
    BOX.gain = LOCAL.gain = LATEST.gain = 1.5
    LARGE.fill(1.5)
    remembered.cache_clear()


def _found(rnn: nn.Module, x: Tensor) -> list[Tensor]:
    outputs, _ = rnn(x)
    return [outputs, *torch.autograd.grad(outputs.square().sum(), list(rnn.parameters()))]


@pytest.mark.filterwarnings("ignore:copy")
@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("name", OUT_OF_SIGHT)
def test_what_is_out_of_sight_is_read_anew(name, engine):
    f, put = OUT_OF_SIGHT[name]
    cell, x = Cell(f), torch.randn(T, B, H, dtype=torch.float64)
    rnn, slow = ur.unroll(cell, engine=engine), ur.unroll(cell, engine="reference")
    for gain in (1.5, 1.5, 0.5, 0.5, 2.0, 1.5):
        put(gain)
        assert_match(_found(rnn, x), _found(slow, x))
        assert rnn.ran == engine


def test_a_file_is_read_anew_and_the_warning_says_what_was_seen(tmp_path: Path):
    file = tmp_path / "gain"
    cell, x = Cell(lambda x: float(open(file).read()) * x), torch.randn(T, B, H, dtype=torch.float64)  # noqa: PTH123, SIM115
    rnn = ur.unroll(cell)
    file.write_text("1.5")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        rnn(x)
        assert "witness" in rnn.plan(x).why
        file.write_text("0.5")
        with pytest.warns(
            UserWarning, match=r"copy \d of Cell: .* where the cell gives .*open.* recorded anew"
        ) as told:
            got = rnn(x)
        assert told[0].filename == __file__
        assert_match(got, ur.unroll(cell, engine="reference")(x))


def test_a_value_that_is_new_at_every_call_is_left_to_the_reference_until_it_stands_still():
    cell, x = Cell(lambda x: BOX.gain * x), torch.randn(T, B, H, dtype=torch.float64)
    rnn, slow, ran = ur.unroll(cell), ur.unroll(cell, engine="reference"), []
    for n in range(8):
        BOX.gain = 1 + n / 8
        assert_match(rnn(x), slow(x))
        ran.append(rnn.ran)
    assert ran[:4] == ["native"] * 4
    assert ran[5:] == ["reference"] * 3
    for _ in range(2):
        assert_match(rnn(x), slow(x))
    assert rnn.ran == "native"


def test_values_that_come_back_find_their_plan():
    cell, x = Cell(lambda x: BOX.gain * x), torch.randn(T, B, H, dtype=torch.float64)
    rnn = ur.unroll(cell)
    for n in range(12):
        BOX.gain = (1.5, 0.5)[n % 2]
        assert_match(rnn(x), ur.unroll(cell, engine="reference")(x))
        assert rnn.ran == "native"


def _counted(x: Tensor) -> Tensor:
    SEEN.append(len(x))
    return x


def _latest(x: Tensor) -> Tensor:
    LATEST.size += 1
    return x * LATEST.gain


SUM, TALLY, GRID = torch.zeros(2, H, dtype=torch.float64), np.zeros(4096), np.zeros(3)


def _summed(x: Tensor) -> Tensor:
    SUM[0].add_(1)
    return x + SUM[1]


def _tallied(x: Tensor) -> Tensor:
    TALLY[7] += 1
    GRID[0] += 1
    return x


CHANGING: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], Any]]] = {
    "list": (_counted, lambda: list(SEEN)),
    "object": (_latest, lambda: LATEST.size),
    "tensor": (_summed, lambda: int(SUM[0, 0])),
    "large array": (_tallied, lambda: int(TALLY[7])),
    "array": (_tallied, lambda: int(GRID[0])),
    "iterator": (lambda x: x * next(ENDLESS), lambda: ENDLESS.__length_hint__()),
}


def test_a_step_that_prints_prints_for_every_copy(capsys):
    rnn = ur.unroll(Cell(lambda x: x + (print("step") or 0)))
    rnn(torch.randn(T, B, H, dtype=torch.float64))
    assert capsys.readouterr().out == "step\n" * T


@pytest.mark.filterwarnings("ignore:engine=")
@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("name", CHANGING)
def test_what_a_step_changes_outside_is_changed_once_for_each_copy(name, engine):
    f, state = CHANGING[name]
    rnn, x = ur.unroll(Cell(f), engine=engine), torch.randn(T, B, H, dtype=torch.float64)
    before = state()
    rnn.plan(x)
    rnn.plan(x, lengths=[T, 1])
    assert state() == before, "asking for a plan changed it"
    rnn(x)
    apart = len(state()) - len(before) if isinstance(before, list) else abs(state() - before)
    assert apart == T
    assert rnn.ran == "reference"
    assert "outside of the cell" in rnn.plan(x).why


def test_nothing_is_collected_in_the_middle_of_a_watched_step():
    """Who asks to be called at collections would be taken for a part of the step."""

    def step() -> Tensor:
        raise RuntimeError(f"collecting: {gc.isenabled()}")

    with pytest.raises(RuntimeError, match="collecting: False"):
        Environment().watch(Cell(torch.tanh), [], step, [])
    assert gc.isenabled()


def test_a_witness_that_agrees_costs_nothing_but_time():
    cell, x = Cell(lambda x: remembered() * x), torch.randn(T, B, H, dtype=torch.float64, requires_grad=True)
    rnn, before = ur.unroll(cell), torch.get_rng_state()
    rnn.cell.linear.weight.register_hook(lambda grad: SEEN.append(-1))
    for _ in range(4):
        rnn(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert -1 not in SEEN
    assert rnn.cell.linear.weight.grad is None
