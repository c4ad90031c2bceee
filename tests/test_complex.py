"""Complex numbers in a step are pairs of real ones on the compiled engines, with torch's numbers and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from unrolled.networks.torch_layers import networks_of

C128, F64 = torch.complex128, torch.float64
T, B, H = 4, 3, 5


class Function(nn.Module):
    """Some function of two inputs at every step; the state is handed on as it is."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, 1, device=device)

    def forward(self, input: tuple[Tensor, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(*input), state


def _matrices(x: Tensor) -> Tensor:
    return x.unsqueeze(2) * x.unsqueeze(1)


ONE = {
    "abs": torch.abs,
    "angle": torch.angle,
    "sgn": torch.sgn,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "log": torch.log,
    "log2": torch.log2,
    "log10": torch.log10,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "square": torch.square,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "conj": torch.conj,
    "conj physical": torch.conj_physical,
    "neg": torch.neg,
    "real": lambda z: z.real,
    "imag": lambda z: z.imag,
    "imag of conj": lambda z: z.conj().imag * 2,
    "real of conj": lambda z: z.conj().real + z.real,
    "view as real": torch.view_as_real,
    "there and back": lambda z: torch.view_as_complex(torch.view_as_real(z) * 2),
    "stacked": lambda z: torch.view_as_complex(torch.stack([z.imag, z.real], -1)),
    "resolve": lambda z: z.conj().resolve_conj() + z.mH.transpose(0, 1).resolve_conj(),
    "to complex": lambda z: z.real.to(C128) * z,
    "to real": lambda z: z.abs().to(z.dtype).real,
    "ones and zeros": lambda z: (torch.ones_like(z) + torch.zeros_like(z) + torch.full_like(z, 2 - 1j)) * z,
    "scalar": lambda z: (1 + 2j) * z - 1j + (0.5 - z) / 2j,
    "scalar of reals": lambda z: 1j * z.real + torch.exp(1j * z.imag),
    "divided": lambda z: 3 / z + (1 - 1j) / z,
    "alpha": lambda z: torch.add(z, z * z, alpha=2) - torch.sub(z, z.real, alpha=3),
    "pow 2": lambda z: z**2,
    "pow 3": lambda z: z**3,
    "pow -1": lambda z: z**-1,
    "pow 0": lambda z: z**0 + z,
    "pow 1/2": lambda z: z**0.5 + z**-0.5,
    "pow 2.5": lambda z: z**2.5,
    "pow complex": lambda z: z ** (1.5 + 0.5j),
    "pow of number": lambda z: 2**z + (1 + 1j) ** z,
    "sum": lambda z: z.sum(-1),
    "mean": lambda z: z.mean(-1, keepdim=True) * z,
    "prod": lambda z: z.prod(-1),
    "cumsum": lambda z: z.cumsum(-1),
    "norm": lambda z: z / z.norm(dim=-1, keepdim=True),
    "norm 1": lambda z: torch.linalg.vector_norm(z, 1, dim=-1),
    "flip": lambda z: z.flip(-1) * z,
    "roll": lambda z: z.roll(2, -1) * z,
    "slices": lambda z: torch.cat([z[:, ::2], z[:, 1:2].real], -1) * 2,
    "chunks": lambda z: torch.stack(z[:, :4].chunk(2, -1), 1).prod(1),
    "pad": lambda z: nn.functional.pad(z, (1, 2), value=0.5),
    "index": lambda z: z.index_select(-1, torch.arange(3) // 2) * z[:, :3],
    "triangle": lambda z: _matrices(z).tril().sum(-1),
    "diagonal": lambda z: _matrices(z).diagonal(dim1=1, dim2=2) * z,
    "isfinite": lambda z: torch.where(z.isfinite() & ~z.isnan(), z, 0j) * z,
    "fft": lambda z: torch.fft.fft(z) * z,
    "ifft": lambda z: torch.fft.ifft(z, norm="ortho") * z,
    "fft of few": lambda z: torch.fft.fft(z, n=3, norm="forward").sum(-1),
    "rfft": lambda z: torch.fft.rfft(z.real, norm="ortho") ** 2,
    "irfft": lambda z: torch.fft.irfft(z, n=8),
    "irfft odd": lambda z: torch.fft.irfft(z, n=7, norm="forward"),
    "fft2": lambda z: torch.fft.fft2(_matrices(z)).sum(-1),
    "rfft2": lambda z: torch.fft.irfft2(torch.fft.rfft2(_matrices(z).real) ** 2, s=(H, H)).sum(-1),
    "hfft": lambda z: torch.fft.hfft(z, n=8),
    "fftshift": lambda z: torch.fft.fftshift(z, dim=-1) * z,
}
TWO = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "with a real one": lambda z, w: z * w.real + w.imag - z / w.real + w.imag / z - (1 - w.real),
    "complex": lambda z, w: torch.complex(z.real, w.imag[:, :1]),
    "polar": lambda z, w: torch.polar(z.real, w.imag),
    "polar of nothing": lambda z, w: torch.polar(torch.relu(z.real), w.imag),
    "where": lambda z, w: torch.where(z.real > 0, w, z),
    "masked": lambda z, w: z.masked_fill(w.real > 0, 0.25) * w,
    "equal": lambda z, w: torch.where(z == w, z, w) + (z != w).to(z.dtype),
    "lerp": lambda z, w: torch.lerp(z, w, 0.3) + torch.lerp(z, w, z),
    "addcmul": lambda z, w: torch.addcmul(z, z, w, value=2) + torch.addcdiv(z, z, w),
    "pow": lambda z, w: z ** (w / 3) + z**w.real,
    "bmm": lambda z, w: (_matrices(z) @ _matrices(w)).sum(-1),
    "bmm of real": lambda z, w: (_matrices(z) @ _matrices(w.real.to(C128))).sum(-1),
    "baddbmm": lambda z, w: torch.baddbmm(_matrices(z), _matrices(w), _matrices(z), beta=0.5, alpha=2j).sum(-1),
    "einsum": lambda z, w: torch.einsum("bi,bj->bj", z.conj(), w),
    "outer": lambda z, w: (z.unsqueeze(2) * w.conj().unsqueeze(1)).sum(1),
    "in place": lambda z, w: (z * w).add_(z).mul_(0.5j),
    "bound": lambda z, w: torch.fft.ifft(torch.fft.fft(z) * torch.fft.fft(w).conj()),
}


def _two(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, w: function(z)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {name: _two(f) for name, f in ONE.items()} | TWO


def reals(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def same(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    torch.testing.assert_close(reals(found), reals(wanted), rtol=tolerance, atol=tolerance, equal_nan=True)


def _with_gradients(
    function: Callable[[Tensor, Tensor], Tensor], z: Tensor, w: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    z, w = z.clone().requires_grad_(), w.clone().requires_grad_()
    out = function(z, w)
    weights = torch.linspace(0.5, 1.5, reals(out).numel(), dtype=F64).view(reals(out).shape)
    gz, gw = torch.autograd.grad((reals(out) * weights).sum(), (z, w), allow_unused=True)
    return out.detach(), gz, gw


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_formula_gives_torchs_values_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    z, w = torch.randn(2, T, B, H, dtype=C128)
    z[0, 0, 0], w[1, 0, 0] = -1.5, 1 + 0j  # on the branch cut of roots and logarithms
    cell = Function(FUNCTIONS[name])
    rnn = ur.unroll(cell, engine="eager")
    ours = _with_gradients(lambda z, w: rnn((z, w))[0], z, w)
    theirs = _with_gradients(lambda z, w: torch.stack([cell.function(*x) for x in zip(z, w, strict=True)]), z, w)
    assert rnn.ran == "eager"
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            same(one, other)


SPECIAL = [0.0, -0.0, 1.0, -2.0, 1e-300, 1e-160, -1e200, float("inf"), -float("inf"), float("nan")]
OF_ONE = "abs angle sgn sqrt log exp reciprocal tanh sigmoid real conj"


@pytest.mark.parametrize("name", [*OF_ONE.split(), "pow 2", "pow 2.5", "scalar of reals", "div", "mul"])
def test_special_values_are_torchs(name: str) -> None:
    """A complex number is NaN where either part is; any other agrees in both parts."""
    a, b = (x.flatten() for x in torch.meshgrid(*[torch.tensor(SPECIAL, dtype=F64)] * 2, indexing="ij"))
    z = torch.complex(a, b).view(2, 2, -1)
    w = z.flip(-1).roll(3, -1)
    rnn = ur.unroll(Function(FUNCTIONS[name]), engine="eager")
    found, wanted = rnn((z, w))[0], FUNCTIONS[name](z, w)
    assert rnn.ran == "eager"
    nan = wanted.isnan()
    one, other = (reals(x.masked_fill(nan, 0)) for x in (found, wanted))
    torch.testing.assert_close(found.isnan(), nan)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


# -- cells: the plain loop's numbers, on the native engine


class ComplexCell(nn.Module):
    """The base of cells whose state is complex, of some size, and is given as `[B, size]` zeros."""

    size = H

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, self.size, device=device, dtype=C128)


class LRU(ComplexCell):
    """A. Orvieto et al., "Resurrecting recurrent neural networks for long sequences", ICML 2023."""

    def __init__(self) -> None:
        super().__init__()
        self.log_decay = nn.Parameter(torch.log(-0.5 * torch.log(torch.rand(H, dtype=F64) * 0.2 + 0.75)))
        self.log_angle = nn.Parameter(torch.log(torch.rand(H, dtype=F64) * 6))
        self.into = nn.Parameter(torch.randn(H, H, dtype=C128) / 8)
        self.out = nn.Parameter(torch.randn(H, H, dtype=C128) / 8)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        turn = torch.exp(torch.complex(-torch.exp(self.log_decay), torch.exp(self.log_angle)))
        h = turn * h + torch.sqrt(1 - turn.abs() ** 2) * (x.to(C128) @ self.into.T)
        return (h @ self.out.T).real + x, h


class S4D(nn.Module):
    """A. Gu et al., "On the parameterization and initialization of diagonal state space models", 2022: zero-order hold,
    the state kept as pairs of reals."""

    def __init__(self) -> None:
        super().__init__()
        self.log_step = nn.Parameter(torch.rand(H, dtype=F64) - 2)
        self.poles = nn.Parameter(torch.stack([-0.5 * torch.ones(H, 4), torch.arange(4).repeat(H, 1)], -1).double())
        self.out = nn.Parameter(torch.randn(H, 4, 2, dtype=F64))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, H, 4, 2, dtype=F64)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        poles, h = torch.view_as_complex(self.poles), torch.view_as_complex(state.contiguous())
        turn = torch.exp(poles * self.log_step.exp()[:, None])
        h = turn * h + (turn - 1) / poles * x.unsqueeze(-1)
        return 2 * (torch.view_as_complex(self.out) * h).sum(-1).real, torch.view_as_real(h)


class Unitary(ComplexCell):
    """M. Arjovsky et al., "Unitary evolution recurrent neural networks", ICML 2016."""

    def __init__(self) -> None:
        super().__init__()
        self.phases = nn.Parameter(torch.rand(3, H, dtype=F64) * 6)
        self.into = nn.Parameter(torch.randn(H, H, dtype=C128) / 2)
        self.mirrors = nn.Parameter(torch.randn(2, H, dtype=C128))
        self.bias = nn.Parameter(torch.rand(H, dtype=F64) - 0.5)

    def _reflected(self, h: Tensor, n: int) -> Tensor:
        v = self.mirrors[n]
        return h - 2 * torch.outer(h @ v.conj(), v) / v.abs().square().sum()

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        turns = torch.polar(torch.ones_like(self.phases), self.phases)
        h = self._reflected(torch.fft.fft(h * turns[0], norm="ortho"), 0).roll(2, -1) * turns[1]
        h = self._reflected(torch.fft.ifft(h, norm="ortho"), 1) * turns[2] + x.to(C128) @ self.into.T
        h = torch.relu(h.abs() + self.bias) * h / (h.abs() + 1e-5)
        return torch.cat([h.real, h.imag], -1), h


class Gated(ComplexCell):
    """M. Wolter, A. Yao, "Complex gated recurrent neural networks", NeurIPS 2018: complex inputs, real gates."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, H, 2 * H, dtype=C128) / 4)
        self.bias = nn.Parameter(torch.rand(3, H, dtype=F64) - 0.5)
        self.mixture = nn.Parameter(torch.tensor(0.3, dtype=F64))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([x, h], -1)
        reset, update = (
            torch.sigmoid(self.mixture * z.real + (1 - self.mixture) * z.imag)
            for z in (both @ self.weight[n].mT + self.bias[n] for n in (0, 1))
        )
        new = torch.cat([x, reset * h], -1) @ self.weight[2].mT
        new = torch.relu(new.abs() + self.bias[2]) * torch.sgn(new)
        h = update * h + (1 - update) * new
        return h, h


class Holographic(nn.Module):
    """T. Plate, "Holographic reduced representations", IEEE Transactions on Neural Networks 6 (1995): a real trace, to
    which a key and the input are bound by circular convolution, and a role is unbound by correlation."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.role = (nn.Parameter(torch.randn(H, dtype=F64) / 2) for _ in range(2))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, H, dtype=F64)

    def forward(self, x: Tensor, trace: Tensor) -> tuple[Tensor, Tensor]:
        bound = torch.fft.irfft(torch.fft.rfft(self.key) * torch.fft.rfft(x), n=H)
        trace = torch.tanh(0.9 * trace + bound)
        return torch.fft.irfft(torch.fft.rfft(self.role).conj() * torch.fft.rfft(trace), n=H), trace


class Quantum(ComplexCell):
    """A state vector of norm 1, turned by an input-driven phase and a mixing; it is measured at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(H, H, dtype=C128) / 2)
        self.energy = nn.Parameter(torch.randn(H, H, dtype=F64))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.full((batch_size, H), H**-0.5, dtype=C128)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.exp(1j * (x @ self.energy)) * (state + 0.1 * state @ self.mixing)
        state = state / torch.linalg.vector_norm(state, dim=-1, keepdim=True)
        return state.abs() ** 2, state


class Oscillators(nn.Module):
    """Y. Kuramoto's coupled phases, held as angles; the order parameter is complex, and is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.speed = nn.Parameter(torch.randn(H, dtype=F64))
        self.coupling = nn.Parameter(torch.randn(H, H, dtype=F64))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.arange(H, dtype=F64).expand(batch_size, H)

    def forward(self, x: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        unit = torch.exp(1j * angle)
        pull = (unit.conj() * (unit @ self.coupling.to(C128))).imag
        angle = angle + 0.1 * (self.speed + x + pull)
        return torch.exp(1j * angle).mean(-1, keepdim=True), angle


class Written(ComplexCell):
    """Writes through the real view of a number, and reads the number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(H, dtype=C128) / 2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h * self.weight + x
        torch.view_as_real(h).mul_(0.5)
        return h, h


CELLS = [LRU, S4D, Unitary, Gated, Holographic, Quantum, Oscillators]


def _loop(cell: Any, x: Tensor, lengths: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """A plain loop over the cell, row by row where rows end."""
    if lengths is not None:
        rows = [_loop(cell, x[:n, b : b + 1]) for b, n in enumerate(lengths)]
        outputs = [torch.cat([out, out.new_zeros(len(x) - len(out), *out.shape[1:])]) for out, _ in rows]
        return torch.cat(outputs, 1), torch.cat([state for _, state in rows])
    state, outputs = cell.initial_state(x.shape[1]), []
    for x_t in x:
        out, state = cell(x_t, state)
        outputs.append(out)
    return torch.stack(outputs), state


def _run(run: Callable[[Tensor], tuple[Tensor, Tensor]], cell: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs, last state, and the gradients of a real loss of both."""
    x = x.clone().requires_grad_()
    ends = run(x)
    loss = sum((reals(end) * torch.linspace(0.5, 1.5, reals(end).shape[-1], dtype=F64)).square().sum() for end in ends)
    return [*ends, *torch.autograd.grad(loss, (x, *cell.parameters()))]  # type: ignore[arg-type]


def _made(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    return kind(), torch.randn(T, B, H, dtype=C128 if kind in (Gated, Written) else F64)


@pytest.mark.parametrize("kind", CELLS, ids=lambda kind: kind.__name__)
def test_a_complex_cell_runs_native_with_the_loops_numbers(kind: type[nn.Module]) -> None:
    cell, x = _made(kind)
    rnn = ur.unroll(cell, engine="native")
    lengths = [4, 2, 1]
    for options in ({}, {"lengths": lengths}):
        ours = _run(lambda x, given=options: rnn(x, **given), cell, x)
        theirs = _run(lambda x, given=options: _loop(cell, x, **given), cell, x)
        assert rnn.ran == "native"
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)


@pytest.mark.parametrize(
    "options", [{"checkpoint": lambda T: ur.segments(T, 2)}, {"memory": "100 KB"}], ids=["segments", "budget"]
)
def test_a_complex_state_crosses_segments_and_resets(options: dict[str, Any]) -> None:
    cell, x = _made(Gated)
    resets = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.bool)
    rnn, reference = ur.unroll(cell, engine="native", **options), ur.unroll(cell, engine="reference")
    ours, theirs = (_run(lambda x, rnn=rnn: rnn(x, resets=resets), cell, x) for rnn in (rnn, reference))
    assert rnn.ran == "native"
    for one, other in zip(ours, theirs, strict=True):
        same(one, other)


def test_a_complex_cell_is_trained_as_the_loop_is() -> None:
    trained = []
    for engine in ("native", "reference"):
        cell, x = _made(LRU)
        rnn, optimiser = ur.unroll(cell, engine=engine), torch.optim.Adam(cell.parameters(), 0.01)
        for _ in range(5):
            optimiser.zero_grad()
            rnn(x)[0].square().sum().backward()
            optimiser.step()
        assert rnn.ran == engine
        trained.append(list(cell.parameters()))
    for one, other in zip(*trained, strict=True):
        same(one, other)


def test_single_precision_and_a_state_that_is_passed() -> None:
    cell, x = _made(Gated)
    for parameter in cell.parameters():
        parameter.data = parameter.data.to(torch.complex64 if parameter.is_complex() else torch.float32)
    x, state = x.to(torch.complex64), torch.randn(B, H, dtype=torch.complex64, requires_grad=True)
    rnn = ur.unroll(cell, engine="native")
    found, wanted = rnn(x, state), ur.unroll(cell, engine="reference")(x, state)
    assert rnn.ran == "native"
    for one, other in zip(found, wanted, strict=True):
        same(one, other, 1e-5)
    grads = [torch.autograd.grad(reals(out).square().sum(), state)[0] for out, _ in (found, wanted)]
    same(*grads, 1e-5)


def test_what_is_written_through_a_real_view_is_read_as_complex() -> None:
    cell, x = _made(Written)
    rnn = ur.unroll(cell)
    for one, other in zip(_run(rnn, cell, x), _run(lambda x: _loop(cell, x), cell, x), strict=True):
        same(one, other)


def test_what_has_no_formula_is_named() -> None:
    rnn = ur.unroll(Function(lambda z, w: torch.acosh(z)))
    z = torch.randn(T, B, H, dtype=C128)
    assert "aten.acosh of complex numbers has no formula in real ones" in rnn.plan((z, z)).why
    rnn = ur.unroll(Function(lambda z, w: torch.fft.fft(z, n=300)))
    assert "it transforms 300 numbers by FFT; up to 256 are done by a product" in rnn.plan((z, z)).why


def test_a_plan_names_both_parts() -> None:
    cell, x = _made(LRU)
    plan = ur.unroll(cell).plan(x)
    assert plan.engine == "native"
    assert [name for name, _ in plan.results] == ["output", "next state.real", "next state.imag"]
    assert {read for op in plan.operations for read in op.reads} >= {"state.real", "state.imag", "into.real"}
    assert not any("complex" in op.result for op in plan.operations)


# -- torch.nn's layers of complex numbers


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RNN", {"num_layers": 2, "bidirectional": True}),
        ("GRU", {"batch_first": True}),
        ("LSTM", {"bidirectional": True}),
    ],
)
def test_a_complex_layer_is_torchs(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    theirs = getattr(nn, name)(2, 3, dtype=C128, **options)
    ours = getattr(ur, name)(2, 3, dtype=C128, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, T, 2, dtype=C128)
    (out, last), (wanted, wanted_last) = ours(x), theirs(x)
    assert {network.ran for network in networks_of(ours, "a test")} == {"native"}
    last, wanted_last = (list(s) if isinstance(s, tuple) else [s] for s in (last, wanted_last))
    for one, other in zip([out, *last], [wanted, *wanted_last], strict=True):
        same(one, other)
