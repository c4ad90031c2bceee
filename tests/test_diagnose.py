"""Figures of a diagnosis against closed forms and against autograd, entry by entry; verdicts and what they lead to."""

from __future__ import annotations

import html
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from problems import LinearCell
from unrolled.diagnosis.figures import Reach
from unrolled.diagnosis.statistics import quartiles
from unrolled.diagnosis.tangents import Trajectory, measure_tangents
from unrolled.diagnosis.timeline import Timeline

CLOSE = {"rel": 1e-9, "abs": 1e-300}


def total(outputs: Any, state: Any) -> Tensor:
    return outputs.sum()


def last(outputs: Tensor, state: Any) -> Tensor:
    return outputs[-1].square().mean()


@pytest.fixture(autouse=True)
def _double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("weight", [0.5, 1.0, 1.25, -0.8])
def test_linear_cell_has_known_powers(weight: float) -> None:
    T, inputs = 12, torch.randn(12, 2, 1)
    found = ur.diagnose(ur.unroll(LinearCell(torch.tensor(weight))), inputs, total)
    (layer,) = found.layers
    w = abs(weight)
    assert layer.lag is not None
    assert layer.reach is not None
    assert layer.lag.lags == tuple(range(1, T + 1))
    assert layer.lag.counts == tuple(2 * (T - k) for k in range(T))
    for figures in (layer.lag.lower, layer.lag.median, layer.lag.upper):
        assert figures == pytest.approx([w**k for k in layer.lag.lags], **CLOSE)
    assert layer.lag.kept == pytest.approx([w ** (k - 1) for k in layer.lag.lags], **CLOSE)
    assert layer.reach.rate == pytest.approx(math.log(w), abs=1e-12)
    flows = [abs(sum(weight**k for k in range(1, T - t + 1))) for t in range(T)]
    assert layer.flow.median == pytest.approx(flows, **CLOSE)
    assert layer.flow.norms == pytest.approx([flow * math.sqrt(2) for flow in flows], **CLOSE)
    assert layer.jacobian is not None
    assert layer.jacobian.median == pytest.approx([w**k for k in layer.jacobian.lags], **CLOSE)
    assert layer.jacobian.norm == pytest.approx([w**k for k in layer.jacobian.lags], **CLOSE)
    assert layer.lyapunov is not None
    assert layer.lyapunov.exponents == pytest.approx([math.log(w)], abs=1e-12)


def test_reach_and_halving_time_of_a_known_power() -> None:
    found = ur.diagnose(ur.unroll(LinearCell(torch.tensor(0.5))), torch.randn(20, 3, 1), total).layers[0].reach
    assert found is not None
    # 0.5 ** (lag - 1) is at most a tenth from lag 5 on, a hundredth from 8, a thousandth from 11.
    assert (found.tenth, found.hundredth, found.thousandth, found.measured) == (5, 8, 11, 20)
    assert found.halving == pytest.approx(1.0)
    assert found.doubling == math.inf
    grown = ur.diagnose(ur.unroll(LinearCell(torch.tensor(2.0))), torch.randn(20, 3, 1), total).layers[0].reach
    assert grown is not None
    assert (grown.tenth, grown.halving) == (None, math.inf)
    assert grown.doubling == pytest.approx(1.0)


def test_weight_shares_of_a_linear_cell() -> None:
    # From h_0 without inputs every copy contributes the same w^(T-1) h_0 to d h_T / d w.
    T, w, start = 6, 0.9, torch.tensor([[2.0]])
    found = ur.diagnose(ur.unroll(LinearCell(torch.tensor(w))), torch.zeros(T, 1, 1), lambda o, s: s.sum(), state=start)
    (share,) = found.layers[0].weights
    assert share.name == "weight"
    assert share.norms == pytest.approx([w ** (T - 1) * 2] * T, **CLOSE)
    assert share.cosines == pytest.approx([1.0] * T)
    assert share.agreement == pytest.approx(1.0)
    assert share.norm == pytest.approx(T * w ** (T - 1) * 2, **CLOSE)
    assert found.grad_norm == pytest.approx(share.norm, **CLOSE)


