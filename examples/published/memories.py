"""Cells that read and write a memory: by content, by place, by attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.published.example import Example, FromZeros, Tree


class TuringMachine(nn.Module):
    """A. Graves et al., "Neural Turing machines" (2014): content by cosine, then shift and sharpen."""

    def __init__(self, I: int, H: int, N: int = 8, M: int = 6) -> None:
        super().__init__()
        self.H, self.N, self.M = H, N, M
        self.cell, self.out = nn.LSTMCell(I + M, H), nn.Linear(H + M, H)
        self.heads = nn.ModuleList(nn.Linear(H, M + 6) for _ in range(2))
        self.edit = nn.Linear(H, 2 * M)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tree:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch_size, *shape, device=device, dtype=dtype)

        at = zeros(self.N)
        at[:, 0] = 1
        return zeros(self.H), zeros(self.H), zeros(self.N, self.M) + 0.1, at, at.clone(), zeros(self.M)

    def address(self, head: nn.Linear, h: Tensor, memory: Tensor, at: Tensor) -> Tensor:
        """Where a head looks."""
        key, strength, gate, shift, sharp = torch.split(head(h), [self.M, 1, 1, 3, 1], 1)
        alike = F.cosine_similarity(memory, torch.tanh(key).unsqueeze(1), dim=-1)
        at = torch.lerp(at, F.softmax(F.softplus(strength) * alike, 1), torch.sigmoid(gate))
        shift = F.softmax(shift, 1)
        at = shift[:, 0:1] * torch.roll(at, 1, 1) + shift[:, 1:2] * at + shift[:, 2:3] * torch.roll(at, -1, 1)
        at = (at + 1e-8) ** (1 + F.softplus(sharp))
        return at / at.sum(1, keepdim=True)

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        h, c, memory, write, read, found = state
        h, c = self.cell(torch.cat([x, found], 1), (h, c))
        write = self.address(self.heads[0], h, memory, write)
        erase, add = self.edit(h).chunk(2, 1)
        memory = memory * (1 - write.unsqueeze(2) * torch.sigmoid(erase).unsqueeze(1))
        memory = memory + write.unsqueeze(2) * torch.tanh(add).unsqueeze(1)
        read = self.address(self.heads[1], h, memory, read)
        found = torch.bmm(read.unsqueeze(1), memory).squeeze(1)
        return self.out(torch.cat([h, found], 1)), (h, c, memory, write, read, found)


class Allocation(FromZeros):
    """The free list of A. Graves et al., "Hybrid computing using a neural network with external memory" (2016)."""

    def __init__(self, I: int, H: int, N: int = 6, M: int = 4) -> None:
        super().__init__((H,), (N,), (N, M))
        self.N, self.M = N, M
        self.cell, self.interface, self.out = nn.GRUCell(I + M, H), nn.Linear(H, N + M + 1), nn.Linear(M, H)
        self.register_buffer("first_free", 1e-3 * torch.arange(N))  # no two places are used alike, not at the start

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        h, usage, memory = state
        h = self.cell(torch.cat([x, memory.mean(1)], 1), h)
        look, value, gate = torch.split(self.interface(h), [self.N, self.M, 1], 1)
        ordered, order = torch.sort(usage + self.first_free, dim=1)
        before = torch.cumprod(torch.cat([torch.ones_like(ordered[:, :1]), ordered[:, :-1]], 1), 1)
        free = torch.zeros_like(usage).scatter(1, order, (1 - ordered) * before)
        write = torch.sigmoid(gate) * free
        usage = usage + write - usage * write
        memory = memory + write.unsqueeze(2) * torch.tanh(value).unsqueeze(1)
        read = torch.softmax(look, 1)
        return self.out((read.unsqueeze(2) * memory).sum(1)), (h, usage, memory)


class AttendsToItsPast(FromZeros):
    """The last steps as a window, looked at by torch's attention: after Z. Dai et al., "Transformer-XL", ACL (2019)."""

    def __init__(self, I: int, H: int, window: int = 5, heads: int = 2) -> None:
        super().__init__((window, H))
        self.heads, self.enter, self.q, self.kv = heads, nn.Linear(I, H), nn.Linear(H, H), nn.Linear(H, 2 * H)
        self.norm = nn.LayerNorm(H)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        x = self.enter(x)
        past = torch.cat([past[:, 1:], x.unsqueeze(1)], 1)
        b, s, n = *past.shape[:2], self.heads
        q = self.q(x).view(b, n, 1, -1)
        k, v = (y.view(b, s, n, -1).transpose(1, 2) for y in self.kv(past).chunk(2, -1))
        found = F.scaled_dot_product_attention(q, k, v)
        return self.norm(x + found.flatten(1)), past


