"""State spaces, linear attention and oscillators: linear or nearly linear in their state."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.published.example import Example, FromZeros, Tree


class LMU(FromZeros):
    """A. Voelker et al., "Legendre memory units", NeurIPS (2019)."""

    def __init__(self, I: int, H: int, order: int = 8, theta: float = 32.0) -> None:
        super().__init__((H,), (order,))
        q = torch.arange(order, dtype=torch.float64)
        rate = (2 * q + 1)[:, None] / theta
        i, j = torch.meshgrid(q, q, indexing="ij")
        A = torch.where(i < j, -torch.ones_like(i), (-1.0) ** (i - j + 1)) * rate
        E = torch.linalg.matrix_exp(A)
        B = torch.linalg.solve(A, (E - torch.eye(order, dtype=torch.float64)) @ (((-1.0) ** q)[:, None] * rate))
        self.register_buffer("A", E.float())
        self.register_buffer("B", B.float())
        self.read = nn.Linear(I + H + order, 1, bias=False)
        self.mix = nn.Linear(I + H + order, H)

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        h, m = state
        m = F.linear(m, self.A) + F.linear(self.read(torch.cat([x, h, m], -1)), self.B)
        h = torch.tanh(self.mix(torch.cat([x, h, m], -1)))
        return h, (h, m)


class LRU(nn.Module):
    """A complex diagonal state: A. Orvieto et al., "Resurrecting recurrent neural networks", ICML (2023)."""

    def __init__(self, I: int, H: int, N: int = 16) -> None:
        super().__init__()
        self.N = N
        self.nu = nn.Parameter(torch.log(-0.5 * torch.log(0.2 * torch.rand(N) + 0.75)))
        self.theta = nn.Parameter(torch.log(6.28 * torch.rand(N)))
        self.B = nn.Parameter(torch.randn(N, I, dtype=torch.cfloat) / 8)
        self.C = nn.Parameter(torch.randn(H, N, dtype=torch.cfloat) / 8)
        self.D = nn.Linear(I, H, bias=False)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, self.N, dtype=(dtype or torch.float32).to_complex(), device=device)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        turn = torch.exp(torch.complex(-torch.exp(self.nu), torch.exp(self.theta)))
        h = turn * h + torch.sqrt(1 - turn.abs() ** 2) * (x.to(h.dtype) @ self.B.T)
        return (h @ self.C.T).real + self.D(x), h


class S4D(FromZeros):
    """A complex state kept as pairs of real numbers: A. Gu et al., "On the parameterization of S4D", NeurIPS (2022)."""

    def __init__(self, H: int, N: int = 8) -> None:
        super().__init__((H, N, 2))
        self.log_dt = nn.Parameter(2 * torch.rand(H) - 5)
        self.A = nn.Parameter(torch.stack([-0.5 * torch.ones(H, N), math.pi * torch.arange(N).repeat(H, 1)], -1))
        self.C, self.D = nn.Parameter(0.3 * torch.randn(H, N, 2)), nn.Parameter(torch.randn(H))

    def forward(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        A = torch.view_as_complex(self.A)
        dA = torch.exp(A * self.log_dt.exp()[:, None])
        h = dA * torch.view_as_complex(state.contiguous()) + (dA - 1) / A * u.unsqueeze(-1)
        y = 2 * (torch.view_as_complex(self.C) * h).sum(-1).real + self.D * u
        return F.gelu(y), torch.view_as_real(h)


class Mamba(FromZeros):
    """One step of A. Gu and T. Dao, "Mamba" (2023), as its authors write it, on copies of the two states."""

    def __init__(self, H: int, N: int = 4, K: int = 4, rank: int = 3) -> None:
        E = 2 * H
        super().__init__((E, K), (E, N))
        self.N, self.rank = N, rank
        self.enter, self.leave = nn.Linear(H, 2 * E, bias=False), nn.Linear(E, H, bias=False)
        self.conv = nn.Conv1d(E, E, K, groups=E, padding=K - 1)
        self.x_proj, self.dt_proj = nn.Linear(E, rank + 2 * N, bias=False), nn.Linear(rank, E)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, N + 1)).repeat(E, 1))
        self.D = nn.Parameter(torch.ones(E))

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        window, ssm = state[0].clone(), state[1]
        x, z = self.enter(x).chunk(2, -1)
        window.copy_(torch.roll(window, shifts=-1, dims=-1))
        window[:, :, -1] = x
        x = F.silu(torch.sum(window * self.conv.weight.squeeze(1), -1) + self.conv.bias)
        dt, B, C = torch.split(self.x_proj(x), [self.rank, self.N, self.N], -1)
        dt = F.softplus(self.dt_proj(dt))
        dA = torch.exp(torch.einsum("bd,dn->bdn", dt, -torch.exp(self.A_log)))
        ssm = ssm * dA + x.unsqueeze(-1) * torch.einsum("bd,bn->bdn", dt, B)
        y = torch.einsum("bdn,bn->bd", ssm, C) + self.D * x
        return self.leave(y * F.silu(z)), (window, ssm)


class RWKV4(nn.Module):
    """B. Peng et al., "RWKV", EMNLP (2023): sums of exponentials that do not overflow."""

    def __init__(self, H: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.rand(3, H))
        self.k, self.v, self.r, self.o = (nn.Linear(H, H, bias=False) for _ in range(4))
        self.w, self.u = nn.Parameter(torch.randn(H)), nn.Parameter(torch.randn(H))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tree:
        zeros = torch.zeros(batch_size, len(self.w), device=device, dtype=dtype)
        return zeros, zeros.clone(), zeros.clone(), torch.full_like(zeros, -1e30)

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        before, a, b, p = state
        k, v, r = (m(x * mix + before * (1 - mix)) for m, mix in zip((self.k, self.v, self.r), self.mix, strict=True))
        w = self.u + k
        q = torch.maximum(p, w)
        old, new = torch.exp(p - q), torch.exp(w - q)
        wkv = (old * a + new * v) / (old * b + new)
        w = p - torch.exp(self.w)
        q = torch.maximum(w, k)
        old, new = torch.exp(w - q), torch.exp(k - q)
        return self.o(torch.sigmoid(r) * wkv), (x, old * a + new * v, old * b + new, q)


class RWKV6(FromZeros):
    """B. Peng et al., "Eagle and Finch" (2024): a matrix as state, decays that depend on the input."""

    def __init__(self, H: int, heads: int = 2) -> None:
        super().__init__((H,), (heads, H // heads, H // heads))
        self.heads = heads
        self.r, self.k, self.v, self.g, self.o = (nn.Linear(H, H, bias=False) for _ in range(5))
        self.w1, self.w2 = nn.Linear(H, 4, bias=False), nn.Linear(4, H)
        self.u, self.mix = nn.Parameter(torch.randn(heads, H // heads)), nn.Parameter(torch.rand(5, H))
        self.norm = nn.GroupNorm(heads, H)

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        before, S = state
        b, n, d = len(x), self.heads, x.shape[1] // self.heads
        xr, xk, xv, xw, xg = (x + (before - x) * self.mix[i] for i in range(5))
        r, k, v = self.r(xr).view(b, n, 1, d), self.k(xk).view(b, n, d, 1), self.v(xv).view(b, n, 1, d)
        w = torch.exp(-torch.exp(self.w2(torch.tanh(self.w1(xw))))).view(b, n, d, 1)
        kv = k @ v
        y = r @ (self.u.unsqueeze(-1) * kv + S)
        return self.o(self.norm(y.reshape(b, -1)) * F.silu(self.g(xg))), (x, kv + w * S)


class GatedDeltaNet(FromZeros):
    """S. Yang et al., "Gated delta networks", ICLR (2025): a fast weight matrix that is corrected, not added to."""

    def __init__(self, I: int, H: int, heads: int = 2) -> None:
        d = H // heads
        super().__init__((heads, d, d))
        self.heads, self.qkv, self.gates, self.out = (
            heads,
            nn.Linear(I, 3 * H),
            nn.Linear(I, 2 * heads),
            nn.Linear(H, H),
        )

    def forward(self, x: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        alpha, beta = torch.sigmoid(self.gates(x)).unsqueeze(-1).chunk(2, 1)
        S = alpha.unsqueeze(-1) * S
        error = beta * (v - torch.einsum("bhij,bhj->bhi", S, k))
        S = S + torch.einsum("bhi,bhj->bhij", error, k)
        return self.out(torch.einsum("bhij,bhj->bhi", S, q).flatten(1)), S


class LinearAttention(FromZeros):
    """A. Katharopoulos et al., "Transformers are RNNs", ICML (2020)."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H, H), (H,))
        self.q, self.k, self.v = (nn.Linear(I, H) for _ in range(3))

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        S, z = state
        q, k = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1
        S, z = S + k.unsqueeze(2) * self.v(x).unsqueeze(1), z + k
        y = torch.bmm(q.unsqueeze(1), S).squeeze(1) / (q * z).sum(1, keepdim=True).clamp_min(1e-6)
        return y, (S, z)


