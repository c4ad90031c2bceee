"""Truncated BPTT against its definition, written out with detach, and against the loop that people write by hand."""

from __future__ import annotations

import gc
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import unrolled as ur
from matching import assert_match
from unrolled.errors import CellError, GradientError, InputError, OptionError, StateError
from unrolled.trees import leaves, map_leaves

B, I, H = 3, 2, 4
CUTS = [(4, 4), (4, 2), (5, 2), (3, 1), (7, 3)]


def by_definition(
    cell: nn.Module,
    inputs: Any,
    state: Any,
    context: Any,
    cut: tuple[int, int],
    weights: list[Tensor],
    *,
    rows: range | None = None,
    resets: Tensor | None = None,
) -> tuple[list[Any], list[Tensor]]:
    """The outputs, and the gradients of `losses` of them: every block run again from a detached state.

    Steps are counted as the copies run; `rows` says which of them the rows have. Resets start from zeros.
    """
    (k2, k1), T, more = cut, len(leaves(inputs)[0]), () if context is None else (context,)
    rows = range(T) if rows is None else rows

    def step(t: int, now: Any) -> tuple[Any, Any]:
        if resets is not None:
            now = map_leaves(lambda x: x * ~resets[t].view(-1, *(1,) * (x.dim() - 1)), now)
        return cell(map_leaves(lambda x: x[t], inputs), now, *more)

    states, outputs = dict.fromkeys(range(rows.start + 1), state), []
    for t in rows:
        out, states[t + 1] = step(t, states[t])
        outputs.append(out)
    found = [torch.zeros_like(w) for w in weights]
    for begin in range(0, T, k1):
        end = min(begin + k1, T)
        first = begin if k1 == k2 else max(end - k2, 0)
        taken = range(max(begin, rows.start), min(end, rows.stop))
        if not taken:
            continue
        now = map_leaves(Tensor.detach, states[first]) if first > rows.start else state
        loss = torch.zeros((), dtype=torch.float64)
        for t in range(max(first, rows.start), taken.stop):
            out, now = step(t, now)
            loss = loss + (loss_of(out, t) if t >= begin else 0)
        loss = loss + (loss_of(now, T) if taken.stop == rows.stop else 0)
        grads = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
        found = [total if g is None else total + g for total, g in zip(found, grads, strict=True)]
    return outputs, found


def loss_of(tree: Any, t: int) -> Tensor:
    """A scalar of floating leaves that is different at every step and for every feature."""
    total = torch.zeros((), dtype=torch.float64)
    for leaf in floating(tree):
        total = total + (leaf.square() * torch.linspace(0.3, 1.7, leaf.shape[-1]) * (1 + 0.1 * t)).sum()
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


ENGINES = ["reference", "eager", "native"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["lstm", "trees"])
def test_one_call_is_its_definition(kind: str, engine: str) -> None:
    cell, inputs, state, context = a_problem(kind, 11)
    weights = [*floating(inputs, state, context), *cell.parameters()]
    for k2, k1 in CUTS:
        rnn = ur.unroll(cell, engine=engine, horizon=k2, stride=k1)
        outputs, last = rnn(inputs, state, context=context)
        assert rnn.ran == engine
        wanted, grads = by_definition(cell, inputs, state, context, (k2, k1), weights)
        for t, each in enumerate(wanted):
            for ours, theirs in zip(leaves(outputs), leaves(each), strict=True):
                assert_match(ours[t], theirs)
        found = torch.autograd.grad(losses(outputs, last), weights)
        for ours, theirs in zip(found, grads, strict=True):
            assert_match(ours, theirs)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reverse", [False, True])
