"""Complex numbers in a step are pairs of real ones on the compiled engines, with torch's numbers and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur

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
