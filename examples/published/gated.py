"""Gated cells and their relatives: what one would take in place of an LSTM."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.published.example import Example, FromZeros, Sizes, Tree


class PeepholeLSTM(FromZeros):
    """F. Gers and J. Schmidhuber, "Recurrent nets that time and count", IJCNN (2000)."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,), (H,))
        self.input, self.hidden = nn.Linear(I, 4 * H), nn.Linear(H, 4 * H, bias=False)
        self.peep = nn.Parameter(0.1 * torch.randn(3, H))

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        h, c = state
        i, f, g, o = (self.input(x) + self.hidden(h)).chunk(4, 1)
        i, f = torch.sigmoid(i + self.peep[0] * c), torch.sigmoid(f + self.peep[1] * c)
        c = f * c + i * torch.tanh(g)
        h = torch.sigmoid(o + self.peep[2] * c) * torch.tanh(c)
        return h, (h, c)


class GRUD(FromZeros):
    """Missing values decay: Z. Che et al., "Recurrent neural networks for time series with missing values" (2018)."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,), (I,))
        self.decay, self.offset = nn.Parameter(0.1 * torch.rand(I)), nn.Parameter(torch.zeros(I))
        self.fade = nn.Linear(I, H)
        self.gates, self.candidate = nn.Linear(2 * I + H, 2 * H), nn.Linear(2 * I + H, H)
        self.register_buffer("mean", 0.1 * torch.randn(I))

    def forward(self, input: Tree, state: Tree) -> tuple[Tensor, Tree]:
        (x, mask, since), (h, last) = input, state
        decay = torch.exp(-torch.relu(self.decay * since + self.offset))
        h = torch.exp(-torch.relu(self.fade(since))) * h
        x_hat = mask * x + (1 - mask) * (decay * last + (1 - decay) * self.mean)
        z, r = torch.sigmoid(self.gates(torch.cat([x_hat, h, mask], -1))).chunk(2, -1)
        n = torch.tanh(self.candidate(torch.cat([x_hat, r * h, mask], -1)))
        h = (1 - z) * h + z * n
        return h, (h, torch.where(mask > 0, x, last))


def _missing(n: Sizes) -> Tree:
    return n.normal(), (n.uniform(n.I) > 0.4).float(), 3 * n.uniform(n.I)


class PhasedLSTM(FromZeros):
    """D. Neil et al., "Phased LSTM", NeurIPS (2016)."""

    def __init__(self, I: int, H: int, leak: float = 1e-3) -> None:
        super().__init__((H,), (H,))
        self.cell, self.leak = nn.LSTMCell(I, H), leak
        self.tau, self.shift = nn.Parameter(torch.exp(3 * torch.rand(H))), nn.Parameter(5 * torch.rand(H))
        self.ratio = nn.Parameter(torch.full((H,), 0.1))

    def forward(self, input: Tree, state: Tree) -> tuple[Tensor, Tree]:
        (x, time), (h0, c0) = input, state
        h, c = self.cell(x, state)
        phase = torch.remainder(time - self.shift, self.tau) / self.tau
        half = self.ratio / 2
        falling = torch.where(phase < self.ratio, 2 - 2 * phase / self.ratio, self.leak * phase)
        k = torch.where(phase < half, 2 * phase / self.ratio, falling)
        h, c = k * h + (1 - k) * h0, k * c + (1 - k) * c0
        return h, (h, c)


class Clockwork(nn.Module):
    """J. Koutnik et al., "A clockwork RNN", ICML (2014); the clock is an integer, of each row or of all."""

    def __init__(self, I: int, H: int, groups: int = 4, rows: bool = True) -> None:
        super().__init__()
        self.input, self.hidden, self.rows = nn.Linear(I, H), nn.Linear(H, H, bias=False), rows
        each = H // groups
        self.register_buffer("period", (2 ** torch.arange(groups)).repeat_interleave(each))
        blocks = torch.ones(groups, groups).triu()
        self.register_buffer("mask", blocks.repeat_interleave(each, 0).repeat_interleave(each, 1))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tree:
        clock = torch.zeros((batch_size, 1) if self.rows else (), dtype=torch.long, device=device)
        return torch.zeros(batch_size, len(self.period), device=device, dtype=dtype), clock

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        h, clock = state
        new = torch.tanh(self.input(x) + F.linear(h, self.hidden.weight * self.mask))
        h = torch.where(clock % self.period == 0, new, h)
        return h, (h, clock + 1)


class HyperLSTM(FromZeros):
    """D. Ha, A. Dai and Q. Le, "HyperNetworks", ICLR (2017)."""

    def __init__(self, I: int, H: int, small: int = 8, features: int = 4) -> None:
        super().__init__((H,), (H,), (small,), (small,))
        self.hyper = nn.LSTMCell(I + H, small)
        self.features = nn.ModuleList(nn.Linear(small, 4 * features, bias=bias) for bias in (True, True, False))
        self.scales = nn.ModuleList(nn.Linear(features, H, bias=n % 3 == 2) for n in range(12))
        self.by_h = nn.ParameterList(nn.Parameter(torch.randn(H, H) / 7) for _ in range(4))
        self.by_x = nn.ParameterList(nn.Parameter(torch.randn(H, I) / 7) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(H) for _ in range(5))

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        h, c, small_h, small_c = state
        small_h, small_c = self.hyper(torch.cat([x, h], -1), (small_h, small_c))
        zh, zx, zb = (features(small_h).chunk(4, -1) for features in self.features)
        gates = []
        for k in range(4):
            dh, dx, db = (self.scales[3 * k + n](z[k]) for n, z in enumerate((zh, zx, zb)))
            y = dh * torch.einsum("ij,bj->bi", self.by_h[k], h) + dx * torch.einsum("ij,bj->bi", self.by_x[k], x) + db
            gates.append(self.norms[k](y))
        i, f, g, o = gates
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(self.norms[4](c))
        return h, (h, c, small_h, small_c)


class MultiplicativeLSTM(FromZeros):
    """B. Krause et al., "Multiplicative LSTM for sequence modelling" (2016)."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,), (H,))
        self.wx, self.wh = nn.Linear(I, 4 * H), nn.Linear(H, 4 * H)
        self.mx, self.mh = nn.Linear(I, H, bias=False), nn.Linear(H, H, bias=False)

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        h, c = state
        i, f, o, u = torch.chunk(self.wx(x) + self.wh(self.mx(x) * self.mh(h)), 4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(u)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, (h, c)


class SRU(FromZeros):
    """T. Lei et al., "Simple recurrent units for highly parallelizable recurrence", EMNLP (2018)."""

    def __init__(self, H: int) -> None:
        super().__init__((H,))
        self.weight = nn.Linear(H, 3 * H, bias=False)
        self.v, self.bias = nn.Parameter(0.1 * torch.randn(2, H)), nn.Parameter(torch.zeros(2, H))

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        u, f, r = self.weight(x).chunk(3, -1)
        f = torch.sigmoid(f + self.v[0] * c + self.bias[0])
        r = torch.sigmoid(r + self.v[1] * c + self.bias[1])
        c = f * c + (1 - f) * u
        return r * c + (1 - r) * x * math.sqrt(3), c


class QRNN(FromZeros):
    """J. Bradbury et al., "Quasi-recurrent neural networks", ICLR (2017): a window of two inputs."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,), (I,))
        self.window = nn.Linear(2 * I, 3 * H)

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        c, before = state
        z, f, o = self.window(torch.cat([before, x], -1)).chunk(3, -1)
        c = torch.sigmoid(f) * c + (1 - torch.sigmoid(f)) * torch.tanh(z)
        return torch.sigmoid(o) * c, (c, x)


class IndRNN(FromZeros):
    """S. Li et al., "Independently recurrent neural network", CVPR (2018)."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,))
        self.input, self.u = nn.Linear(I, H), nn.Parameter(torch.rand(H))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.input(x) + self.u * h)
        return h, h