class CoupledOscillators(FromZeros):
    """T. Rusch and S. Mishra, "coRNN", ICLR (2021)."""

    def __init__(self, I: int, H: int, dt: float = 0.1) -> None:
        super().__init__((H,), (H,))
        self.dt, self.inner = dt, nn.Linear(I + 2 * H, H)

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        y, z = state
        z = z + self.dt * (torch.tanh(self.inner(torch.cat([x, z, y], 1))) - 2.7 * y - 4.7 * z)
        y = y + self.dt * z
        return y, (y, z)


class LongExpressiveMemory(FromZeros):
    """T. Rusch et al., "Long expressive memory", ICLR (2022)."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,), (H,))
        self.input, self.hidden, self.z = nn.Linear(I, 4 * H), nn.Linear(H, 3 * H), nn.Linear(H, H)

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        y, z = state
        i1, i2, iz, iy = self.input(x).chunk(4, 1)
        h1, h2, hz = self.hidden(y).chunk(3, 1)
        slow, fast = torch.sigmoid(i1 + h1), torch.sigmoid(i2 + h2)
        z = (1 - slow) * z + slow * torch.tanh(iz + hz)
        y = (1 - fast) * y + fast * torch.tanh(self.z(z) + iy)
        return y, (y, z)


class UnitaryRNN(nn.Module):
    """M. Arjovsky et al., "Unitary evolution recurrent neural networks", ICML (2016)."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__()
        self.H = H
        self.phases = nn.Parameter(torch.rand(3, H) * 6 - 3)
        self.mirrors = nn.Parameter(torch.randn(2, H, dtype=torch.cfloat))
        self.input, self.bias = nn.Linear(I, H, dtype=torch.cfloat), nn.Parameter(0.1 * torch.rand(H))
        self.register_buffer("order", torch.randperm(H))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.full((batch_size, self.H), 0.1 + 0.1j, dtype=(dtype or torch.float32).to_complex(), device=device)

    def mirrored(self, h: Tensor, v: Tensor) -> Tensor:
        """A reflection at the plane that a vector is normal to."""
        return h - 2 * (h * v.conj()).sum(1, keepdim=True) * v / (v.abs() ** 2).sum()

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        turns = torch.polar(torch.ones_like(self.phases), self.phases)
        h = self.mirrored(torch.fft.fft(h * turns[0], norm="ortho"), self.mirrors[0])
        h = torch.fft.ifft(h[:, self.order] * turns[1], norm="ortho")
        h = self.mirrored(h, self.mirrors[1]) * turns[2] + self.input(x.to(h.dtype))
        size = h.abs()
        h = h * (torch.relu(size + self.bias) / (size + 1e-5))
        return h.real, h