class MultiheadMemory(FromZeros):
    """The same by `nn.MultiheadAttention`; its weights are asked for, or not."""

    def __init__(self, H: int, window: int = 5, need_weights: bool = False) -> None:
        super().__init__((window, H))
        self.need_weights = need_weights
        self.attention, self.norm = nn.MultiheadAttention(H, 2, batch_first=True), nn.LayerNorm(H)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        past = torch.cat([past[:, 1:], x.unsqueeze(1)], 1)
        found, _ = self.attention(x.unsqueeze(1), past, past, need_weights=self.need_weights)
        return self.norm(x + found.squeeze(1)), past


class RelationalMemory(FromZeros):
    """A. Santoro et al., "Relational recurrent neural networks", NeurIPS (2018): slots that attend to each other."""

    def __init__(self, I: int, H: int, slots: int = 3) -> None:
        super().__init__((slots, H))
        self.enter, self.attention = nn.Linear(I, H), nn.MultiheadAttention(H, 2, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(H) for _ in range(2))
        self.mlp, self.gates = nn.Sequential(nn.Linear(H, H), nn.ReLU(), nn.Linear(H, H)), nn.Linear(2 * H, 2 * H)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        x = self.enter(x).unsqueeze(1)
        seen = torch.cat([memory, x], 1)
        new = self.norms[0](memory + self.attention(memory, seen, seen)[0])
        new = self.norms[1](new + self.mlp(new))
        i, f = self.gates(torch.cat([x.expand_as(memory), torch.tanh(memory)], -1)).chunk(2, -1)
        memory = torch.sigmoid(f + 1) * memory + torch.sigmoid(i) * torch.tanh(new)
        return memory.flatten(1), memory


class GatedTransformer(FromZeros):
    """E. Parisotto et al., "Stabilizing transformers for reinforcement learning", ICML (2020), over a window."""

    def __init__(self, H: int, window: int = 4) -> None:
        super().__init__((window, H))
        self.attention, self.norm = nn.MultiheadAttention(H, 2, batch_first=True), nn.LayerNorm(H)
        self.gate, self.mlp = nn.GRUCell(H, H), nn.Sequential(nn.LayerNorm(H), nn.Linear(H, H), nn.GELU())

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.norm(torch.cat([past, x.unsqueeze(1)], 1))
        y = self.attention(seen[:, -1:], seen, seen, need_weights=False)[0].squeeze(1)
        x = self.gate(F.relu(y), x)
        x = self.gate(self.mlp(x), x)
        return x, torch.cat([past[:, 1:], x.detach().unsqueeze(1)], 1)


class FastWeights(FromZeros):
    """J. Ba et al., "Using fast weights to attend to the recent past", NeurIPS (2016): an inner loop of settling."""

    def __init__(self, I: int, H: int, settle: int = 2) -> None:
        super().__init__((H,), (H, H))
        self.settle, self.slow, self.norm = settle, nn.Linear(I + H, H), nn.LayerNorm(H)

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        h, A = state
        A = 0.95 * A + 0.5 * torch.einsum("bi,bj->bij", h, h)
        boundary = self.slow(torch.cat([x, h], 1))
        h = torch.tanh(boundary)
        for _ in range(self.settle):
            h = torch.tanh(self.norm(boundary + torch.matmul(A, h.unsqueeze(-1)).squeeze(-1)))
        return h, (h, A)