class FastGRNN(FromZeros):
    """A. Kusupati et al., "FastGRNN", NeurIPS (2018): low-rank matrices, one for gate and candidate."""

    def __init__(self, I: int, H: int, rank: int = 4) -> None:
        super().__init__((H,))
        shapes = (I, rank), (rank, H), (H, rank), (rank, H)
        self.low = nn.ParameterList(nn.Parameter(0.2 * torch.randn(shape)) for shape in shapes)
        self.bias = nn.Parameter(torch.ones(2, H))
        self.zeta, self.nu = nn.Parameter(torch.ones(1, 1)), nn.Parameter(-4 * torch.ones(1, 1))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        w1, w2, u1, u2 = self.low
        p = torch.matmul(torch.matmul(x, w1), w2) + torch.matmul(torch.matmul(h, u1), u2)
        z = torch.sigmoid(p + self.bias[0])
        h = z * h + (torch.sigmoid(self.zeta) * (1 - z) + torch.sigmoid(self.nu)) * torch.tanh(p + self.bias[1])
        return h, h


class MinLSTM(FromZeros):
    """L. Feng et al., "Were RNNs all we needed?" (2024)."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,))
        self.f, self.i, self.h = (nn.Linear(I, H) for _ in range(3))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        difference = F.softplus(-self.f(x)) - F.softplus(-self.i(x))
        v = self.h(x)
        v = torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
        h = torch.sigmoid(-difference) * h + torch.sigmoid(difference) * v
        return h, h


class RecurrentHighway(FromZeros):
    """J. Zilly et al., "Recurrent highway networks", ICML (2017): three layers a step."""

    def __init__(self, I: int, H: int, depth: int = 3) -> None:
        super().__init__((H,))
        self.input = nn.Linear(I, 2 * H, bias=False)
        self.layers = nn.ModuleList(nn.Linear(H, 2 * H) for _ in range(depth))

    def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        for number, layer in enumerate(self.layers):
            h, t = (layer(s) + (self.input(x) if number == 0 else 0)).chunk(2, -1)
            gate = torch.sigmoid(t - 1)
            s = torch.tanh(h) * gate + s * (1 - gate)
        return s, s


class OrderedNeurons(FromZeros):
    """Y. Shen et al., "Ordered neurons", ICLR (2019): gates by a running sum of a softmax."""

    def __init__(self, I: int, H: int, chunks: int = 4) -> None:
        super().__init__((H,), (H,))
        self.chunks = chunks
        self.cell = nn.Linear(I + H, 4 * H)
        self.master = nn.Linear(I + H, 2 * chunks)

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        h, c = state
        xh = torch.cat([x, h], -1)
        first, second = self.master(xh).chunk(2, -1)
        forget = torch.cumsum(F.softmax(first, -1), -1).unsqueeze(-1)
        write = (1 - torch.cumsum(F.softmax(second, -1), -1)).unsqueeze(-1)
        i, f, g, o = (y.view(-1, self.chunks, y.shape[-1] // self.chunks) for y in self.cell(xh).chunk(4, -1))
        both = forget * write
        f, i = torch.sigmoid(f) * both + (forget - both), torch.sigmoid(i) * both + (write - both)
        c = f * c.view_as(f) + i * torch.tanh(g)
        h = (torch.sigmoid(o) * torch.tanh(c)).flatten(1)
        return h, (h, c.flatten(1))


class TimeAwareLSTM(FromZeros):
    """I. Baytas et al., "Patient subtyping via time-aware LSTM networks", KDD (2017)."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,), (H,))
        self.cell, self.short = nn.LSTMCell(I, H), nn.Linear(H, H)

    def forward(self, input: Tree, state: Tree) -> tuple[Tensor, Tree]:
        (x, since), (h, c) = input, state
        short = torch.tanh(self.short(c))
        h, c = self.cell(x, (h, c - short + short / torch.log(math.e + since)))
        return h, (h, c)


