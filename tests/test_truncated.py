"""Truncated BPTT against its definition, written out with detach, and against the loop that people write by hand."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matching import assert_match
from torch import Tensor, nn

import unrolled as ur
from unrolled.errors import CellError, GradientError, InputError, OptionError, StateError
from unrolled.trees import leaves, map_leaves

B, I, H = 3, 2, 4
CUTS = [(4, 4), (4, 2), (5, 2), (3, 1), (7, 3)]


def by_definition(
    cell: nn.Module, inputs: Any, state: Any, context: Any, k2: int, k1: int, weights: list[Tensor]
) -> tuple[list[Any], list[Tensor]]:
    """The outputs of all steps, and the gradients of `loss_of` of them: every block run again from a detached state."""
    T, states, outputs, more = len(leaves(inputs)[0]), [state], [], () if context is None else (context,)
    for t in range(T):
        out, following = cell(map_leaves(lambda x, t=t: x[t], inputs), states[-1], *more)
        outputs.append(out)
        states.append(following)
    found = [torch.zeros_like(w) for w in weights]
    for begin in range(0, T, k1):
        end = min(begin + k1, T)
        cut = begin if k1 == k2 else max(end - k2, 0)
        now = map_leaves(Tensor.detach, states[cut]) if cut else state
        loss = torch.zeros((), dtype=torch.float64)
        for t in range(cut, end):
            out, now = cell(map_leaves(lambda x, t=t: x[t], inputs), now, *more)
            loss = loss + (loss_of(out, t) if t >= begin else 0)
        loss = loss + (loss_of(now, T) if end == T else 0)
        grads = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
        found = [total if g is None else total + g for total, g in zip(found, grads, strict=True)]
    return outputs, found


def loss_of(tree: Any, t: int) -> Tensor:
    """A scalar of floating leaves that is different at every step and for every entry."""
    total = torch.zeros((), dtype=torch.float64)
    for leaf in leaves(tree):
        if leaf.is_floating_point():
            weights = torch.linspace(0.3, 1.7, leaf.numel(), dtype=leaf.dtype).view(leaf.shape) * (1 + 0.1 * t)
            total = total + (leaf.square() * weights).sum()
    return total


def losses(outputs: Any, last: Any, *, first: int = 0) -> Tensor:
    T = len(leaves(outputs)[0])
    each = [loss_of(map_leaves(lambda x, t=t: x[t], outputs), first + t) for t in range(T)]
    return sum(each, loss_of(last, first + T))


class Pair(NamedTuple):
    fast: Tensor
    slow: dict[str, Tensor]


class TwoSpeeds(nn.Module):
    """A cell of pytrees with a context and a counter in its state."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(I + 2 * H, H, dtype=torch.float64)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Any:
        zeros = torch.zeros(batch_size, H, dtype=torch.float64)
        return Pair(zeros, {"h": zeros, "t": torch.zeros(batch_size, dtype=torch.int64)})

    def forward(self, input: Any, state: Pair, context: Tensor) -> Any:
        now = torch.tanh(self.mix(torch.cat([input["x"], state.fast, state.slow["h"]], -1)) * context)
        slow = 0.9 * state.slow["h"] + 0.1 * now
        return {"sum": now + slow, "now": now}, Pair(now, {"h": slow, "t": state.slow["t"] + 1})


def a_state(cell: nn.Module) -> Any:
    state = cell.initial_state(B, dtype=torch.float64)
    return map_leaves(lambda x: torch.randn_like(x).requires_grad_() if x.is_floating_point() else x, state)


def a_problem(kind: str, T: int) -> tuple[nn.Module, Any, Any, Any]:
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    if kind == "lstm":
        cell = ur.LSTMCell(I, H, dtype=torch.float64)
        return cell, x, a_state(cell), None
    cell = TwoSpeeds()
    return cell, {"x": x}, a_state(cell), torch.randn(B, 1, dtype=torch.float64, requires_grad=True)


def floating(*trees: Any) -> list[Tensor]:
    return [x for tree in trees for x in leaves(tree) if x.is_floating_point()]


@pytest.mark.parametrize("engine", ["reference", "eager", "native"])
@pytest.mark.parametrize("kind", ["lstm", "trees"])
def test_one_call_is_its_definition(kind: str, engine: str) -> None:
    cell, inputs, state, context = a_problem(kind, 11)
    weights = [*floating(inputs, state, context), *cell.parameters()]
    for k2, k1 in CUTS:
        rnn = ur.unroll(cell, engine=engine, horizon=k2, stride=k1)
        outputs, last = rnn(inputs, state, context=context)
        assert rnn.ran == engine
        wanted, grads = by_definition(cell, inputs, state, context, k2, k1, weights)
        for t, each in enumerate(wanted):
            for ours, theirs in zip(leaves(outputs), leaves(each), strict=True):
                assert_match(ours[t], theirs)
        found = torch.autograd.grad(losses(outputs, last), weights)
        for ours, theirs in zip(found, grads, strict=True):
            assert_match(ours, theirs)
