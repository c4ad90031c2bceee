"""Cells with chance in them: dropout, zoneout, latent variables, sampled actions, noise."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal, OneHotCategoricalStraightThrough, kl_divergence

from examples.published.example import Example, FromZeros, Sizes, Tree


class TwoLayers(nn.Module):
    """Two LSTM layers in a list, dropout between them: the step of W. Zaremba et al. (2014)."""

    def __init__(self, I: int, H: int, p: float = 0.2) -> None:
        super().__init__()
        self.layers, self.dropout = nn.ModuleList([nn.LSTMCell(I, H), nn.LSTMCell(H, H)]), nn.Dropout(p)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tree:
        zeros = torch.zeros(batch_size, self.layers[0].hidden_size, device=device, dtype=dtype)
        return [(zeros, zeros.clone()), (zeros.clone(), zeros.clone())]

    def forward(self, x: Tensor, states: Tree) -> tuple[Tensor, Tree]:
        new = []
        for layer, state in zip(self.layers, states, strict=True):
            h, c = layer(x, state)
            new.append((h, c))
            x = self.dropout(h)
        return x, new


class Zoneout(FromZeros):
    """D. Krueger et al., "Zoneout", ICLR (2017), by hand."""

    def __init__(self, I: int, H: int, p: float = 0.15) -> None:
        super().__init__((H,))
        self.cell, self.p = nn.GRUCell(I, H), p

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        new = self.cell(x, h)
        if self.training:
            kept = torch.bernoulli(torch.full_like(h, self.p))
            h = kept * h + (1 - kept) * new
        else:
            h = self.p * h + (1 - self.p) * new
        return h, h


class NoisyRates(FromZeros):
    """A rate network with private noise: G. Yang et al., "Task representations in neural networks" (2019)."""

    def __init__(self, I: int, H: int, alpha: float = 0.2, sigma: float = 0.05) -> None:
        super().__init__((H,))
        self.input, self.hidden, self.alpha, self.sigma = nn.Linear(I, H), nn.Linear(H, H), alpha, sigma

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        noise = (2 / self.alpha) ** 0.5 * self.sigma * torch.randn_like(h)
        h = (1 - self.alpha) * h + self.alpha * F.softplus(self.input(x) + self.hidden(h) + noise)
        return h, h


class Gumbel(FromZeros):
    """A discrete latent by E. Jang et al., "Categorical reparameterization with Gumbel-softmax", ICLR (2017)."""

    def __init__(self, I: int, H: int, classes: int = 6) -> None:
        super().__init__((H,), (classes,))
        self.cell, self.logits = nn.GRUCell(I + classes, H), nn.Linear(H, classes)

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        h, z = state
        h = self.cell(torch.cat([x, z], -1), h)
        z = F.gumbel_softmax(self.logits(h), tau=1.0, hard=True)
        return h, (h, z)


class VariationalRNN(FromZeros):
    """J. Chung et al., "A recurrent latent variable model", NeurIPS (2015), by torch's checked distributions."""

    def __init__(self, I: int, H: int, Z: int = 4, given: bool = False) -> None:
        super().__init__((H,))
        self.prior, self.posterior, self.cell = nn.Linear(H, 2 * Z), nn.Linear(H + I, 2 * Z), nn.GRUCell(I + Z, H)
        self.given = given

    def normal(self, numbers: Tensor) -> Normal:
        """Half of the numbers are means, half are widths."""
        mean, width = numbers.chunk(2, -1)
        return Normal(mean, F.softplus(width) + 0.01)

    def forward(self, input: Tree, h: Tensor) -> tuple[Tree, Tensor]:
        x, noise = input if self.given else (input, None)
        prior, posterior = self.normal(self.prior(h)), self.normal(self.posterior(torch.cat([h, x], -1)))
        z = posterior.rsample() if noise is None else posterior.mean + posterior.stddev * noise
        h = self.cell(torch.cat([x, z], -1), h)
        return (z, kl_divergence(posterior, prior).sum(-1)), h