class NestedLSTM(FromZeros):
    """J. Moniz and D. Krueger, "Nested LSTMs" (2018): the memory is another LSTM."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,), (H,), (H,))
        self.gates, self.inner = nn.Linear(I + H, 4 * H), nn.LSTMCell(H, H)

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        h, c, inner = state
        i, f, g, o = self.gates(torch.cat([x, h], 1)).chunk(4, 1)
        c, inner = self.inner(torch.sigmoid(i) * torch.tanh(g), (torch.sigmoid(f) * c, inner))
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, (h, c, inner)


class BistableCell(FromZeros):
    """N. Vecoven et al., "A bio-inspired bistable recurrent cell" (2021)."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,))
        self.input, self.hidden = nn.Linear(I, 3 * H), nn.Linear(H, 2 * H)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        ux, ax, cx = torch.tensor_split(self.input(x), 3, dim=1)
        ah, ch = torch.tensor_split(self.hidden(h), 2, dim=1)
        a, c = 1 + torch.tanh(ax + ah), torch.sigmoid(cx + ch)
        h = c * h + (1 - c) * torch.tanh(ux + a * h)
        return h, h


class WeightNormLSTM(FromZeros):
    """An LSTM whose weights are normalised by torch's hook: T. Salimans and D. Kingma, NeurIPS (2016)."""

    def __init__(self, I: int, H: int) -> None:
        super().__init__((H,), (H,))
        self.gates = nn.utils.parametrizations.weight_norm(nn.Linear(I + H, 4 * H))

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        h, c = state
        i, f, g, o = self.gates(torch.cat([x, h], 1)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, (h, c)


class EmbeddingLM(FromZeros):
    """A language model's step: embedding, LSTM, logarithms of probabilities."""

    def __init__(self, H: int, words: int = 50) -> None:
        super().__init__((H,), (H,))
        self.embedding, self.cell, self.head = nn.Embedding(words, H), nn.LSTMCell(H, H), nn.Linear(H, words)

    def forward(self, word: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        state = self.cell(self.embedding(word), state)
        return F.log_softmax(self.head(state[0]), -1), state


CELLS = {
    "peephole LSTM": Example(lambda n: PeepholeLSTM(n.I, n.H)),
    "GRU-D": Example(lambda n: GRUD(n.I, n.H), _missing),
    "phased LSTM": Example(
        lambda n: PhasedLSTM(n.I, n.H), lambda n: (n.normal(), torch.cumsum(torch.rand(n.T, n.B, 1), 0))
    ),
    "clockwork RNN": Example(lambda n: Clockwork(n.I, n.H)),
    "clockwork RNN, one clock": Example(lambda n: Clockwork(n.I, n.H, rows=False), rows=False),
    "HyperLSTM": Example(lambda n: HyperLSTM(n.I, n.H)),
    "multiplicative LSTM": Example(lambda n: MultiplicativeLSTM(n.I, n.H)),
    "SRU": Example(lambda n: SRU(n.H), lambda n: n.normal(n.H)),
    "QRNN": Example(lambda n: QRNN(n.I, n.H)),
    "IndRNN": Example(lambda n: IndRNN(n.I, n.H)),
    "FastGRNN": Example(lambda n: FastGRNN(n.I, n.H)),
    "minLSTM": Example(lambda n: MinLSTM(n.I, n.H)),
    "recurrent highway": Example(lambda n: RecurrentHighway(n.I, n.H)),
    "ON-LSTM": Example(lambda n: OrderedNeurons(n.I, n.H)),
    "time-aware LSTM": Example(lambda n: TimeAwareLSTM(n.I, n.H), lambda n: (n.normal(), 3 * n.uniform(1))),
    "nested LSTM": Example(lambda n: NestedLSTM(n.I, n.H)),
    "bistable cell": Example(lambda n: BistableCell(n.I, n.H)),
    "weight-normalised LSTM": Example(lambda n: WeightNormLSTM(n.I, n.H)),
    "embedding language model": Example(lambda n: EmbeddingLM(n.H), lambda n: n.tokens(50)),
}