def every_probe(copies: ur.Copies, resets: Tensor | None, reverse: bool) -> dict[int, list[float]]:
    """|d loss_t / d state_s| by one backward pass for each row and step: the loop that probes stand for."""
    found: dict[int, list[float]] = {}
    for t, copy in enumerate(copies):
        for place, row in enumerate(copy.rows.tolist()):
            later = range(t, len(copies)) if reverse else range(t, -1, -1)
            for lag, s in enumerate(later, start=1):
                places = copies[s].rows.tolist()
                if row not in places:
                    break
                by = [x for x in copies[s].taps.state.passed if x.is_floating_point()]
                grads = torch.autograd.grad(copy.output[place].sum(), by, retain_graph=True, allow_unused=True)
                norms = [0.0 if grad is None else float(grad[places.index(row)].norm()) for grad in grads]
                found.setdefault(lag, []).append(math.hypot(*norms))
                began = s + 1 if reverse else s
                if resets is not None and began < len(copies) and bool(resets[began, row]):
                    break
    return found


@pytest.mark.parametrize("make", [ur.RNNCell, ur.LSTMCell, ur.GRUCell, ur.SLSTMCell, ur.PeepholeLSTMCell])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, [3, 6, 1]])
@pytest.mark.parametrize("resetting", [False, True])
def test_probes_are_the_loop_over_losses(make: Any, reverse: bool, lengths: Any, resetting: bool) -> None:
    inputs, resets = torch.randn(6, 3, 2), None
    if resetting:
        resets = torch.zeros(6, 3, dtype=torch.bool)
        resets[2, 0] = resets[4, 1] = True
    rnn = ur.unroll(make(2, 3), reverse=reverse)
    layer = ur.diagnose(rnn, inputs, total, lengths=lengths, resets=resets).layers[0]
    copies = ur.copies(rnn, inputs, lengths=lengths, resets=resets)
    if resets is not None and lengths is not None:
        resets = resets & (torch.arange(6).unsqueeze(1) < torch.tensor(lengths))
    wanted = every_probe(copies, resets, reverse)
    assert layer.lag is not None
    assert layer.lag.lags == tuple(sorted(wanted))
    assert layer.lag.counts == tuple(len(wanted[lag]) for lag in layer.lag.lags)
    for n, lag in enumerate(layer.lag.lags):
        figures = layer.lag.lower[n], layer.lag.median[n], layer.lag.upper[n]
        assert figures == pytest.approx(quartiles(torch.tensor(wanted[lag])), rel=1e-8, abs=1e-14)


@pytest.mark.parametrize("lengths", [None, [4, 7, 2]])
def test_flow_and_shares_are_those_of_copies(lengths: Any) -> None:
    inputs, rnn = torch.randn(7, 3, 2), ur.unroll(ur.LSTMCell(2, 3))
    layer = ur.diagnose(rnn, inputs, lambda o, s: o.square().sum(), lengths=lengths).layers[0]
    copies = ur.copies(rnn, inputs, lengths=lengths)
    copies.backward(copies.outputs.square().sum())
    for t, copy in enumerate(copies):
        both = torch.cat(copy.total_state_grad, -1)
        assert layer.flow.norms[t] == pytest.approx(float(both.norm()), rel=1e-12)
        assert layer.flow.median[t] == pytest.approx(quartiles(both.norm(dim=-1))[1], rel=1e-12)
    for share in layer.weights:
        whole = copies.weight_grad[share.name]
        assert share.norms == pytest.approx(whole.flatten(1).norm(dim=1).tolist(), rel=1e-12)
        flat, added = whole.flatten(1), whole.sum(0).flatten()
        cosines = torch.nn.functional.cosine_similarity(flat, added.expand_as(flat), dim=1, eps=0.0).nan_to_num()
        assert share.cosines == pytest.approx(cosines.tolist(), abs=1e-12)
        assert share.norm == pytest.approx(float(rnn.cell.get_parameter(share.name).grad.norm()), rel=1e-12)  # type: ignore[union-attr]


def test_fewer_probes_are_spread_and_one_is_the_last() -> None:
    rnn, inputs = ur.unroll(ur.GRUCell(2, 3)), torch.randn(9, 2, 2)
    spread = ur.diagnose(rnn, inputs, total, probes=3).layers[0].lag
    assert spread is not None
    assert (spread.steps, spread.probes) == ((0, 4, 8), 3)
    one = ur.diagnose(rnn, inputs, total, probes=1).layers[0].lag
    at_end = ur.diagnose(rnn, inputs, lambda o, s: o[-1].sum()).layers[0].lag
    assert one is not None
    assert at_end is not None
    assert one.steps == at_end.steps == (8,)
    assert one.median == at_end.median