class Dreamer(FromZeros):
    """The discrete world model of D. Hafner et al., "Mastering Atari with discrete world models", ICLR (2021)."""

    def __init__(self, I: int, H: int, groups: int = 3, classes: int = 4, given: bool = False) -> None:
        super().__init__((H,), (groups, classes))
        self.groups, self.classes, self.given = groups, classes, given
        self.cell, self.prior = nn.GRUCell(groups * classes + 2, H), nn.Linear(H, groups * classes)
        self.posterior = nn.Linear(H + I, groups * classes)

    def sampled(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """One class of each group, with the gradient of its probability."""
        if noise is None:
            return OneHotCategoricalStraightThrough(logits=logits).rsample()
        p = 0.99 * torch.softmax(logits, -1) + 0.01 / self.classes
        best = torch.argmax(torch.log(p) - torch.log(-torch.log(noise)), -1)
        return F.one_hot(best, self.classes).to(p.dtype) + p - p.detach()

    def forward(self, input: Tree, state: Tree) -> tuple[Tree, Tree]:
        (x, action, first, *noise), (h, z) = input, state
        going_on = (1 - first.to(h.dtype)).unsqueeze(-1)
        h, z = h * going_on, z * going_on.unsqueeze(-1)
        h = self.cell(torch.cat([z.flatten(1), action], -1), h)
        logits = self.posterior(torch.cat([h, x], -1)).view(-1, self.groups, self.classes)
        z = self.sampled(logits, noise[0] if self.given else None)
        return (h, self.prior(h)), (h, z)


def _episodes(n: Sizes) -> Tree:
    return n.normal(), n.normal(2), n.flags(0.1), n.uniform(3, 4)


class Actor(nn.Module):
    """A policy that reads the action it took: R. Williams' REINFORCE, with the logarithm of its probability."""

    def __init__(self, I: int, H: int, actions: int = 5) -> None:
        super().__init__()
        self.embedding, self.cell, self.policy = nn.Embedding(actions, 4), nn.GRUCell(I + 4, H), nn.Linear(H, actions)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tree:
        zeros = torch.zeros(batch_size, self.cell.hidden_size, device=device, dtype=dtype)
        return zeros, torch.zeros(batch_size, dtype=torch.long, device=device)

    def forward(self, x: Tensor, state: Tree) -> tuple[Tree, Tree]:
        h, action = state
        h = self.cell(torch.cat([x, self.embedding(action)], -1), h)
        policy = Categorical(logits=self.policy(h))
        action = policy.sample()
        return (action, policy.log_prob(action), policy.entropy()), (h, action)


class StochasticBits(FromZeros):
    """Bits drawn by their probabilities, straight-through: Y. Bengio et al., "Estimating gradients" (2013)."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,))
        self.cell = nn.Linear(I + H, H)

    def forward(self, x: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.sigmoid(self.cell(torch.cat([x, bits], -1)))
        bits = Bernoulli(probs=p).sample() + p - p.detach()
        return bits, bits


CELLS = {
    "two layers, dropout": Example(lambda n: TwoLayers(n.I, n.H), draws=True),
    "two layers, no dropout": Example(lambda n: TwoLayers(n.I, n.H, p=0.0)),
    "zoneout by hand": Example(lambda n: Zoneout(n.I, n.H), draws=True),
    "noisy rate network": Example(lambda n: NoisyRates(n.I, n.H), draws=True),
    "Gumbel-softmax": Example(lambda n: Gumbel(n.I, n.H), draws=True),
    "variational RNN": Example(lambda n: VariationalRNN(n.I, n.H), draws=True),
    "variational RNN, noise given": Example(
        lambda n: VariationalRNN(n.I, n.H, given=True), lambda n: (n.normal(), n.normal(4))
    ),
    "Dreamer": Example(lambda n: Dreamer(n.I, n.H), _episodes, draws=True),
    "Dreamer, noise given": Example(lambda n: Dreamer(n.I, n.H, given=True), _episodes),
    "actor that samples": Example(lambda n: Actor(n.I, n.H), draws=True),
    "stochastic bits": Example(lambda n: StochasticBits(n.I, n.H), draws=True),
}
