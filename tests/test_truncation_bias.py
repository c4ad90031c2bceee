"""What copies say of truncation: the angle and the norm of the truncated against the full gradient."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from problems import LinearCell, learned
from unrolled.errors import GradientError, OptionError

T, B, I, H = 12, 3, 3, 4


def gradients(rnn: nn.Module, loss: Any, *given: Any, **options: Any) -> dict[str, Tensor]:
    outputs, last = rnn(*given, **options)
    names, weights = zip(*rnn.named_parameters(), strict=True)
    found = torch.autograd.grad(loss(outputs, last), weights, allow_unused=True)
    return {n: torch.zeros_like(w) if g is None else g for n, w, g in zip(names, weights, found, strict=True)}


def loss_of(outputs: Tensor, last: Any) -> Tensor:
    state = last if isinstance(last, Tensor) else last[0] if isinstance(last[0], Tensor) else last[-1]
    shape = torch.linspace(0.5, 1.5, outputs.numel(), dtype=outputs.dtype).view(outputs.shape)
    return torch.sin(shape * outputs).sum() + state.square().sum()


def assert_told(told: ur.TruncationBias, cut: dict[str, Tensor], full: dict[str, Tensor]) -> None:
    for bias, a, b in zip(told.parameters.values(), cut.values(), full.values(), strict=True):
        assert bias.ratio == pytest.approx(float(a.norm() / b.norm()), rel=1e-9)
        assert bias.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), rel=1e-9)
    a, b = (torch.cat([x.flatten() for x in grads.values()]) for grads in (cut, full))
    assert told.whole.ratio == pytest.approx(float(a.norm() / b.norm()), rel=1e-9)
    assert told.whole.cosine == pytest.approx(float(torch.dot(a, b) / a.norm() / b.norm()), rel=1e-9)


@pytest.mark.parametrize("lengths", [None, [5, T, 9]])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cut", [(1, 1), (4, 4), (5, 2), (T, 3), (T + 5, T + 5)])
def test_it_is_that_of_the_truncated_network(cut: tuple[int, int], reverse: bool, lengths: Any) -> None:
    torch.manual_seed(0)
    cell, inputs = learned(ur.LSTMCell).double(), torch.randn(T, B, I, dtype=torch.float64)
    full, some = (ur.unroll(cell, reverse=reverse, horizon=h, stride=s) for h, s in ((None, None), cut))
    copies = ur.copies(some, inputs, lengths=lengths)
    copies.backward(loss_of(copies.outputs, copies.state))
    wanted = (gradients(rnn, loss_of, inputs, lengths=lengths) for rnn in (some, full))
    assert_told(copies.truncated(), *wanted)
    assert (copies.truncated().horizon, copies.truncated().stride) == cut


@pytest.mark.parametrize("lengths", [None, [5, T, 9]])
def test_all_layers_are_cut_at_one_place(lengths: Any) -> None:
    torch.manual_seed(0)
    cells = [ur.GRUCell(I, H).double(), learned(ur.RNNCell, H).double()]
    inputs, resets = torch.randn(T, B, I, dtype=torch.float64), torch.arange(T * B).view(T, B) % 5 == 3
    copies = ur.copies(ur.stack(cells), inputs, lengths=lengths, resets=resets)
    copies.backward(loss_of(copies.outputs, copies.state))
    options = {"lengths": lengths, "resets": resets}
    cut = gradients(ur.stack(cells, horizon=5, stride=3), loss_of, inputs, **options)
    assert_told(copies.truncated(5, 3), cut, gradients(ur.stack(cells), loss_of, inputs, **options))


def test_a_linear_cell_in_closed_form() -> None:
    """`h_T = sum_s w^(T-1-s) x_s` with x = 1: its derivative by w is `sum_k k w^(k-1)`, k < T; cut, k < horizon."""
    w, horizon = 0.9, 4
    copies = ur.copies(ur.unroll(LinearCell(torch.tensor(w, dtype=torch.float64))), torch.ones(T, 1, 1).double())
    copies.backward(copies[-1].output.sum())
    # The last block begins at step 8, whose copy receives h_8 as a constant: d h_12 / d w = sum_{t=8..11} h_t w^(11-t).
    h = [sum(w**k for k in range(t)) for t in range(T + 1)]
    cut, full = (sum(h[t] * w ** (T - 1 - t) for t in range(first, T)) for first in (T - horizon, 0))
    told = copies.truncated(horizon)
    assert told.whole.ratio == pytest.approx(cut / full, rel=1e-12)
    assert told.whole.angle == pytest.approx(0, abs=1e-5)


def test_it_can_be_read_and_kept() -> None:
    copies = ur.copies(ur.unroll(ur.GRUCell(I, H)), torch.randn(T, B, I))
    copies.backward(copies.outputs.square().sum())
    told = copies.truncated(3)
    assert str(told).splitlines()[0] == "truncated (horizon 3, stride 3) against full gradient: angle, norm"
    assert all(f"x {bias.ratio:.3f}" in str(told) for bias in told.parameters.values())
    kept = json.loads(json.dumps(told.to_dict()))
    assert kept["parameters"]["weight_hh"]["ratio"] == told.parameters["weight_hh"].ratio
    assert not math.isnan(told.whole.angle)


def test_what_is_refused() -> None:
    copies = ur.copies(ur.unroll(ur.GRUCell(I, H)), torch.randn(T, B, I))
    with pytest.raises(GradientError, match="no gradients yet"):
        copies.truncated(3)
    copies.backward(copies.outputs.sum())
    with pytest.raises(OptionError, match="has no horizon"):
        copies.truncated()
    with pytest.raises(OptionError, match="stride must be from 1 to horizon = 3, got 4"):
        copies.truncated(3, 4)
    with pytest.raises(OptionError, match="got a slice of 5 copies"):
        copies[2:7].truncated(3)
    both = ur.copies(ur.stack([ur.GRUCell(I, H)], bidirectional=True), torch.randn(T, B, I))
    both.backward(both.outputs.sum())
    with pytest.raises(OptionError, match="a layer that walks backwards"):
        both.truncated(3)