class Holographic(FromZeros):
    """A circular convolution of the state by FFT: T. Plate, "Holographic reduced representations" (1995)."""

    def __init__(self, H: int) -> None:
        super().__init__((H,))
        self.key = nn.Parameter(0.1 * torch.randn(H))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        bound = torch.fft.irfft(torch.fft.rfft(h) * torch.fft.rfft(self.key), n=h.shape[-1])
        h = torch.tanh(bound + x)
        return h, h


CELLS = {
    "Legendre memory unit": Example(lambda n: LMU(n.I, n.H)),
    "LRU, complex": Example(lambda n: LRU(n.I, n.H)),
    "S4D, view_as_complex": Example(lambda n: S4D(n.H), lambda n: n.normal(n.H)),
    "Mamba": Example(lambda n: Mamba(n.H), lambda n: n.normal(n.H)),
    "RWKV-4": Example(lambda n: RWKV4(n.H), lambda n: n.normal(n.H)),
    "RWKV-6": Example(lambda n: RWKV6(n.H), lambda n: n.normal(n.H)),
    "gated DeltaNet": Example(lambda n: GatedDeltaNet(n.I, n.H)),
    "linear attention": Example(lambda n: LinearAttention(n.I, n.H)),
    "coRNN": Example(lambda n: CoupledOscillators(n.I, n.H)),
    "long expressive memory": Example(lambda n: LongExpressiveMemory(n.I, n.H)),
    "unitary RNN": Example(lambda n: UnitaryRNN(n.I, n.H)),
    "holographic RNN, by FFT": Example(lambda n: Holographic(n.H), lambda n: n.normal(n.H)),
}