def test_a_loss_of_the_last_state_is_a_probe_at_each_rows_end() -> None:
    rnn, inputs = ur.unroll(LinearCell(torch.tensor(0.5))), torch.randn(8, 3, 1)
    found = ur.diagnose(rnn, inputs, lambda o, s: s.sum(), lengths=[8, 2, 5]).layers[0].lag
    assert found is not None
    assert found.steps == (1, 4, 7)
    assert found.counts == (3, 3, 2, 2, 2, 1, 1, 1)
    assert found.median == pytest.approx([0.5**k for k in found.lags], **CLOSE)


class Mapped(torch.autograd.Function):
    """A Function with a backward that vmap cannot enter: it asks for numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y) if float(grad.abs().sum()) >= 0 else grad


class OwnFunctionCell(nn.Module):
    def __init__(self, own: bool) -> None:
        super().__init__()
        self.weight, self.own = nn.Parameter(torch.eye(3) * 0.7), own

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, 3, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        mixed = state @ self.weight + input
        hidden = Mapped.apply(mixed) if self.own else mixed.tanh()
        return hidden, hidden


def test_a_backward_that_cannot_be_mapped_gives_the_same_figures_and_says_what_is_missing() -> None:
    inputs = torch.randn(6, 2, 3)
    plain = ur.diagnose(ur.unroll(OwnFunctionCell(False)), inputs, total).layers[0]
    own = ur.diagnose(ur.unroll(OwnFunctionCell(True)), inputs, total).layers[0]
    assert plain.lag is not None
    assert own.lag is not None
    assert own.lag.median == pytest.approx(plain.lag.median, rel=1e-12)
    assert own.jacobian is None
    assert own.lyapunov is None
    assert {"jacobian", "lyapunov"} <= {one.figure for one in own.missing}
    assert plain.jacobian is not None


@pytest.mark.parametrize("make", [ur.RNNCell, ur.LSTMCell, ur.GRUCell])
def test_jacobian_products_are_autograds(make: Any) -> None:
    rnn, inputs = ur.unroll(make(2, 3)), torch.randn(6, 1, 2)
    found = ur.diagnose(rnn, inputs, total).layers[0].jacobian
    copies, product = ur.copies(rnn, inputs), None
    wanted = {}
    for t, copy in enumerate(copies):
        at = copy.state if isinstance(copy.state, tuple) else (copy.state,)

        def step(flat: Tensor, t: int = t, many: int = len(at)) -> Tensor:
            parts = flat.chunk(many, -1)
            following = rnn.cell(copies[t].input, parts if many > 1 else parts[0])[1]
            return torch.cat(following, -1) if many > 1 else following

        jacobian = torch.autograd.functional.jacobian(step, torch.cat(at, -1).detach())[0, :, 0]
        product = jacobian if product is None else jacobian @ product
        wanted[t + 1] = float(product.norm()), float(torch.linalg.matrix_norm(product, 2))
    assert found is not None
    assert (found.size, found.tangents) == (3 * len(at), 3 * len(at))
    assert found.norm == pytest.approx([wanted[lag][0] for lag in found.lags], rel=1e-9)
    assert found.median == pytest.approx([wanted[lag][1] for lag in found.lags], rel=1e-9)


def test_with_fewer_tangents_than_entries_the_singular_value_is_bounded_from_below() -> None:
    rnn, inputs = ur.unroll(ur.RNNCell(2, 64)), torch.randn(8, 1, 2)
    found = ur.diagnose(rnn, inputs, total).layers[0].jacobian
    assert found is not None
    assert (found.size, found.tangents) == (64, 32)
    copies, product = ur.copies(rnn, inputs), torch.eye(64)
    for n, lag in enumerate(found.lags):
        hidden = copies[lag - 1].next_state[0].detach()
        product = torch.diag(1 - hidden**2) @ rnn.cell.weight_hh.detach() @ product  # type: ignore[operator]
        exact = float(torch.linalg.matrix_norm(product, 2))
        assert 0.9 * exact <= found.median[n] <= exact * (1 + 1e-9)
        assert found.norm[n] == pytest.approx(float(product.norm()), rel=0.2)


@pytest.mark.parametrize("lengths", [None, [60, 45, 30]])
def test_lyapunov_exponents_of_a_diagonal_cell_are_the_logs_of_its_entries(lengths: Any) -> None:
    entries = torch.tensor([0.5, 1.2, 0.9])
    found = ur.diagnose(ur.unroll(LinearCell(torch.diag(entries))), torch.randn(60, 3, 3), total, lengths=lengths)
    exponents = found.layers[0].lyapunov
    assert exponents is not None
    assert exponents.exponents == pytest.approx(entries.log().sort(descending=True).values.tolist(), abs=1e-12)
    assert exponents.errors == pytest.approx([0.0] * 3, abs=1e-12)


def test_an_exploding_gradient_is_clipped_at_what_most_copies_give() -> None:
    # Every copy's share is w^(T-1) h_0 = 10: the norm of 40 such shares that do not agree is sqrt(40) times as much.
    T, w = 40, 1.2
    start = torch.full((1, 1), 10 / w ** (T - 1))
    found = ur.diagnose(ur.unroll(LinearCell(torch.tensor(w))), torch.zeros(T, 1, 1), lambda o, s: s.sum(), state=start)
    (finding,) = found.verdict.findings
    assert finding.kind == "exploding"
    assert finding.remedies[0].text.endswith(f"clip_grad_norm_(rnn.parameters(), {10 * math.sqrt(T):.2g})")


class Dropping(nn.Module):
    """A cell that draws random numbers in its step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, 3, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(nn.functional.dropout(state, 0.5) @ self.weight + input)
        return hidden, hidden


