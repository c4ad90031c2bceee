"""Indices, sorting and integers in a step: compiled, with lengths, and with torch's own errors where an index fails."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matching import assert_match
from random_cells import ENGINES, assert_as_reference, decision, unrolled
from row_by_row import Batch, answers
from unrolled.trees import leaves

F64 = torch.float64
T, B, H, SLOTS = 5, 3, 4, 3
LENGTHS = (2, 5, 0)


class Cell(nn.Module):
    """A recurrent layer of H units, and shapes for whatever else the state has."""

    kinds: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.read = nn.Linear(2 * H, H), nn.Linear(H, H)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> tuple[Tensor, ...]:
        made = [torch.zeros(batch_size, *shape, dtype=kind or dtype) for shape, kind in self.kinds]
        return torch.full((batch_size, H), 0.1, dtype=dtype), *made

    def updated(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.inner(torch.cat([x, h], -1)))


class RingBuffer(Cell):
    """The last hidden vectors, each written where a pointer of its row stands."""

    kinds = (((SLOTS, H), None), ((), torch.int64))  # type: ignore[assignment]

    def forward(self, x: Tensor, state: Any) -> Any:
        h, memory, pointer = state
        oldest = memory[torch.arange(len(x)), (pointer + 1) % SLOTS]
        h = self.updated(x, h + self.read(oldest))
        memory = memory.clone()
        memory[torch.arange(len(x)), pointer] = h
        return h, (h, memory, (pointer + (h[:, 0] > 0) + 1) % SLOTS)


class SharedPointer(Cell):
    """A ring whose pointer is one for all rows, a number without a batch, read and written by index."""

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Any:
        zeros = torch.zeros(batch_size, SLOTS, H, dtype=dtype)
        return torch.full((batch_size, H), 0.1, dtype=dtype), zeros, torch.zeros((), dtype=torch.int64)

    def forward(self, x: Tensor, state: Any) -> Any:
        h, memory, pointer = state
        h = self.updated(x, h + memory[:, (pointer - 1) % SLOTS] + memory[:, -1])
        memory = memory.clone()
        memory[:, pointer] = h
        return h, (h, memory, (pointer * 3 + 1) % SLOTS)


class Nearest(Cell):
    """A memory of slots, of which the two nearest are read."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(SLOTS + 2, H))

    def forward(self, x: Tensor, state: Any) -> Any:
        (h,) = state
        likeness, places = (h @ self.keys.T).topk(2, -1)
        read = (self.keys[places] * likeness.softmax(-1).unsqueeze(-1)).sum(1)
        h = self.updated(x, h + self.read(read))
        return h, (h,)


class Allocation(Cell):
    """Slots by how free they are, as a differentiable neural computer allocates them."""

    kinds = (((SLOTS,), None), ((SLOTS, H), None))  # type: ignore[assignment]

    def forward(self, x: Tensor, state: Any) -> Any:
        h, usage, memory = state
        usage = usage + (1 - usage) * torch.sigmoid(self.read(h)[:, :SLOTS] + x[:, :SLOTS])
        ordered, places = torch.sort(usage, dim=-1, stable=True)
        free = (1 - ordered) * F.pad(ordered, (1, -1), value=1.0).cumprod(-1)
        weights = torch.zeros_like(usage).scatter(1, places, free)
        memory = memory + weights.unsqueeze(-1) * h.unsqueeze(1)
        h = self.updated(x, h + memory.index_select(1, torch.arange(1)).squeeze(1))
        return h, (h, 0.9 * usage, memory)


class SparseGraph(Cell):
    """Nodes that pass messages along the edges of a list; a permutation of features; a mask that starts rows anew."""

    kinds = (((5, H), None),)  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("source", torch.tensor([0, 1, 1, 4, 3, 2]))
        self.register_buffer("target", torch.tensor([1, 2, 0, 4, 4, 1]))
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))

    def forward(self, x: Tensor, state: Any) -> Any:
        h, nodes = state
        messages = torch.zeros_like(nodes).index_add(1, self.target, nodes[:, self.source] * h.unsqueeze(1))
        nodes = torch.tanh(nodes[..., self.order] + messages[..., [1, 2, 3, 0]] + x.unsqueeze(1))
        h = self.updated(x, h + nodes[:, self.target[:2], self.order[:2]].sum(-1, keepdim=True)).clone()
        h[x[:, 0] > 0.5] = 0
        h[h > 0.6] = 0.25
        return h, (h, nodes)


