"""Neurons and circuits: spikes with surrogate gradients, rates, synapses, membranes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.published.example import Example, FromZeros, Tree


class Spike(torch.autograd.Function):
    """A threshold with a smooth derivative: F. Zenke and S. Ganguli, "SuperSpike" (2018)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return grad / (1 + 10 * v.abs()) ** 2


class Spiking(FromZeros):
    """Leaky integrate-and-fire, recurrent: E. Neftci et al., "Surrogate gradient learning" (2019)."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,), (H,), (H,))
        self.input, self.hidden = nn.Linear(I, H), nn.Linear(H, H, bias=False)
        self.alpha, self.beta = nn.Parameter(torch.full((H,), 0.8)), nn.Parameter(torch.full((H,), 0.9))

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        current, v, spikes = state
        current = self.alpha * current + self.input(x) + self.hidden(spikes)
        v = (self.beta * v + current) * (1 - spikes.detach())
        spikes = Spike.apply(v - 1)
        return spikes, (current, v, spikes)


class Adaptive(FromZeros):
    """Thresholds that adapt: G. Bellec et al., "Long short-term memory in networks of spiking neurons" (2018)."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,), (H,), (H,))
        self.input, self.hidden = nn.Linear(I, H), nn.Linear(H, H, bias=False)
        self.register_buffer("rho", torch.full((H,), 0.95))

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        v, threshold, spikes = state
        v = 0.9 * v + self.input(x) + self.hidden(spikes) - spikes * (0.5 + threshold)
        threshold = self.rho * threshold + (1 - self.rho) * spikes
        spikes = Spike.apply((v - 0.5 - threshold) / 0.5)
        return spikes, (v, threshold, spikes)


class Izhikevich(FromZeros):
    """E. Izhikevich, "Simple model of spiking neurons" (2003), in two half steps."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,), (H,))
        self.input = nn.Linear(I, H)

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        v, u = state
        current = 10 * torch.sigmoid(self.input(x))
        for _ in range(2):
            v = v + 0.5 * (0.04 * v * v - 1.2 * v + current - u) * 0.1
        fired = Spike.apply((v - 30) / 30)
        v, u = torch.where(v > 30, torch.full_like(v, -5.0), v), u + 0.02 * (0.2 * v - u) + fired * 8
        return fired, (v, u)


class HodgkinHuxley(FromZeros):
    """A. Hodgkin and A. Huxley (1952): a membrane and three gates, exponentials of rates."""

    def __init__(self, I: int, H: int, dt: float = 0.02) -> None:
        super().__init__((H,), (H, 3))
        self.dt, self.input = dt, nn.Linear(I, H)
        self.conductance = nn.Parameter(torch.tensor([120.0, 36.0, 0.3]))

    def rates(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """How fast the gates m, h and n open and close."""
        opening = 0.1 * (v - 25) / (1 - torch.exp(-(v - 25) / 10) + 1e-6), 0.07 * torch.exp(-v / 20)
        closing = 4 * torch.exp(-v / 18), torch.reciprocal(1 + torch.exp(-(v - 30) / 10))
        n = 0.01 * (v - 10) / (1 - torch.exp(-(v - 10) / 10) + 1e-6)
        return torch.stack([*opening, n], -1), torch.stack([*closing, 0.125 * torch.exp(-v / 80)], -1)

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        v, gates = state
        opening, closing = self.rates(v)
        gates = (gates + self.dt * (opening * (1 - gates) - closing * gates)).clamp(0, 1)
        m, h, n = gates.unbind(-1)
        sodium, potassium, leak = self.conductance
        flow = sodium * m**3 * h * (v - 115) + potassium * n**4 * (v + 12) + leak * (v - 10.6)
        v = v + self.dt * (self.input(x) - flow)
        return v, (v, gates)


class ExcitesOrInhibits(FromZeros):
    """Dale's law by signs of weights: H. Song et al., "Training excitatory-inhibitory networks" (2016)."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,))
        self.input, self.weight = nn.Linear(I, H), nn.Parameter(torch.rand(H, H) / H)
        self.register_buffer("sign", torch.diag(torch.where(torch.arange(H) < 0.8 * H, 1.0, -1.0)))
        self.register_buffer("others", 1 - torch.eye(H))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        weight = (torch.abs(self.weight) * self.others) @ self.sign
        h = 0.8 * h + 0.2 * (self.input(x) + F.linear(torch.relu(h), weight))
        return torch.relu(h), h


class TiredSynapses(FromZeros):
    """Short-term plasticity: G. Mongillo et al., "Synaptic theory of working memory" (2008)."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,), (H,), (H,))
        self.input, self.hidden = nn.Linear(I, H), nn.Linear(H, H)
        self.register_buffer("U", torch.full((H,), 0.3))

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        h, left, u = state
        left = torch.clamp(left + 0.05 * (1 - left) - 0.1 * u * left * h, 0, 1)
        u = torch.clamp(u + 0.1 * (self.U - u) + 0.1 * self.U * (1 - u) * h, 0, 1)
        h = torch.relu(0.8 * h + 0.2 * (self.input(x) + self.hidden(u * left * h)))
        return h, (h, left, u)


class Hebbian(FromZeros):
    """Weights that learn as they run: T. Miconi et al., "Differentiable plasticity", ICML (2018)."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,), (H, H))
        self.input, self.weight = nn.Linear(I, H), nn.Parameter(0.1 * torch.randn(H, H))
        self.alpha, self.eta = nn.Parameter(0.1 * torch.randn(H, H)), nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        h, trace = state
        new = torch.tanh(self.input(x) + h.unsqueeze(1).bmm(self.weight + self.alpha * trace).squeeze(1))
        trace = (1 - self.eta) * trace + self.eta * torch.bmm(h.unsqueeze(2), new.unsqueeze(1))
        return new, (new, trace)


class EchoState(FromZeros):
    """A reservoir that is not trained, and a read-out that is: H. Jaeger (2001)."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,))
        self.register_buffer("W", torch.randn(H, H) / H**0.5)
        self.register_buffer("V", torch.randn(I, H))
        self.out = nn.Linear(H, 2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            h = 0.7 * h + 0.3 * torch.tanh(x @ self.V + h @ self.W)
        return self.out(h), h


CELLS = {
    "recurrent spiking": Example(lambda n: Spiking(n.I, n.H)),
    "adaptive spiking": Example(lambda n: Adaptive(n.I, n.H)),
    "Izhikevich": Example(lambda n: Izhikevich(n.I, n.H)),
    "Hodgkin-Huxley": Example(lambda n: HodgkinHuxley(n.I, n.H)),
    "excitatory-inhibitory": Example(lambda n: ExcitesOrInhibits(n.I, n.H)),
    "short-term plasticity": Example(lambda n: TiredSynapses(n.I, n.H)),
    "differentiable plasticity": Example(lambda n: Hebbian(n.I, n.H)),
    "echo state": Example(lambda n: EchoState(n.I, n.H)),
}