def test_probes_see_the_masks_that_the_run_drew() -> None:
    rnn, inputs = ur.unroll(Dropping()), torch.randn(6, 2, 3)
    torch.manual_seed(5)
    layer = ur.diagnose(rnn, inputs, total).layers[0]
    torch.manual_seed(5)
    wanted = every_probe(ur.copies(rnn, inputs), None, False)
    assert layer.lag is not None
    assert layer.lag.median == pytest.approx([quartiles(torch.tensor(wanted[lag]))[1] for lag in layer.lag.lags])
    why = {one.figure: one.why for one in layer.missing}
    assert "it draws random numbers" in why["jacobian"]


class Lorenz(nn.Module):
    """The Lorenz system (sigma = 10, rho = 28, beta = 8/3) by RK4 with dt = 0.01: a cell without inputs or weights."""

    linear = torch.tensor([[-10.0, 10.0, 0.0], [28.0, -1.0, 0.0], [0.0, 0.0, -8 / 3]], dtype=torch.float64)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.randn(batch_size, 3) + torch.tensor([1.0, 1.0, 25.0])

    def slope(self, s: Tensor) -> Tensor:
        x = s[:, :1]
        return s @ self.linear.T + torch.cat([torch.zeros_like(x), -x * s[:, 2:], x * s[:, 1:2]], 1)

    def forward(self, input: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        dt = 0.01
        k1 = self.slope(s)
        k2 = self.slope(s + dt / 2 * k1)
        k3 = self.slope(s + dt / 2 * k2)
        k4 = self.slope(s + dt * k3)
        following = s + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return following, following


def test_the_lorenz_system_has_its_known_leading_exponent() -> None:
    rnn, rows = ur.unroll(Lorenz(), engine="reference"), 100
    with torch.no_grad():
        _, start = rnn(torch.zeros(1000, rows, 1))  # onto the attractor
        copies = ur.copies(rnn, torch.zeros(3000, rows, 1), start)
    _, found = measure_tangents(Trajectory.of(Timeline(copies, None), rows), 1, profile=False)
    assert found.rows == rows
    assert found.exponents[0] / 0.01 == pytest.approx(0.906, abs=0.02)


@pytest.mark.parametrize(("forget", "memory"), [(0.0, 1.0), (0.5, 2.0), (1.0, math.inf)])
def test_an_lstm_with_a_fixed_forget_gate(forget: float, memory: float) -> None:
    cell = ur.LSTMCell(2, 3)
    nn.init.zeros_(cell.weight_hh)
    nn.init.zeros_(cell.weight_ih[3:6].data)
    cell.bias_hh.data.zero_()  # type: ignore[union-attr]
    cell.bias_ih.data[3:6] = {0.0: -1e4, 0.5: 0.0, 1.0: 1e4}[forget]  # type: ignore[union-attr]
    layer = ur.diagnose(ur.unroll(cell), torch.randn(10, 4, 2), lambda o, s: s[1].sum()).layers[0]
    (found,) = layer.units.memory
    assert (found.gate, found.mean, found.steps) == ("forget", forget, memory)
    assert found.median == memory
    assert layer.lag is not None
    # c_t is f c_(t-1) + ...: the gradient is multiplied by f once for each copy.
    assert layer.lag.median == pytest.approx([math.sqrt(3) * forget**lag for lag in layer.lag.lags])


def test_gates_states_and_radii_are_those_of_the_equations() -> None:
    rnn, inputs = ur.unroll(ur.GRUCell(2, 3)), 8 * torch.randn(5, 4, 2)
    units = ur.diagnose(rnn, inputs, total).layers[0].units
    cell, copies = rnn.cell, ur.copies(rnn, inputs)
    assert [gate.name for gate in units.gates] == ["reset", "update", "candidate"]
    for t, copy in enumerate(copies):
        products = copy.input @ cell.weight_ih.T + cell.bias_ih, copy.state @ cell.weight_hh.T + cell.bias_hh  # type: ignore[operator]
        (r_i, z_i, n_i), (r_h, z_h, n_h) = (x.chunk(3, -1) for x in products)
        r, z = torch.sigmoid(r_i + r_h), torch.sigmoid(z_i + z_h)
        n = torch.tanh(n_i + r * n_h)
        for gate, values, slope in zip(
            units.gates, (r, z, n), (4 * r * (1 - r), 4 * z * (1 - z), 1 - n * n), strict=True
        ):
            assert gate.saturated[t] == pytest.approx(float((slope < 0.1).double().mean()))
            assert gate.mean[t] == pytest.approx(float(values.detach().mean()))
        assert units.states[0].norms[t] == pytest.approx(float(copy.next_state.detach().norm(dim=-1).mean()))
    assert any(gate.share > 0 for gate in units.gates)
    blocks = cell.weight_hh.detach().chunk(3)  # type: ignore[operator]
    wanted = [float(torch.linalg.eigvals(block).abs().max()) for block in blocks]
    assert [radius.value for radius in units.radii] == pytest.approx(wanted)
    assert [radius.name for radius in units.radii] == [f"weight_hh ({g})" for g in ("reset", "update", "candidate")]


def test_dead_units_of_a_relu() -> None:
    rnn = ur.unroll(ur.RNNCell(2, 4, nonlinearity="relu"))
    rnn.cell.bias_ih.data[:3] = -100.0  # type: ignore[union-attr, index]
    found = ur.diagnose(rnn, torch.randn(6, 3, 2), total)
    assert found.layers[0].units.dead >= 3
    assert "saturated" in {finding.kind for finding in found.verdict.findings}


@pytest.mark.parametrize("make", [ur.RNNCell, ur.LSTMCell, ur.GRUCell, ur.MinGRUCell])
def test_every_engine_has_the_same_figures(make: Any) -> None:
    cell, inputs = make(2, 5), torch.randn(9, 3, 2)
    engines = ("auto", "reference", "eager", "native")
    told = [ur.diagnose(ur.unroll(cell, engine=name), inputs, last, lengths=[9, 9, 9]).to_json() for name in engines]
    assert len(set(told)) == 1
    # And these are the gradients that each engine gives.
    for name in engines:
        rnn = ur.unroll(cell, engine=name)
        cell.zero_grad()
        last(*rnn(inputs)).backward()
        norm = math.hypot(*(float(parameter.grad.norm()) for parameter in cell.parameters()))
        assert norm == pytest.approx(json.loads(told[0])["grad_norm"], rel=1e-9)


def test_nothing_is_left_changed() -> None:
    rnn, inputs = ur.unroll(ur.LSTMCell(2, 3)), torch.randn(5, 2, 2, requires_grad=True)
    last(*rnn(inputs)).backward()
    grads = [parameter.grad.clone() for parameter in (*rnn.parameters(), inputs)]
    weights, random = [parameter.clone() for parameter in rnn.parameters()], torch.random.get_rng_state()
    ur.diagnose(rnn, inputs, last)
    assert all(torch.equal(a, b.grad) for a, b in zip(grads, (*rnn.parameters(), inputs), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, rnn.parameters(), strict=True))
    assert torch.equal(random, torch.random.get_rng_state())


def test_layers_and_directions_have_figures_of_their_own() -> None:
    layers = ur.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    found = ur.diagnose(layers, torch.randn(2, 6, 3), total, lengths=[6, 4])
    names = [f"layer {n}, {way}" for n in (0, 1) for way in ("forwards", "backwards")]
    assert [layer.name for layer in found.layers] == names
    assert [layer.weights[1].name for layer in found.layers] == [
        "weight_hh_l0",
        "weight_hh_l0_reverse",
        "weight_hh_l1",
        "weight_hh_l1_reverse",
    ]
    copies = ur.copies(layers, torch.randn(2, 6, 3), lengths=[6, 4])
    assert len(copies[0].forwards) == found.T
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(6, 3), torch.randn(4, 3)])
    one = ur.diagnose(ur.unroll(ur.GRUCell(3, 4)), packed, lambda o, s: o.data.sum())
    assert (one.T, one.B, one.layers[0].lag.counts[-1]) == (6, 2, 1)  # type: ignore[union-attr]