class Quantised(Cell):
    """A state that is the nearest of a codebook, straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(6, H)

    def forward(self, x: Tensor, state: Any) -> Any:
        (h,) = state
        h = self.updated(x, h)
        place = (h.unsqueeze(1) - self.codes.weight).square().sum(-1).argmin(-1)
        code = self.codes(place)
        return place, (h + (code - h).detach() + 0.1 * code,)


class Feedback(Cell):
    """Each word that it says is looked up and fed back; words are hashed into buckets that are counted."""

    kinds = (((), torch.int64), ((4,), torch.int32))  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.words, self.logits = nn.Parameter(torch.randn(7, H)), nn.Linear(H, 7)

    def forward(self, x: Tensor, state: Any) -> Any:
        h, word, counts = state
        h = self.updated(x, h + self.words[word])
        logits = self.logits(h)
        best, word = logits.max(-1)
        bucket = ((word * 2654435761 + 9007199254740993) >> 3) % 4
        counts = counts.scatter_add(1, bucket.unsqueeze(-1), torch.ones_like(counts[:, :1]))
        rare = counts.gather(1, bucket.unsqueeze(-1)) < 2
        one_hot = (word.unsqueeze(-1) == torch.arange(7)).to(h.dtype)
        return (best, word, one_hot @ self.words * rare), (h, word, counts)


CELLS = {kind.__name__: kind for kind in (RingBuffer, Nearest, Allocation, SparseGraph, Quantised, Feedback)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CELLS)
def test_cells_that_index_are_compiled_and_take_lengths(name, engine):
    torch.manual_seed(1)
    cell, inputs = CELLS[name]().double(), torch.randn(T, B, H, dtype=F64)
    found = decision(cell, inputs, engine)
    assert found.engine == engine, found.why
    rnn = unrolled(cell, engine)
    assert_as_reference(cell, inputs, engine=engine, rnn=rnn)
    batch = Batch(inputs, LENGTHS)
    assert_match(answers(rnn, batch, "list"), answers(rnn, batch))
    assert rnn.ran == engine
    resets = torch.rand(T, B) < 0.3
    assert_match(answers(rnn, batch._replace(resets=resets), "list"), answers(rnn, batch._replace(resets=resets)))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_state_without_a_batch(engine):
    cell, inputs = SharedPointer().double(), torch.randn(T, B, H, dtype=F64)
    found = decision(cell, inputs, engine)
    assert found.engine == engine, found.why
    assert_as_reference(cell, inputs, engine=engine)


class Indexed(Cell):
    """Reads or writes its state where whole numbers in its input say."""

    def __init__(self, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.operation, self.table = operation, nn.Parameter(torch.randn(4, H))

    def forward(self, x: Any, state: Any) -> Any:
        (h,) = state
        features, places = x
        h = self.updated(features, h + self.operation(h, places) + self.table[0])
        return h, (h,)


FAILING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gather": lambda h, k: h.gather(1, k),
    "scatter": lambda h, k: h.scatter(1, k, h),
    "scatter_add": lambda h, k: h.scatter_add(1, k, 2 * h),
    "rows": lambda h, k: h[torch.arange(len(h)), k[:, 0]].unsqueeze(-1),
    "rows, put": lambda h, k: h.index_put((torch.arange(len(h)), k[:, 0]), h[:, 1]),
    "rows, added": lambda h, k: torch.index_put(
        h, (torch.arange(len(h)).unsqueeze(1), k), h[:, :1].expand(k.shape), accumulate=True
    ),
    "rows, put in place": lambda h, k: (2 * h).index_put_((torch.arange(len(h)), k[:, 1]), h[:, 0]),
    "rows of matrices": lambda h, k: h.view(-1, 2, 2)[torch.arange(len(h)), k[:, 0] // 2, k[:, 1] - 2].unsqueeze(-1),
    "table": lambda h, k: F.embedding(k[:, 0], torch.ones(4, H, dtype=h.dtype)) * h,
    "quotient": lambda h, k: h * (5 // (k - 4)),
    "remainder": lambda h, k: h * (5 % (k - 4)),
}


@pytest.mark.parametrize("name", FAILING)
def test_what_has_no_answer_is_torchs_own_error(name):
    """An index out of range, or a division by zero, in some row of some step: no memory is touched for it."""
    torch.manual_seed(2)
    cell, features = Indexed(FAILING[name]).double(), torch.randn(T, B, H, dtype=F64)
    right = torch.randint(0, 4, (T, B, H))
    rnn = unrolled(cell, "native")
    found = decision(cell, (features, right), "native")
    assert found.engine == "native", found.why
    assert_as_reference(cell, (features, right), engine="native", rnn=rnn)
    for place in (4, 4 + 2**40):
        wrong = right.clone()
        wrong[3, 1] = place
        if name in ("quotient", "remainder"):
            wrong[3, 1] = 4
        with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)|ZeroDivision"):
            rnn((features, wrong))
    assert_as_reference(cell, (features, right), engine="native", rnn=rnn)


def test_indices_from_the_end_count_where_torch_counts_them():
    cell = Indexed(lambda h, k: h[torch.arange(len(h)), k[:, 0] - 4].unsqueeze(-1) + h[:, [-1, 0, -3, 2]]).double()
    x = torch.randn(T, B, H, dtype=F64), torch.randint(0, 8, (T, B, H))
    assert decision(cell, x, "native").engine == "native"
    assert_as_reference(cell, x, engine="native")


def _with_nan(h: Tensor, k: Tensor) -> Tensor:
    return torch.where(k > 1, torch.nan, h)


class SortedGradient(torch.autograd.Function):
    """The state itself, whose gradient is multiplied by the places of its largest entries."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * (1 + grad.topk(2, -1)[1].sum(-1, keepdim=True))


TIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "topk": lambda h, k: h.relu().topk(2, -1)[1].sum(-1, keepdim=True) + h.relu().topk(3, -1)[0].sum(-1, keepdim=True),
    "sort": lambda h, k: torch.cat([h.relu()] * 5, -1).sort(-1)[1][:, :H] * h,
    "stable sort": lambda h, k: torch.sort(h.relu(), dim=-1, descending=True, stable=True)[1] * h,
    "argmax": lambda h, k: (h.relu().argmax(-1) - h.relu().argmin(-1)).unsqueeze(-1) * h,
    "max": lambda h, k: (k.max(-1)[1] + h.relu().min(-1)[1]).unsqueeze(-1) * h,
    "cummax": lambda h, k: h.relu().cummax(-1)[1] * h + k.cummin(-1)[1],
    "median": lambda h, k: h.relu().median(-1)[1].unsqueeze(-1) * h,
    "nan": lambda h, k: _with_nan(h, k).argmax(-1, keepdim=True) * h + _with_nan(h, k).min(-1)[1].unsqueeze(-1),
    "nan first": lambda h, k: torch.sort(_with_nan(h, k), dim=-1, stable=True, descending=True)[1] * h,
}


@pytest.mark.parametrize("name", TIES)
def test_which_of_equal_numbers_comes_first_is_as_torch_has_it(name):
    torch.manual_seed(3)
    cell = Indexed(TIES[name]).double()
    x = torch.randn(T, B, H, dtype=F64), torch.randint(0, 4, (T, B, H))
    found = decision(cell, x, "native")
    assert found.engine == "native", found.why
    assert_as_reference(cell, x, engine="native")


def test_what_is_declined_is_said_to_have_run_eagerly():
    """Ties in the forward pass; in the backward pass, whose first gradients are zeros; in neither."""
    torch.manual_seed(5)
    cell = Indexed(lambda h, k: SortedGradient.apply(h) + h.topk(2, -1)[0].sum(-1, keepdim=True)).double()
    rnn, x = unrolled(cell, "native"), (torch.randn(T, B, H, dtype=F64), torch.zeros(T, B, H, dtype=torch.int64))
    tied, apart = torch.zeros(B, H, dtype=F64), torch.randn(B, H, dtype=F64)
    weights = torch.randn(T, B, H, dtype=F64)
    none_at_the_end = torch.cat([weights[:-1], torch.zeros(1, B, H)])
    for first, counted, ran in (
        (tied, weights, ("eager", "eager")),
        (apart, none_at_the_end, ("native", "eager")),
        (apart, weights, ("native", "native")),
    ):
        outputs, _ = rnn(x, (first,))
        ran_forward = rnn.ran
        (outputs * counted).sum().backward()
        assert (ran_forward, rnn.ran) == ran
        found = [w.grad for w in cell.parameters()]
        cell.zero_grad()
        (unrolled(cell, "reference")(x, (first,))[0] * counted).sum().backward()
        assert_match(found, [w.grad for w in cell.parameters()])
        cell.zero_grad()


@pytest.mark.parametrize("name", ["Allocation", "Feedback"])
def test_with_little_memory_and_after_some_steps_of_an_optimiser(name):
    """In single precision, where integers beyond 2^24 are no floating-point numbers."""
    torch.manual_seed(4)
    found = {}
    start, inputs = CELLS[name](), torch.randn(12, B, H)
    for engine, options in (("reference", {}), ("native", {"memory": 0.8}), ("native", {})):
        cell = copy.deepcopy(start)
        rnn, optimizer = unrolled(cell, engine, **options), torch.optim.SGD(cell.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            outputs, state = rnn(inputs)
            sum(x.square().mean() for x in leaves([outputs, state]) if x.requires_grad).backward()
            optimizer.step()
        found[engine, bool(options)] = dict(cell.named_parameters())
    for parameters in found.values():
        assert_match(parameters, found["reference", False])


def test_a_mask_that_picks_entries_is_refused_with_a_remedy():
    class Masked(Cell):
        def forward(self, x: Tensor, state: Any) -> Any:
            (h,) = state
            h = self.updated(x, h + h[h > 0].sum())
            return h, (h,)

    assert "torch.where" in decision(Masked().double(), torch.randn(T, B, H, dtype=F64), "native").why