class StackRNN(FromZeros):
    """A. Joulin and T. Mikolov, "Inferring algorithmic patterns with stack-augmented recurrent nets" (2015)."""

    def __init__(self, I: int, H: int, depth: int = 5) -> None:
        super().__init__((H,), (depth, 2))
        self.cell, self.act, self.push = nn.RNNCell(I + 2, H), nn.Linear(H, 3), nn.Linear(H, 2)

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        h, stack = state
        h = self.cell(torch.cat([x, stack[:, 0]], 1), h)
        push, pop, stay = F.softmax(self.act(h), 1).unsqueeze(2).split(1, 1)
        pushed = torch.cat([torch.sigmoid(self.push(h)).unsqueeze(1), stack[:, :-1]], 1)
        popped = F.pad(stack[:, 1:], (0, 0, 0, 1))
        return h, (h, push * pushed + pop * popped + stay * stack)


class RingBuffer(nn.Module):
    """A delay line that is written at a place which moves on: an integer of the state."""

    def __init__(self, I: int, H: int, length: int = 6) -> None:
        super().__init__()
        self.I, self.length, self.cell = I, length, nn.GRUCell(2 * I, H)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tree:
        buffer = torch.zeros(batch_size, self.length, self.I, device=device, dtype=dtype)
        h = torch.zeros(batch_size, self.cell.hidden_size, device=device, dtype=dtype)
        return h, buffer, torch.zeros(batch_size, dtype=torch.long, device=device)

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        h, buffer, at = state
        place = at.view(-1, 1, 1).expand(-1, 1, self.I)
        old = buffer.gather(1, place).squeeze(1)
        buffer = buffer.scatter(1, place, x.unsqueeze(1))
        h = self.cell(torch.cat([x, old], 1), h)
        return h, (h, buffer, (at + 1) % self.length)


class Quantised(FromZeros):
    """A state that passes on the nearest of some codes: after A. van den Oord et al., NeurIPS (2017)."""

    def __init__(self, I: int, H: int, codes: int = 8) -> None:
        super().__init__((H,))
        self.cell, self.codes = nn.GRUCell(I, H), nn.Embedding(codes, H)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tree, Tensor]:
        h = self.cell(x, h)
        far = (h.unsqueeze(1) - self.codes.weight).square().sum(-1)
        code = far.argmin(1)
        nearest = self.codes(code)
        return (h, code, (h.detach() - nearest).square().mean(1)), h + (nearest - h).detach()


CELLS = {
    "neural Turing machine": Example(lambda n: TuringMachine(n.I, n.H)),
    "DNC allocation, by sort": Example(lambda n: Allocation(n.I, n.H)),
    "attention to a window": Example(lambda n: AttendsToItsPast(n.I, n.H)),
    "MultiheadAttention": Example(lambda n: MultiheadMemory(n.H), lambda n: n.normal(n.H)),
    "MultiheadAttention, weights": Example(lambda n: MultiheadMemory(n.H, need_weights=True), lambda n: n.normal(n.H)),
    "relational memory": Example(lambda n: RelationalMemory(n.I, n.H)),
    "gated transformer": Example(lambda n: GatedTransformer(n.H), lambda n: n.normal(n.H)),
    "fast weights": Example(lambda n: FastWeights(n.I, n.H)),
    "stack RNN": Example(lambda n: StackRNN(n.I, n.H)),
    "ring buffer": Example(lambda n: RingBuffer(n.I, n.H)),
    "vector-quantised GRU": Example(lambda n: Quantised(n.I, n.H)),
}