def test_rows_that_end_and_rows_that_walk_backwards(engine: str, reverse: bool) -> None:
    T, lengths = 9, [4, 9, 0, 7, 9]
    cell = ur.LSTMCell(I, H, dtype=torch.float64)
    x = torch.randn(T, 5, I, dtype=torch.float64, requires_grad=True)
    state = tuple(torch.randn(5, H, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = [x, *state, *cell.parameters()]
    for cut in CUTS:
        rnn = ur.unroll(cell, engine=engine, reverse=reverse, horizon=cut[0], stride=cut[1])
        outputs, last = rnn(x.masked_fill(padding(T, lengths), torch.nan), state, lengths=lengths)
        walked = outputs.flip(0) if reverse else outputs
        found = torch.autograd.grad(losses(walked, ()) + loss_of(last, T), weights)
        wanted = [torch.zeros_like(w) for w in weights]
        for b, L in enumerate(lengths):
            own = (x[:, b : b + 1].flip(0) if reverse else x[:, b : b + 1]), tuple(h[b : b + 1] for h in state)
            rows = range(T - L, T) if reverse else range(L)
            each, grads = by_definition(cell, *own, None, cut, weights, rows=rows)
            for t, one in zip(rows, each, strict=True):
                assert_match(walked[t, b : b + 1], one)
            if not L:  # the state of a row without a step is handed back
                grads = torch.autograd.grad(loss_of(own[1], T), weights, allow_unused=True)
            wanted = [w if g is None else w + g for w, g in zip(wanted, grads, strict=True)]
        for ours, theirs in zip(found, wanted, strict=True):
            assert_match(ours, theirs)


def padding(T: int, lengths: list[int]) -> Tensor:
    return (torch.arange(T).unsqueeze(1) >= torch.tensor(lengths)).unsqueeze(-1)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_that_start_afresh(engine: str) -> None:
    cell, x, state, _ = a_problem("lstm", 9)
    resets = torch.rand(9, B) < 0.3
    weights = [x, *leaves(state), *cell.parameters()]
    for cut in CUTS:
        rnn = ur.unroll(cell, engine=engine, horizon=cut[0], stride=cut[1], batch_first=True)
        outputs, last = rnn(x.transpose(0, 1), state, resets=resets.T)
        found = torch.autograd.grad(losses(outputs.transpose(0, 1), last), weights)
        _, wanted = by_definition(cell, x, state, None, cut, weights, resets=resets)
        for ours, theirs in zip(found, wanted, strict=True):
            assert_match(ours, theirs)


class Linear(nn.Module):
    """s' = a s + x: every gradient is a power of a."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, 1, dtype=torch.float64)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        new = self.a * state + input
        return new, new


@settings(max_examples=60, deadline=None)
@given(T=st.integers(1, 14), k2=st.integers(1, 16), data=st.data())
def test_a_linear_cell_in_closed_form(T: int, k2: int, data: st.DataObject) -> None:
    k1, a = data.draw(st.integers(1, k2)), 0.8
    rnn = ur.unroll(Linear(a), engine="reference", horizon=k2, stride=k1)
    x = torch.randn(T, 1, 1, dtype=torch.float64, requires_grad=True)
    outputs, _ = rnn(x)
    outputs.sum().backward()
    s = [0.0, *outputs.flatten().tolist()]
    grad_a, grad_x = 0.0, [0.0] * T
    for t in range(T):  # the loss of step t reaches back to `first`
        begin = t // k1 * k1
        first = begin if k1 == k2 else max(min(begin + k1, T) - k2, 0)
        for i in range(first, t + 1):
            grad_x[i] += a ** (t - i)
            grad_a += a ** (t - i) * s[i]
    assert_match(x.grad.flatten(), torch.tensor(grad_x, dtype=torch.float64))
    assert abs(rnn.cell.a.grad.item() - grad_a) <= 1e-10 * max(1.0, abs(grad_a))


@pytest.mark.parametrize("cut", [(9, 9), (9, 2), (20, 7)])
def test_a_horizon_of_all_copies_is_bptt_exactly(cut: tuple[int, int]) -> None:
    cell, x, state, _ = a_problem("lstm", 9)
    weights = [x, *leaves(state), *cell.parameters()]
    rnns = [ur.unroll(cell, engine="native"), ur.unroll(cell, engine="native", horizon=cut[0], stride=cut[1])]
    full, cut_off = (torch.autograd.grad(losses(*rnn(x, state)), weights) for rnn in rnns)
    assert all(torch.equal(a, b) for a, b in zip(full, cut_off, strict=True))


def test_weights_that_are_made_or_stand_beside_get_their_gradients() -> None:
    beside = torch.randn(H, dtype=torch.float64, requires_grad=True)
    inner = ur.RNNCell(I, H, dtype=torch.float64)
    cell = ur.as_cell(inner, step=lambda inner, x, h: inner(x, h * beside), state=inner.initial_state)
    x = torch.randn(9, B, I, dtype=torch.float64)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    rnn = ur.unroll(cell, engine="reference", horizon=5, stride=2)
    (name,) = (name for name, _ in rnn.named_parameters() if name.endswith("weight_hh"))
    plain = inner.weight_hh.detach().clone()
    made = plain * scale
    outputs, last = torch.func.functional_call(rnn, {name: made}, (x,))
    found = torch.autograd.grad(losses(outputs, last), [made, scale, beside, inner.weight_ih])
    with torch.no_grad():
        inner.weight_hh.copy_(made)
    start = inner.initial_state(B, dtype=torch.float64)
    _, wanted = by_definition(cell, x, start, None, (5, 2), [inner.weight_hh, beside, inner.weight_ih])
    assert_match([found[0], found[2], found[3]], wanted)
    assert_match(found[1], (wanted[0] * plain).sum())


def hand_written(
    cell: nn.Module, x: Tensor, state: Any, cut: tuple[int, int], rate: float, resets: Tensor | None
) -> tuple[list[Tensor], Any]:
    """Windows with updates between them, by hand."""
    (k2, k1), T = cut, len(x)
    stored, seen = {0: state}, []
    for begin in range(0, T, k1):
        first, end = max(begin + k1 - k2, 0), min(begin + k1, T)
        now = stored[first]
        outputs = []
        for t in range(first, end):
            if resets is not None:
                now = map_leaves(lambda h, t=t: h * ~resets[t].view(-1, 1), now)
            out, now = cell(x[t], now)
            stored[t + 1] = map_leaves(Tensor.detach, now)
            if t >= begin:
                outputs.append(out)
        cell.zero_grad()
        losses(torch.stack(outputs), (), first=begin).backward()
        seen.append(torch.stack(outputs).detach())
        descend(cell, rate)
    return seen, stored[T]


def descend(cell: nn.Module, rate: float) -> None:
    with torch.no_grad():
        for weight in cell.parameters():
            weight -= rate * weight.grad


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cut", [(3, 3), (6, 3), (5, 3), (7, 2)])
def test_windows_with_updates_are_the_loop_by_hand(cut: tuple[int, int], engine: str) -> None:
    by_hand, cell = (ur.LSTMCell(I, H, dtype=torch.float64) for _ in range(2))
    cell.load_state_dict(by_hand.state_dict())
    x, sizes = torch.randn(17, B, I, dtype=torch.float64), [1, 5, 2, 8, 1]
    state = tuple(torch.randn(B, H, dtype=torch.float64) for _ in range(2))
    resets = torch.rand(17, B) < 0.2
    wanted, last = hand_written(by_hand, x, state, cut, 0.05, resets)
    rnn = ur.unroll(cell, engine=engine, horizon=cut[0], stride=cut[1])
    seen, starts = [], []
    for window in rnn.windows(iter(x.split(sizes)), state, resets=resets.split(sizes)):
        cell.zero_grad()
        window.backward(losses(window.outputs, (), first=window.start))
        descend(cell, 0.05)
        seen.append(window.outputs.detach())
        starts.append(window.start)
        assert torch.equal(window.inputs, x[window.start : window.stop])
    assert starts == list(range(0, 17, cut[1]))
    assert_match(seen, wanted)
    assert_match(window.state, last)
    assert_match(list(cell.parameters()), list(by_hand.parameters()))


@pytest.mark.parametrize("cut", [(4, 4), (6, 3), (5, 2)])
def test_windows_without_updates_are_one_call(cut: tuple[int, int]) -> None:
    T = 4 * cut[1]
    cell, inputs, state, context = a_problem("trees", T)
    rnn = ur.unroll(cell, engine="native", horizon=cut[0], stride=cut[1], batch_first=True)
    weights = [*floating(inputs, state, context), *cell.parameters()]
    lengths = [T, 3, T - 2]
    turned = map_leaves(lambda x: x.transpose(0, 1), inputs)
    outputs, _ = rnn(turned, state, lengths=lengths, context=context)
    wanted = torch.autograd.grad(losses(map_leaves(lambda x: x.transpose(0, 1), outputs), ()), weights)
    chunks = ({"x": part.transpose(0, 1)} for part in inputs["x"].detach().split(5))
    for window in rnn.windows(chunks, state, lengths=lengths, context=context):
        shown = map_leaves(lambda x: x.transpose(0, 1), window.outputs)
        window.backward(losses(shown, (), first=window.start))
    for weight, grad in list(zip(weights, wanted, strict=True))[1:]:
        assert_match(weight.grad, grad)


def test_windows_go_on_without_a_backward_pass() -> None:
    rnn = ur.unroll(ur.GRUCell(I, H), horizon=5, stride=2, engine="eager")
    x = torch.randn(9, B, I)
    outputs, last = rnn(x)
    with torch.no_grad():
        unhooked = [window.outputs for window in rnn.windows(x.split(4))]
    hooked, graphs = [], []
    for window in rnn.windows(x.split(4)):
        assert all(leaf() is None for leaf in graphs)
        graphs.append(weakref.ref(window._expiry.run().segments[0].inputs[0]))
        hooked.append(window)

    assert_match(torch.cat(unhooked), outputs)
    assert_match(torch.cat([window.outputs for window in hooked]), outputs)
    assert_match(hooked[-1].state, last)


def test_a_drawn_initial_state_is_the_same_in_every_window() -> None:
    cell = ur.DropoutCell(ur.GRUCell(I, H), p=0.5, of="input", per="sequence")
    rnn = ur.unroll(cell, horizon=6, stride=2, engine="reference")
    x = torch.randn(8, B, I)
    torch.manual_seed(3)
    torch.rand(1)
    whole, _ = rnn(x)
    torch.manual_seed(3)
    source = (x + 0 * torch.rand(1) for _ in range(1))  # which draws numbers of its own
    assert_match(torch.cat([window.outputs for window in rnn.windows(source)]), whole)


def test_a_learned_initial_state_is_reached_as_in_one_call() -> None:
    cell = ur.GRUCell(I, H, learn_initial_state=True, dtype=torch.float64)
    rnn = ur.unroll(cell, horizon=4, stride=2, engine="eager")
    x = torch.randn(8, B, I, dtype=torch.float64)
    wanted = torch.autograd.grad(losses(rnn(x)[0], ()), list(cell.parameters()))
    for window in rnn.windows([x]):
        window.backward(losses(window.outputs, (), first=window.start))
    assert_match([weight.grad for weight in cell.parameters()], list(wanted))


def test_windows_hold_nothing_of_earlier_ones() -> None:
    rnn = ur.unroll(ur.LSTMCell(I, H), horizon=4, stride=2, engine="reference")
    kept, graphs = [], []
    for window in rnn.windows(torch.randn(B, I).expand(1, B, I) for _ in range(12)):
        assert sum(graph() is not None for graph in graphs) == 0
        graphs.append(window._expiry.run)
        assert graphs[-1]() is not None
        kept.append(window.outputs.sum())  # a careless user's list of losses
        window.backward(window.outputs.sum())
        del window
        gc.collect()
    assert len(kept) == 6


def test_a_tape_goes_with_its_backward_pass_or_its_results() -> None:
    rnn = ur.unroll(ur.GRUCell(I, H), horizon=4, stride=2, engine="reference")
    outputs, _ = rnn(torch.randn(9, B, I))
    tape = weakref.ref(outputs.grad_fn.saved_tensors[0].run)
    outputs.sum().backward(retain_graph=True)
    outputs.sum().backward()
    assert tape() is None
    with pytest.raises(RuntimeError, match="second time"):
        outputs.sum().backward()
    outputs, last = rnn(torch.randn(9, B, I))
    tape = weakref.ref(outputs.grad_fn.saved_tensors[0].run)
    del outputs, last
    assert tape() is None


def test_a_loss_that_needs_a_window_already_left() -> None:
    rnn = ur.unroll(ur.GRUCell(I, H), horizon=4, stride=2, engine="reference")
    windows = rnn.windows([torch.randn(9, B, I)])
    first = next(windows)
    loss = first.outputs.sum()
    second = next(windows)
    for late in (lambda: first.backward(loss), lambda: second.backward(loss + second.outputs.sum()), loss.backward):
        with pytest.raises(GradientError, match=r"steps 0 to 1, a window that was left"):
            late()
    assert all(weight.grad is None for weight in rnn.parameters())
    with pytest.raises(GradientError, match="leads back to no parameter"):
        second.backward(second.outputs.detach().sum())
    second.backward(second.outputs.sum())
    with pytest.raises(GradientError, match="call backward once"):
        second.backward(second.outputs.sum())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"stride": 3}, "stride needs a horizon"),
        ({"horizon": 0}, "at least 1 copy, got 0"),
        ({"horizon": -2, "stride": -3}, "at least 1 copy, got -2"),
        ({"horizon": 3, "stride": 4}, "from 1 to horizon = 3, got 4"),
        ({"horizon": 3, "stride": 0}, "from 1 to horizon = 3, got 0"),
        ({"horizon": 3.0}, "horizon must be an integer.*3.0 of type float"),
        ({"horizon": True}, "horizon must be an integer"),
        ({"horizon": 3, "stride": "2"}, "stride must be an integer"),
    ],
)
def test_horizons_that_are_none(options: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        ur.unroll(ur.GRUCell(I, H), **options)


def windows_of(source: Any, **options: Any) -> list[Any]:
    return list(ur.unroll(ur.GRUCell(I, H), engine="reference", horizon=3, stride=2).windows(source, **options))


def test_sources_that_do_not_fit() -> None:
    x, cell = torch.randn(4, B, I), ur.GRUCell(I, H)
    with pytest.raises(OptionError, match="windows need a horizon"):
        ur.unroll(cell).windows([x])
    with pytest.raises(InputError, match="reversed"):
        ur.unroll(cell, reverse=True, horizon=3).windows([x])
    with pytest.raises(InputError, match=r"chunk 2 has float32.2, 2"):
        windows_of([x, x, x[:, :2]])
    with pytest.raises(InputError, match="chunk 1 has float64"):
        windows_of([x, x.double()])
    with pytest.raises(InputError, match=r"chunk 1 has {x: float32"):
        windows_of([x, {"x": x}])
    with pytest.raises(InputError, match=r"chunk 1: .*T >= 1"):
        windows_of([x, x[:0]])
    with pytest.raises(InputError, match="resets of chunk 1 must be a bool"):
        windows_of([x, x], resets=[torch.zeros(4, B, dtype=torch.bool)])
    with pytest.raises(InputError, match="resets must have one mask for each chunk"):
        windows_of([x], resets=[torch.zeros(4, B, dtype=torch.bool)] * 2)
    with pytest.raises(InputError, match="at most the steps of all chunks, 4, got 9 for row 1"):
        windows_of([x], lengths=[4, 9, 0])
    with pytest.raises(InputError, match=r"for one chunk pass \[inputs\]"):
        windows_of({"x": x})
    with pytest.raises(InputError, match="got a Tensor"):
        windows_of(x)
    with pytest.raises(StateError, match="leaves of the graph"):
        windows_of([x], state=torch.zeros(B, H, requires_grad=True) * 2)
    assert windows_of([]) == []


def test_a_cell_that_fails_is_told_by_its_copy() -> None:
    def step(inner: nn.Module, x: Tensor, h: Tensor) -> Any:
        if x.isnan().any():
            raise ValueError("no number")
        return inner(x, h)

    inner = ur.GRUCell(I, H)
    x = torch.randn(9, B, I)
    x[7] = torch.nan
    for cut in ((3, 3), (4, 3)):
        rnn = ur.unroll(
            ur.as_cell(inner, step=step, state=inner.initial_state), engine="reference", horizon=cut[0], stride=cut[1]
        )
        with pytest.raises(CellError, match=r"copy 7 .*no number"):
            rnn(x)


def test_no_second_derivative_of_overlapping_blocks() -> None:
    x = torch.randn(9, B, I, requires_grad=True)
    rnn = ur.unroll(ur.GRUCell(I, H), engine="reference", horizon=4, stride=2)
    with pytest.raises(GradientError, match="create_graph"):
        torch.autograd.grad(rnn(x)[0].sum(), x, create_graph=True)
    rnn = ur.unroll(ur.GRUCell(I, H), engine="reference", horizon=4)
    (grad,) = torch.autograd.grad(rnn(x)[0].sum(), x, create_graph=True)
    assert grad.square().sum().requires_grad


def test_what_a_network_says_of_it() -> None:
    rnn = ur.unroll(ur.GRUCell(I, H), engine="eager", horizon=4, stride=2)
    assert "horizon=4, stride=2" in repr(rnn)
    assert str(rnn.plan(torch.randn(9, B, I))).startswith("GRUCell, horizon 4, stride 2, 9 copies")
    assert (rnn.horizon, rnn.stride) == (4, 2)
    assert ur.unroll(ur.GRUCell(I, H), horizon=4).stride == 4
    assert ur.unroll(ur.GRUCell(I, H)).horizon is None


class TwoLayers(nn.Module):
    """What a stack of two layers is to its definition: one cell with the states of both."""

    def __init__(self, stack: Any) -> None:
        super().__init__()
        self.first, self.second = (layer.cell for layer in stack.layers)

    def forward(self, input: Tensor, state: Any) -> Any:
        hidden, first = self.first(input, state[0])
        output, second = self.second(hidden, state[1])
        return output, (first, second)


def two_layers(**options: Any) -> Any:
    cells = [ur.LSTMCell(I, H, dtype=torch.float64), ur.GRUCell(H, I, dtype=torch.float64)]
    rnn = ur.stack(cells, engine="eager", **options)
    return rnn, tuple(a_state(cell) for cell in cells)


@pytest.mark.parametrize("cut", [(4, 4), (5, 2), (4, 2)])
def test_layers_are_cut_at_one_place(cut: tuple[int, int]) -> None:
    T, lengths = 9, [4, 9, 7]
    rnn, state = two_layers(horizon=cut[0], stride=cut[1], batch_first=True)
    x, resets = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True), torch.rand(T, B) < 0.3
    weights = [x, *leaves(state), *rnn.parameters()]
    outputs, last = rnn(x.transpose(0, 1), state, lengths=lengths, resets=resets.T)
    found = torch.autograd.grad(losses(outputs.transpose(0, 1), ()) + loss_of(last, T), weights)
    total = [torch.zeros_like(w) for w in weights]
    for b, L in enumerate(lengths):
        own = x[:, b : b + 1], map_leaves(lambda h, b=b: h[b : b + 1], state)
        each, grads = by_definition(
            TwoLayers(rnn), *own, None, cut, weights, rows=range(L), resets=resets[:, b : b + 1]
        )
        assert_match(outputs[b, :L], torch.cat(each))
        total = [w + g for w, g in zip(total, grads, strict=True)]
    assert_match(list(found), total)


def test_windows_of_layers_are_the_loop_by_hand() -> None:
    cut = (5, 3)
    rnn, state = two_layers(horizon=cut[0], stride=cut[1])
    other, _ = two_layers()
    other.load_state_dict(rnn.state_dict())
    by_hand, start = TwoLayers(other), map_leaves(Tensor.detach, state)
    x = torch.randn(11, B, I, dtype=torch.float64)
    wanted, last = hand_written(by_hand, x, start, cut, 0.05, None)
    seen = []
    for window in rnn.windows(x.split(4), start):
        rnn.zero_grad()
        window.backward(losses(window.outputs, (), first=window.start))
        descend(rnn, 0.05)
        seen.append(window.outputs.detach())
    assert_match(seen, wanted)
    assert_match(window.state, last)


def test_stacks_that_have_no_horizon() -> None:
    cell = ur.GRUCell(I, H)
    with pytest.raises(OptionError, match="walks backwards"):
        ur.stack([cell], bidirectional=True, horizon=3)
    with pytest.raises(OptionError, match="a horizon or a memory budget of its own"):
        ur.stack([ur.unroll(cell, horizon=3)], horizon=3)
    with pytest.raises(OptionError, match="stride needs a horizon"):
        ur.stack([cell], stride=3)
    with pytest.raises(OptionError, match="windows need a horizon"):
        ur.stack([cell]).windows([])
    assert "horizon=4, stride=2" in repr(ur.stack([cell], horizon=4, stride=2))


def test_what_transforms_and_verify_do() -> None:
    x = torch.randn(9, B, I)
    rnn = ur.unroll(ur.GRUCell(I, H), engine="reference", horizon=4, stride=2)
    with pytest.raises(OptionError, match=r"stride < horizon is not offered inside of torch.func"):
        torch.func.grad(lambda x: rnn(x)[0].sum())(x)
    plain = ur.unroll(rnn.cell, engine="reference", horizon=4)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(plain(leaf)[0].sum(), leaf)
    assert_match(torch.func.grad(lambda x: plain(x)[0].sum())(x), wanted)
    assert ur.verify(rnn, x, lengths=[4, 9, 7])


def test_what_made_the_inputs_is_reached_from_the_window_they_are_new_in() -> None:
    x, scale = torch.randn(6, 1, 1, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    rnn = ur.unroll(Linear(0.8), engine="reference", horizon=4, stride=2)
    for window in rnn.windows(part * scale for part in x.split(2)):
        window.backward(window.outputs.sum())
    new = [x[t] * (1 + 0.8 * (t % 2 == 0)) for t in range(6)]
    assert_match(scale.grad, sum(new).squeeze())


@pytest.mark.parametrize("cut", [(4, 4), (4, 2)])
def test_a_compiler_cuts_nothing_else(cut: tuple[int, int]) -> None:
    x = torch.randn(9, B, I)
    cell, other = ur.GRUCell(I, H), ur.GRUCell(H, H)
    for rnn in (
        ur.unroll(cell, engine="eager", horizon=cut[0], stride=cut[1]),
        ur.stack([cell, other], engine="eager", horizon=cut[0], stride=cut[1]),
    ):
        seen = [network(x)[0].square().sum() for network in (rnn, torch.compile(rnn, backend="eager"))]
        wanted, found = (torch.autograd.grad(loss, list(rnn.parameters())) for loss in seen)
        assert_match(list(found), list(wanted))


class Scaled(torch.autograd.Function):
    """A Function that keeps a tensor under the name by which autograd's leaves are found."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Tensor) -> Tensor:
        ctx.variable = by.detach().clone().requires_grad_()
        return x * by

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad * ctx.variable, grad.new_zeros(ctx.variable.shape)


@pytest.mark.parametrize("options", [{"horizon": 4, "stride": 2}, {"checkpoint": lambda T: ur.segments(T, 2)}])
def test_a_function_with_a_variable_of_its_own_is_no_leaf(options: dict[str, Any]) -> None:
    outer = torch.ones(H, requires_grad=True)

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ur.RNNCell(I, H)

        def initial_state(self, batch_size: int, **kind: Any) -> Tensor:
            return self.inner.initial_state(batch_size, **kind)

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            _, h = self.inner(x, h)
            h = Scaled.apply(h, outer)
            return h, h

    cell = Cell()
    rnn = ur.unroll(cell, engine="reference", **options)
    outputs, _ = rnn(torch.randn(6, B, I))
    reached = {id(node) for node, _ in outputs.grad_fn.next_functions if node is not None}
    assert len(reached) == len([*cell.parameters(), outer])