class Attending(nn.Module):
    """A cell with a context."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3) / 3)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, 3, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(state @ self.weight + input + context)
        return hidden, hidden


def test_a_context_reaches_every_figure() -> None:
    found = ur.diagnose(ur.unroll(Attending()), torch.randn(5, 2, 3), total, lengths=[5, 3], context=torch.randn(2, 3))
    (layer,) = found.layers
    assert layer.jacobian is not None
    assert [gate.name for gate in layer.units.gates] == ["tanh 1"]
    assert [one.figure for one in layer.missing] == ["units.memory"]


class Coupled(Attending):
    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = torch.tanh(state @ self.weight + input)
        hidden = hidden - hidden.mean(0)
        return hidden, hidden


def test_what_cannot_be_measured_is_named_with_its_reason() -> None:
    layer = ur.diagnose(ur.unroll(Coupled()), torch.randn(5, 3, 3), total).layers[0]
    assert layer.jacobian is None
    why = {one.figure: one.why for one in layer.missing}
    assert "rows depend on each other" in why["jacobian"]
    assert layer.lag is not None


class Counting(nn.Module):
    """A state that no gradient flows through."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, dtype=torch.int64)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return input * self.weight, state + 1


def test_a_state_that_counts_has_no_lag_and_this_is_said() -> None:
    found = ur.diagnose(ur.unroll(Counting()), torch.ones(5, 2, 3), total)
    assert {one.figure: one.why for one in found.layers[0].missing}["lag"] == "the state has no floating numbers"
    assert found.layers[0].weights[0].norms == pytest.approx([math.sqrt(3 * 4)] * 5)
    assert found.verdict.healthy


