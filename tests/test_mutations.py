"""Cells that read a value through random chains; one link is set anew between calls: the answer is the loop's."""

from __future__ import annotations

import collections
import functools
import os
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import unrolled as ur
from chains import LINKS, chain
from matching import assert_match
from unrolled.recording.guards.environment import Environment
from unrolled.recording.guards.fingerprint import fingerprint
from unrolled.recording.guards.look import Look
from unrolled.recording.guards.twin import watch_step

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


def _drawn(examples: int) -> Callable[..., Any]:
    """Chains, which of their links is set anew, and to which two values."""
    drawn = given(
        names=st.lists(st.sampled_from(sorted(LINKS)), max_size=3),
        array=st.booleans(),
        where=st.integers(0, 4),
        values=st.lists(st.sampled_from([0.5, 2.0, 1.0, -1.0]), min_size=2, max_size=2, unique=True),
    )
    quiet = list(HealthCheck)
    how = settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=quiet, print_blob=True)
    return lambda test: how(drawn(test))


@pytest.mark.parametrize("root", sorted(ROOTS))
@_drawn(-(-DRAWS // (2 * len(ROOTS))))
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


@pytest.mark.parametrize("root", sorted(ROOTS))
@_drawn(-(-DRAWS // (4 * len(ROOTS))))
def test_a_look_stands_only_while_the_fingerprint_is_the_same(root, names, array, where, values):
    cell, put = made(root, names, array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ur.unroll(cell, engine="eager")(torch.ones(2, 2, H, dtype=torch.float64))
        environment = Environment.of(cell)  # goes where nobody keeps it
        watch_step(cell, torch.ones(2, H, dtype=torch.float64), cell.initial_state(2, dtype=torch.float64), None)
    look, before = Look(cell), fingerprint(cell)
    assert look.stands() == look.complete
    for value in values if put else ():
        put[where % len(put)](value)
        same = fingerprint(cell) == before
        assert same or not look.stands()
    assert environment is Environment.of(cell)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "a parameter of another shape": lambda cell: setattr(cell.linear.bias, "data", torch.ones(1, dtype=torch.float64)),
    "a parameter without gradient": lambda cell: cell.linear.bias.requires_grad_(False),
    "another parameter": lambda cell: setattr(cell.linear, "bias", nn.Parameter(torch.ones(H))),
    "a parameter taken away": lambda cell: setattr(cell.linear, "bias", None),
    "a module more": lambda cell: cell.add_module("more", nn.Tanh()),
    "another class": lambda cell: setattr(cell.linear, "__class__", type("Other", (nn.Linear,), {})),
    "a mode": lambda cell: cell.eval(),
    "a hook": lambda cell: cell.linear.register_forward_hook(lambda *_: None),
    "an attribute more": lambda cell: setattr(cell, "more", 1),
    "an attribute of another name": lambda cell: vars(cell).update(other=vars(cell).pop("gain")),
    "a number of another type": lambda cell: setattr(cell, "gain", 1),
    "an entry of a list": lambda cell: cell.listed.append(2),
    "an entry of a list in a dict": lambda cell: cell.held["a"].append(2),
    "an attribute of an object": lambda cell: setattr(cell.thing, "a", 2),
    "another object": lambda cell: setattr(cell, "thing", types.SimpleNamespace(a=1)),
    "a buffer in a list": lambda cell: cell.listed.append(torch.ones(2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_look_sees_what_changes_in_a_cell(change):
    cell = Cell(lambda cell, x: x)
    cell.gain, cell.listed, cell.held, cell.thing = True, [1], {"a": [1]}, types.SimpleNamespace(a=1)
    look = Look(cell)
    assert look.complete
    assert look.stands()
    CHANGES[change](cell)
    assert not look.stands()
    assert Look(cell).stands()


def test_of_what_is_taken_apart_in_another_way_there_is_no_look():
    for thing in (collections.OrderedDict(a=1), {1, 2}, collections.deque([1]), functools.partial(max, 1), np.ones(2)):
        cell = Cell(lambda cell, x: x)
        cell.thing = thing
        assert not Look(cell).stands()


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
