"""Cells over images, graphs and physical systems: convolutions, messages, filters, energies."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.published.example import Example, FromZeros, Sizes, Tree

SIDE = 8


class ConvLSTM(FromZeros):
    """X. Shi et al., "Convolutional LSTM network", NeurIPS (2015)."""

    def __init__(self, C: int) -> None:
        super().__init__((C, SIDE, SIDE), (C, SIDE, SIDE))
        self.conv = nn.Conv2d(3 + C, 4 * C, 3, padding=1)

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        h, c = state
        i, f, o, g = torch.split(self.conv(torch.cat([x, h], 1)), h.shape[1], dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, (h, c)


class ConvGRU(FromZeros):
    """N. Ballas et al., "Delving deeper into convolutional networks for learning video representations" (2016)."""

    def __init__(self, C: int) -> None:
        super().__init__((C, SIDE, SIDE))
        self.gates, self.new = nn.Conv2d(3 + C, 2 * C, 3, padding=1), nn.Conv2d(3 + C, C, 3, padding=1)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        z, r = torch.sigmoid(self.gates(torch.cat([x, h], 1))).chunk(2, 1)
        h = (1 - z) * h + z * torch.tanh(self.new(torch.cat([x, r * h], 1)))
        return h, h


class SeesFrames(FromZeros):
    """A convolutional encoder of each frame, then a GRU that episodes reset: the agent of M. Hausknecht (2015)."""

    def __init__(self, H: int) -> None:
        super().__init__((H,))
        self.eye = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(), nn.Flatten())
        self.cell, self.policy = nn.GRUCell(32, H), nn.Linear(H, 4)

    def forward(self, input: Tree, h: Tensor) -> tuple[Tensor, Tensor]:
        frame, done = input
        h = h.clone()
        h[done] = 0
        h = self.cell(self.eye(frame), h)
        return self.policy(h), h


class WindowedConv(FromZeros):
    """A causal depthwise convolution that keeps its window, as before a linear attention."""

    def __init__(self, H: int) -> None:
        super().__init__((H, 4))
        self.conv, self.out = nn.Conv1d(H, H, 4, groups=H), nn.Linear(H, H)

    def forward(self, x: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        window = torch.cat([window[:, :, 1:], x.unsqueeze(-1)], -1)
        return self.out(F.silu(self.conv(window).squeeze(-1))), window


class Pyramid(FromZeros):
    """Down by a maximum, up by repetition, and a skip."""

    def __init__(self) -> None:
        super().__init__((4, SIDE, SIDE))
        self.mix = nn.Linear(SIDE * SIDE, SIDE * SIDE)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        coarse = F.interpolate(F.max_pool2d(h, 2), scale_factor=2, mode="nearest")
        h = torch.tanh(x + 0.5 * coarse + self.mix(h.flatten(2)).view_as(h))
        return h, h


class GraphGRU(FromZeros):
    """Gates by messages along edges: Y. Li et al., "Diffusion convolutional RNN", ICLR (2018)."""

    def __init__(self, nodes: int = 6, C: int = 4, sparse: bool = False) -> None:
        super().__init__((nodes, C))
        near = (torch.rand(nodes, nodes) < 0.4).float() + torch.eye(nodes)
        self.register_buffer("near", near / near.sum(1, keepdim=True))
        target, source = near.nonzero().t()
        self.register_buffer("source", source.clone())
        self.register_buffer("target", target.clone())
        self.sparse, self.gates, self.new = sparse, nn.Linear(2 * (2 + C), 2 * C), nn.Linear(2 * (2 + C), C)

    def with_neighbours(self, x: Tensor) -> Tensor:
        """The features of each node, beside the mean of those it hears."""
        if not self.sparse:
            return torch.cat([x, torch.einsum("ij,bjf->bif", self.near, x)], -1)
        messages = x[:, self.source] * self.near[self.target, self.source][:, None]
        return torch.cat([x, torch.zeros_like(x).index_add(1, self.target, messages)], -1)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        z, r = torch.sigmoid(self.gates(self.with_neighbours(torch.cat([x, h], -1)))).chunk(2, -1)
        h = z * h + (1 - z) * torch.tanh(self.new(self.with_neighbours(torch.cat([x, r * h], -1))))
        return h, h


class Hamiltonian(FromZeros):
    """The gradient of a learned energy moves the state: S. Greydanus et al., NeurIPS (2019)."""

    def __init__(self, D: int = 4) -> None:
        super().__init__((D,), (D,))
        self.energy = nn.Sequential(nn.Linear(2 * D, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, push: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        q, p = state
        z = torch.cat([q, p], -1)
        with torch.enable_grad():
            z = z if z.requires_grad else z.requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(z).sum(), z, create_graph=True)
        by_q, by_p = slope.chunk(2, -1)
        q, p = q + 0.1 * by_p, p - 0.1 * by_q + 0.1 * push
        return q, (q, p)


class ODERNN(FromZeros):
    """Y. Rubanova et al., "Latent ODEs", NeurIPS (2019): Runge-Kutta between the observations."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,))
        self.flow, self.cell = nn.Sequential(nn.Linear(H, H), nn.Tanh(), nn.Linear(H, H)), nn.GRUCell(I, H)

    def forward(self, input: Tree, h: Tensor) -> tuple[Tensor, Tensor]:
        x, dt = input
        k1 = self.flow(h)
        k2 = self.flow(h + dt / 2 * k1)
        k3 = self.flow(h + dt / 2 * k2)
        k4 = self.flow(h + dt * k3)
        h = self.cell(x, h + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
        return h, h


class Kalman(nn.Module):
    """A Kalman filter with learned noise: the gain solves a small linear system at every step."""

    def __init__(self, states: int = 3, seen: int = 2) -> None:
        super().__init__()
        self.states = states
        self.F = nn.Parameter(torch.eye(states) + 0.1 * torch.randn(states, states))
        self.H = nn.Parameter(torch.randn(seen, states))
        self.q, self.r = nn.Parameter(torch.zeros(states)), nn.Parameter(torch.zeros(seen))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tree:
        P = torch.eye(self.states, device=device, dtype=dtype).expand(batch_size, -1, -1).clone()
        return torch.zeros(batch_size, self.states, device=device, dtype=dtype), P

    def forward(self, z: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        x, P = state
        x, P = x @ self.F.T, self.F @ P @ self.F.T + torch.diag(self.q.exp())
        S = self.H @ P @ self.H.T + torch.diag(self.r.exp())
        gain = torch.linalg.solve(S, self.H @ P).transpose(1, 2)
        x = x + (gain @ (z - x @ self.H.T).unsqueeze(-1)).squeeze(-1)
        return x, (x, P - gain @ self.H @ P)


def _frames(n: Sizes) -> Tree:
    return n.normal(3, SIDE, SIDE), n.flags(0.1)


CELLS = {
    "ConvLSTM": Example(lambda n: ConvLSTM(n.H // 3), lambda n: n.normal(3, SIDE, SIDE)),
    "ConvGRU": Example(lambda n: ConvGRU(n.H // 3), lambda n: n.normal(3, SIDE, SIDE)),
    "frames and resets": Example(lambda n: SeesFrames(n.H), _frames),
    "depthwise convolution": Example(lambda n: WindowedConv(n.H), lambda n: n.normal(n.H)),
    "max-pool and upsample": Example(lambda n: Pyramid(), lambda n: n.normal(4, SIDE, SIDE)),
    "graph GRU, dense": Example(lambda n: GraphGRU(), lambda n: n.normal(6, 2)),
    "graph GRU, sparse": Example(lambda n: GraphGRU(sparse=True), lambda n: n.normal(6, 2)),
    "Hamiltonian": Example(lambda n: Hamiltonian(), lambda n: n.normal(4)),
    "ODE-RNN": Example(lambda n: ODERNN(n.I, n.H), lambda n: (n.normal(), n.uniform(1))),
    "Kalman filter": Example(lambda n: Kalman(), lambda n: n.normal(2)),
}