class Spiral(nn.Module):
    """h' = w h + x, of complex numbers."""

    def __init__(self, weight: complex) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, 1, dtype=torch.complex128)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = state * self.weight + input
        return state.real, state


def test_complex_states_have_the_powers_of_the_weights_size() -> None:
    layer = ur.diagnose(ur.unroll(Spiral(0.3 + 0.4j)), torch.randn(10, 2, 1), total).layers[0]
    assert layer.lag is not None
    assert layer.lag.median == pytest.approx([0.5**lag for lag in layer.lag.lags], **CLOSE)
    assert layer.flow.norms[-1] == pytest.approx(0.5 * math.sqrt(2))
    assert layer.units.states[0].norms[0] > 0


def test_where_no_gradient_flows_it_has_vanished() -> None:
    dead = ur.RNNCell(2, 3, nonlinearity="relu")
    dead.bias_ih.data.fill_(-100.0)  # type: ignore[union-attr]
    inputs = torch.randn(9, 2, 2)
    cases: list[tuple[Any, Any]] = [
        (dead, lambda outputs, state: (outputs[-1] - 1).square().sum()),
        (ur.GRUCell(2, 3), lambda outputs, state: (0 * outputs).sum()),
    ]
    for cell, loss in cases:
        found = ur.diagnose(ur.unroll(cell), inputs, loss)
        assert (found.verdict.kind, found.grad_norm) == ("vanishing", 0.0)
        assert "no gradient" in found.verdict.findings[0].sentence


def test_a_bad_number_that_the_loss_does_not_take_is_traced_too() -> None:
    inputs = torch.randn(9, 2, 2)
    inputs[7, 1, 0] = math.nan
    with pytest.raises(ur.NonFiniteError, match="the input of copy 7 of GRUCell holds nan in row 1"):
        ur.diagnose(ur.unroll(ur.GRUCell(2, 3)), inputs, lambda outputs, state: outputs[3].sum())


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("healthy", lambda: (ur.unroll(ur.LSTMCell(2, 32)), torch.randn(40, 8, 2))),
        ("healthy", lambda: (ur.unroll(ur.GRUCell(2, 32)), torch.randn(40, 8, 2))),
        ("healthy", lambda: (orthogonal(1.0), 0.1 * torch.randn(100, 8, 2))),
        ("healthy", lambda: (ur.unroll(LinearCell(torch.tensor(1.0))), torch.randn(100, 4, 1))),
        ("vanishing", lambda: (ur.unroll(ur.RNNCell(2, 32)), torch.randn(100, 8, 2))),
        ("exploding", lambda: (ur.unroll(LinearCell(torch.tensor(1.2))), torch.randn(60, 4, 1))),
        ("chaotic", lambda: (orthogonal(4.0), 0.1 * torch.randn(100, 8, 2))),
        ("saturated", lambda: (ur.unroll(ur.RNNCell(2, 32)), 100 * torch.randn(3, 8, 2))),
        ("cut by truncation", lambda: (ur.unroll(LinearCell(torch.tensor(0.99)), horizon=20), torch.randn(60, 4, 1))),
    ],
)
def test_verdicts(kind: str, make: Any) -> None:
    rnn, inputs = make()
    found = ur.diagnose(rnn, inputs, total).verdict
    assert found.kind == kind, str(found)
    assert found.healthy == (kind == "healthy")


