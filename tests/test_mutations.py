"""Cells that read a value through random chains; one link is set anew between calls: the answer is the loop's."""

from __future__ import annotations

import os
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import unrolled as ur
from chains import LINKS, chain
from matching import assert_match

H = 3
DRAWS = 1000 if "UNROLLED_MUTATIONS" not in os.environ else int(os.environ["UNROLLED_MUTATIONS"])
"""How many values are set anew, two in each cell."""

# Where a cell's step finds the root of a chain: the source of the step's function, with `{}` for the root.
ROOTS = {
    "global": ("ROOT", "def f(cell, x):\n    return {value} * x"),
    "cell": ("cell.root", "def f(cell, x):\n    return {value} * x"),
    "closure": ("root", "def make(root):\n    def f(cell, x):\n        return {value} * x\n    return f"),
    "argument": (
        "root",
        "def f(cell, x, root=None):\n    return helper(x, ROOT)\ndef helper(x, root):\n    return {value} * x",
    ),
    "class": ("type(cell).shared", "def f(cell, x):\n    return {value} * x"),
    "backward": (
        "ROOT",
        "class F(torch.autograd.Function):\n"
        "    @staticmethod\n    def forward(ctx, x):\n        return x.clone()\n"
        "    @staticmethod\n    def backward(ctx, grad):\n        return {value} * grad\n"
        "def f(cell, x):\n    return F.apply(x)",
    ),
}


class Cell(nn.Module):
    """`h' = tanh(W h + f(self, x))`."""

    def __init__(self, f: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(H, H).double()
        self.f = f

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, H, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.linear(state) + self.f(self, input))
        return hidden, hidden


def made(root: str, names: list[str], array: bool) -> tuple[nn.Module, list[Callable[[float], None]]]:
    """A cell whose step reads 1.5 through a chain, and what sets each of its links anew."""
    found = chain(names, 1.5, array)
    where, source = ROOTS[root]
    module = types.ModuleType("written_today")
    vars(module).update(ROOT=found.root, torch=torch)
    exec(source.replace("{value}", found.expression.replace("{}", where)), vars(module))
    f = module.make(found.root) if root == "closure" else module.f
    kind = type("Mine", (Cell,), {"shared": found.root} if root == "class" else {})
    cell = kind(f)
    if root == "cell":
        cell.root = found.root
    at_root = {
        "global": lambda new: setattr(module, "ROOT", new),
        "argument": lambda new: setattr(module, "ROOT", new),
        "backward": lambda new: setattr(module, "ROOT", new),
        "cell": lambda new: setattr(cell, "root", new),
        "class": lambda new: setattr(kind, "shared", new),
    }
    put = list(found.put)
    if root in at_root:
        put.append(lambda new: at_root[root](chain(names, new, array).root))
    return cell, put


def results(rnn: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs and gradients."""
    outputs, _ = rnn(x)
    wanted = [x, *rnn.parameters()]
    return [outputs, *torch.autograd.grad(outputs.square().sum(), wanted)]


def assert_as_the_loop(rnn: nn.Module, cell: nn.Module, x: Tensor) -> None:
    for got, want in zip(results(rnn, x), results(ur.unroll(cell, engine="reference"), x), strict=True):
        assert_match(got, want)


@pytest.mark.parametrize("root", sorted(ROOTS))
@settings(
    max_examples=-(-DRAWS // (2 * len(ROOTS))),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(
    names=st.lists(st.sampled_from(sorted(LINKS)), max_size=3),
    array=st.booleans(),
    where=st.integers(0, 4),
    values=st.lists(st.sampled_from([0.5, 2.0, 1.0, -1.0]), min_size=2, max_size=2, unique=True),
)
def test_a_value_set_anew_is_read_anew(root, names, array, where, values):
    cell, put = made(root, names, array)
    x = torch.linspace(-1, 1, 3 * 2 * H, dtype=torch.float64).view(3, 2, H).requires_grad_()
    rnn = ur.unroll(cell, engine="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_as_the_loop(rnn, cell, x)
        if not put:
            return
        for value in values:
            put[where % len(put)](value)
            assert_as_the_loop(rnn, cell, x)


@pytest.mark.parametrize("name", sorted(LINKS))
def test_what_is_followed_does_not_cost_the_engine(name):
    """All links but the few that keep what they hold out of sight are followed, and the cell is recorded."""
    cell, _ = made("global", [name], array=False)
    rnn = ur.unroll(cell, engine="eager")
    rnn(torch.ones(3, 2, H, dtype=torch.float64))
    assert rnn.ran == "eager"
    assert ("has a witness" in rnn.plan(torch.ones(3, 2, H, dtype=torch.float64)).why) == (name == "lru_cache")


def test_without_guards_the_mutations_are_found(monkeypatch):
    """The test above can fail: with nothing looked at again, a changed global stays what it was."""
    monkeypatch.setattr("unrolled.recording.guards.environment.Environment.version", lambda self: 0)
    monkeypatch.setattr("unrolled.engine.witness.Turns.next", lambda self, steps, always: None)
    cell, put = made("global", ["attribute"], array=False)
    x = torch.ones(3, 2, H, dtype=torch.float64, requires_grad=True)
    rnn = ur.unroll(cell, engine="eager")
    assert_as_the_loop(rnn, cell, x)
    put[0](0.5)
    with pytest.raises(AssertionError):
        assert_as_the_loop(rnn, cell, x)