def orthogonal(gain: float) -> ur.Unrolled:
    rnn = ur.unroll(ur.RNNCell(2, 64))
    ur.remedy.orthogonal(rnn, gain)
    return rnn


def test_remedies_are_those_of_the_network() -> None:
    def offered(cell: Any) -> str:
        return str(ur.diagnose(ur.unroll(cell), torch.randn(200, 4, 2), last).verdict)

    simple, gated = offered(ur.RNNCell(2, 16)), offered(ur.LSTMCell(2, 16))
    assert "forget_bias" not in simple
    assert "a gated cell" in simple
    assert "forget_bias" in gated
    assert "a gated cell" not in gated
    assert "forget_bias" not in offered(ur.LSTMCell(2, 16, bias=False))


def test_a_horizon_can_be_said_where_windows_cut() -> None:
    rnn, inputs = ur.unroll(LinearCell(torch.tensor(0.99))), torch.randn(60, 4, 1)
    found = ur.diagnose(rnn, inputs, total, horizon=20)
    assert (found.horizon, found.verdict.kind) == (20, "cut by truncation")
    assert "horizon=60" in str(found.verdict)  # a tenth is left after more than is measured


def test_everything_turns_into_json_and_text() -> None:
    found = ur.diagnose(ur.stack([ur.LSTMCell(2, 3), ur.RNNCell(3, 4)]), torch.randn(5, 2, 2), total)
    plain = json.loads(found.to_json())
    assert plain["verdict"]["kind"] == found.verdict.kind
    assert plain["layers"][1]["reach"]["measured"] == 5
    assert plain["layers"][0]["lag"]["median"] == list(found.layers[0].lag.median)  # type: ignore[union-attr]
    assert len(plain["layers"][0]["units"]["gates"]) == 5
    text = str(found)
    assert text.startswith("Stack, 5 copies, batch 2: loss ")
    assert "layer 1, RNNCell" in text
    assert html.unescape(found._repr_html_()) == f"<pre>{text}</pre>"
    assert json.loads(Reach(None, None, None, 0.0, 5).to_json()) == {
        "tenth": None,
        "hundredth": None,
        "thousandth": None,
        "rate": 0.0,
        "measured": 5,
        "halving": "inf",
        "doubling": "inf",
    }


@pytest.mark.parametrize(
    ("error", "told", "options"),
    [
        (
            ur.GradientError,
            "does not depend on these copies",
            {"loss": lambda o, s: torch.ones((), requires_grad=True)},
        ),
        (ur.GradientError, "the loss has no gradient", {"loss": lambda o, s: torch.ones(())}),
        (ur.GradientError, "the loss must be a scalar", {"loss": lambda o, s: o.sum(0)}),
        (ur.InputError, "at least 2 steps, got 1", {"inputs": torch.zeros(1, 2, 3, dtype=torch.float64)}),
        (ur.InputError, "at least 2 steps, got 1", {"lengths": [1, 1]}),
        (
            ur.NonFiniteError,
            "the input of copy 0 of GRUCell holds nan",
            {"inputs": torch.full((5, 2, 3), math.nan, dtype=torch.float64)},
        ),
        (ur.NonFiniteError, "the loss is inf, while all outputs", {"loss": lambda o, s: (o / 0).abs().sum()}),
        (ur.OptionError, "probes must be a positive integer, got 0", {"probes": 0}),
        (ur.OptionError, "horizon must be a positive integer", {"horizon": -1}),
        (ur.OptionError, "lyapunov must be a positive integer, got True", {"lyapunov": True}),
        (ur.OptionError, "loss must be a function", {"loss": 3.0}),
        (ur.OptionError, "lyapunov must be from 1 to the 4 numbers", {"lyapunov": 5}),
        (ur.OptionError, "copies takes what unroll or stack made", {"rnn": nn.Linear(3, 3)}),
    ],
)
def test_bad_input_is_refused(error: type[Exception], told: str, options: dict[str, Any]) -> None:
    given: dict[str, Any] = {"rnn": ur.unroll(ur.GRUCell(3, 4)), "inputs": torch.randn(5, 2, 3), "loss": total}
    with pytest.raises(error, match=told):
        ur.diagnose(**{**given, **options})


def test_a_network_under_no_grad_is_refused() -> None:
    with torch.no_grad(), pytest.raises(ur.GradientError, match="needs gradients"):
        ur.diagnose(ur.unroll(ur.GRUCell(3, 4)), torch.randn(5, 2, 3), total)


def test_frozen_weights_have_no_shares_but_states_have_gradients() -> None:
    rnn = ur.unroll(ur.GRUCell(3, 4))
    rnn.requires_grad_(False)
    found = ur.diagnose(rnn, torch.randn(5, 2, 3), total)
    assert found.layers[0].weights == ()
    assert found.layers[0].lag is not None
    assert found.grad_norm == 0.0


def adding(T: int, B: int) -> tuple[Tensor, Tensor]:
    """The adding problem: `[T, B, 2]` numbers and marks, of which there are two; their sum `[B]`."""
    numbers, marks, rows = torch.rand(T, B), torch.zeros(T, B), torch.arange(B)
    marks[torch.randint(0, T // 2, (B,)), rows] = 1
    marks[torch.randint(T // 2, T, (B,)), rows] = 1
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(0)


def remedied(rnn: ur.Unrolled, finding: Any) -> None:
    """Apply the first remedy that needs no new weights."""
    next(remedy.apply for remedy in finding.remedies if remedy.apply is not None)()


@pytest.mark.parametrize(("make", "healed"), [(ur.RNNCell, "orthogonal"), (ur.LSTMCell, "chrono")])
def test_on_the_adding_problem_the_remedy_raises_the_measured_reach(make: Any, healed: str) -> None:
    T, head, rnn = 200, nn.Linear(64, 1), ur.unroll(make(2, 64))
    inputs, sums = adding(T, 8)

    def loss(outputs: Tensor, state: Any) -> Tensor:
        return (head(outputs[-1]).squeeze(1) - sums).square().mean()

    before = ur.diagnose(rnn, inputs, loss)
    (finding,) = before.verdict.findings
    assert finding.kind == "vanishing"
    assert healed in finding.remedies[0].text
    remedied(rnn, finding)
    after = ur.diagnose(rnn, inputs, loss)
    reaches = before.layers[0].reach, after.layers[0].reach
    assert reaches[0] is not None
    assert reaches[0].hundredth is not None
    assert reaches[1] is not None
    assert reaches[1].hundredth is None or reaches[1].hundredth > 4 * reaches[0].hundredth
    if make is ur.LSTMCell:
        assert after.verdict.healthy, str(after.verdict)
        assert reaches[1].tenth is None  # more than a tenth of the gradient is left after all 200 copies


@pytest.mark.slow
def test_on_the_adding_problem_the_error_follows_the_reach() -> None:
    def trained(make: Any, updates: int, *, remedy: bool) -> tuple[str, float]:
        torch.manual_seed(1)
        rnn, head = ur.unroll(make(2, 64)), nn.Linear(64, 1)
        weights = [*rnn.parameters(), *head.parameters()]
        if remedy:
            ur.remedy.chrono(rnn, 200)
        inputs, _ = adding(200, 8)
        kind = ur.diagnose(rnn, inputs, lambda outputs, state: head(outputs[-1]).sum()).verdict.kind
        optimizer, errors = torch.optim.Adam(weights, lr=2e-3), list[float]()
        for _ in range(updates):
            inputs, sums = adding(200, 32)
            error = (head(rnn(inputs)[0][-1]).squeeze(1) - sums).square().mean()
            optimizer.zero_grad()
            error.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            errors.append(float(error.detach()))
        return kind, sum(errors[-100:]) / 100

    torch.set_default_dtype(torch.float32)
    variance = 1 / 6  # the error of who always says 1
    for make in (ur.RNNCell, ur.LSTMCell):
        kind, error = trained(make, 1800, remedy=False)
        assert kind == "vanishing"
        assert error > 0.8 * variance
    kind, error = trained(ur.LSTMCell, 1800, remedy=True)
    assert kind == "healthy"
    assert error < 0.2 * variance
