"""Compilers, exports and `vmap` around an unrolled network: one operator, and the numbers of the call itself."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap

import unrolled as ur
from matching import assert_match
from unrolled import internals
from unrolled.tracing import operator as _operator
from unrolled.tracing import samples as _samples
from unrolled.tracing import sites as _sites
from unrolled.trees import leaves

pytestmark = [
    pytest.mark.skipif(
        not internals.CONSTANTS_TAKE_OBJECTS, reason="before torch 2.13 a network breaks the graph that it is in"
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

I, H = 3, 4


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class Own(nn.Module):
    """A cell of a user's, with a state in a dict, a buffer, a weight that nobody reads, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.unread = nn.Linear(H, H), nn.Linear(I, H), nn.Linear(2, 2)
        self.register_buffer("scale", torch.tensor([0.5, 1.0, 1.5, 2.0]))
        self.beta = 1.5

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> dict[str, Tensor]:
        return {"h": torch.zeros(batch_size, H, device=device, dtype=dtype)}

    def forward(self, input: Tensor, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        hidden = torch.tanh(self.inner(state["h"]) * self.scale + self.beta * self.outer(input))
        return (hidden, hidden.sum(-1)), {"h": hidden}


class Model(nn.Module):
    def __init__(self, cell: nn.Module, **options: Any) -> None:
        super().__init__()
        self.before, self.rnn, self.after = nn.Linear(I, I), ur.unroll(cell, **options), nn.Linear(H, 2)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outputs, last = self.rnn(torch.relu(self.before(x)), state)
        return self.after(torch.relu(leaves(outputs)[0])), last


class Doubling(ur.GRUCell):
    """Branches on the size of the batch."""

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(2 * input if input.shape[0] == 1 else input, state)


class Noisy(ur.GRUCell):
    """Cannot be recorded: it draws random numbers."""

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(input * torch.rand_like(input), state)


class Coupled(ur.GRUCell):
    """Couples the rows of the batch."""

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(input - input.mean(0, keepdim=True), state)


CELLS: dict[str, Callable[[], nn.Module]] = {
    "LSTMCell": lambda: ur.LSTMCell(I, H),
    "GRUCell": lambda: ur.GRUCell(I, H, learn_initial_state=True),
    "own": Own,
    "torch.nn.LSTMCell": lambda: ur.as_cell(nn.LSTMCell(I, H)),
}


def numbers(call: Callable[..., Any], model: nn.Module, x: Tensor, *rest: Any) -> list[Tensor | None]:
    """Results and all gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    found = leaves(call(x, *rest))
    sum(t.pow(2).sum() for t in found).backward()
    return [*found, x.grad, *(p.grad for p in model.parameters())]


def assert_same(ours: list[Tensor | None], theirs: list[Tensor | None]) -> None:
    assert [x is None for x in ours] == [x is None for x in theirs]
    for a, b in zip(ours, theirs, strict=True):
        if a is not None:
            assert_match(a, b)


def compiled(model: nn.Module, backend: str = "aot_eager", *, fullgraph: bool = True) -> Callable[..., Any]:
    return torch.compile(model, backend=backend, fullgraph=fullgraph)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", CELLS)
def test_a_compiled_model_gives_the_numbers_of_the_call_at_any_length_and_batch(name, backend):
    model = Model(CELLS[name]())
    fast = compiled(model, backend)
    for T, B in ((5, 2), (3, 4), (6, 3)):
        x = torch.randn(T, B, I)
        assert_same(numbers(fast, model, x), numbers(model, model, x))
    with torch.no_grad():
        assert_match(fast(x), model(x))
    gc.collect()
    assert not _operator._GRAPHS


def test_a_carried_state_and_batch_first():
    model = Model(ur.LSTMCell(I, H), batch_first=True)
    x, state = torch.randn(2, 5, I), (torch.randn(2, H), torch.randn(2, H))
    assert_same(numbers(compiled(model), model, x, state), numbers(model, model, x, state))


@pytest.mark.parametrize("engine", ["eager", "native"])
def test_every_engine_inside(engine):
    model = Model(ur.GRUCell(I, H), engine=engine)
    x = torch.randn(5, 2, I)
    assert_same(numbers(compiled(model), model, x), numbers(model, model, x))


@pytest.mark.parametrize("kind", [ur.RNN, ur.LSTM, ur.GRU])
def test_layers(kind):
    layer = kind(I, H, batch_first=True)
    x = torch.randn(2, 5, I)
    assert_same(numbers(compiled(layer), layer, x), numbers(layer, layer, x))
    assert layer.network.plan(x).engine != "reference"


def test_frozen_weights_get_no_gradient():
    model = Model(ur.GRUCell(I, H))
    model.rnn.cell.weight_hh.requires_grad_(False)
    x = torch.randn(5, 2, I)
    assert_same(numbers(compiled(model), model, x), numbers(model, model, x))


CHANGES: dict[str, Callable[[Model], Any]] = {
    "attribute": lambda model: setattr(model.rnn.cell, "beta", 0.5),
    "buffer": lambda model: model.rnn.cell.scale.mul_(2),
    "parameter": lambda model: model.rnn.cell.inner.weight.data.mul_(0.5),
    "parameter replaced": lambda model: setattr(model.rnn.cell.inner, "weight", nn.Parameter(torch.eye(H))),
    "bias removed": lambda model: setattr(model.rnn.cell.inner, "bias", None),
    "parameter frozen": lambda model: model.rnn.cell.outer.weight.requires_grad_(False),
    "submodule replaced": lambda model: setattr(
        model.rnn.cell, "inner", nn.Sequential(nn.Linear(H, H), nn.Linear(H, H))
    ),
    "cell replaced": lambda model: setattr(model.rnn, "cell", Own()),
    "network replaced": lambda model: setattr(model, "rnn", ur.unroll(Own())),
    "hook": lambda model: model.rnn.cell.inner.register_forward_hook(lambda module, given, result: 2 * result),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_compiling_changes_the_answer(change):
    model, x = Model(Own()), torch.randn(5, 2, I)
    fast = compiled(model)
    before = numbers(fast, model, x)
    CHANGES[change](model)
    after = numbers(model, model, x)
    assert not torch.equal(before[0], after[0]) or change == "parameter frozen"
    assert_same(numbers(fast, model, x), after)


def test_results_of_another_shape_after_compiling_are_refused():
    class Narrow(Own):
        width = H

        def forward(self, input: Tensor, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
            (hidden, _), state = super().forward(input, state)
            return (hidden, hidden[:, : self.width]), state

    model, x = Model(Narrow()), torch.randn(5, 2, I)
    fast = compiled(model)
    fast(x)
    model.rnn.cell.width = 2
    with pytest.raises(ur.CellError, match=r"come to have other shapes.*torch\.compiler\.reset"):
        fast(x)


def test_a_gradient_that_comes_about_after_compiling_is_refused():
    class Cut(ur.GRUCell):
        cut = True

        def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(input.detach() if self.cut else input, state)

    model, x = Model(Cut(I, H)), torch.randn(5, 2, I)
    fast = compiled(model)
    assert_same(numbers(fast, model, x), numbers(model, model, x))
    model.rnn.cell.cut = False
    with pytest.raises(ur.CellError, match="other tensors that get gradients"):
        numbers(fast, model, x)


@pytest.mark.parametrize("cell", [Noisy, Doubling])
def test_what_cannot_be_recorded_for_all_batches_is_right_nevertheless(cell):
    model = Model(cell(I, H))
    fast = compiled(model, fullgraph=False)
    for B in (4, 1):
        x = torch.randn(3, B, I)
        assert_same(numbers(fast, model, x), numbers(model, model, x))


def test_errors_are_those_of_the_call():
    rnn = ur.unroll(ur.GRUCell(I, H))
    fast = compiled(rnn, fullgraph=False)
    with pytest.raises(ur.StateError, match="must be"):
        fast(torch.randn(5, 2, I), torch.zeros(3, H))
    with pytest.raises(ur.InputError, match="I = 3"):
        fast(torch.randn(5, 2, I + 1))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_an_export_has_one_node_for_the_whole_recurrence(strict, dynamic):
    model = Model(ur.LSTMCell(I, H))
    shapes = {"x": {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}} if dynamic else None
    program = torch.export.export(model, (torch.randn(5, 2, I),), dynamic_shapes=shapes, strict=strict)
    targets = [node.target for node in program.graph.nodes if "unrolled" in str(node.target)]
    assert targets == [torch.ops.unrolled.run.default]
    x = torch.randn(9, 3, I) if dynamic else torch.randn(5, 2, I)
    assert_match(program.module()(x), model(x))


def test_a_program_that_outlives_its_network_says_so():
    model = Model(ur.GRUCell(I, H))
    program = torch.export.export(model, (torch.randn(5, 2, I),)).module()
    del model
    gc.collect()
    with pytest.raises(ur.OptionError, match="keep the network"):
        program(torch.randn(5, 2, I))


def test_torch_checks_the_operator():
    rnn = ur.unroll(Own())
    compiled(rnn)(torch.randn(5, 2, I))
    site = next(site for site in _sites.Site._by_number.values() if site.network[1]() is rnn.cell)
    state = rnn.cell.initial_state(2)["h"]
    tensors = [torch.randn(5, 2, I, requires_grad=True), state, *_samples.tensors_in(rnn.cell)]
    for wanted in ([t.requires_grad for t in tensors], [False] * len(tensors)):
        given = [t if w else t.detach() for t, w in zip(tensors, wanted, strict=True)]
        torch.library.opcheck(torch.ops.unrolled.run.default, (given, wanted, site.number))


def test_a_backward_whose_token_was_copied_runs_the_forward_again():
    rnn = ur.unroll(ur.GRUCell(I, H))
    x = torch.randn(5, 2, I)
    compiled(rnn)(x)
    (site,) = (site for site in _sites.Site._by_number.values() if site.network[1]() is rnn.cell)
    tensors = [x, torch.zeros(2, H), *(p.detach() for p in _samples.tensors_in(rnn.cell))]
    wanted = [True] * len(tensors)
    *results, token = torch.ops.unrolled.run(tensors, wanted, site.number)
    grads = [torch.ones_like(result) for result in results]
    rest = (tensors, wanted, wanted, site.number)
    kept = torch.ops.unrolled.run_backward(grads, token, *rest)
    again = torch.ops.unrolled.run_backward(grads, token.clone(), *rest)
    assert_same(kept, again)


def test_a_second_derivative_goes_through_the_reference():
    model, x = Model(ur.LSTMCell(I, H)), torch.randn(4, 2, I, requires_grad=True)

    def second(call: Callable[..., Any]) -> list[Tensor]:
        (first,) = torch.autograd.grad(call(x)[0].pow(2).sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.pow(2).sum(), [x, *model.rnn.parameters()]))

    assert_same(second(compiled(model, "eager")), second(model))
    with pytest.raises(RuntimeError, match="double backward"):
        second(compiled(model, "aot_eager"))


def test_transforms_inside_of_a_compiled_function():
    rnn, xs = ur.unroll(ur.GRUCell(I, H)), torch.randn(3, 4, 2, I)
    calls = [
        lambda x: vmap(lambda y: rnn(y)[0])(x),
        lambda x: jvp(lambda y: rnn(y)[0], (x[0],), (x[1],)),
    ]
    for call in calls:
        assert_match(torch.compile(call, backend="eager")(xs), call(xs))


# -- vmap ------------------------------------------------------------------------------------------------------------


MAPPED: dict[str, Callable[[], nn.Module]] = {
    **CELLS,
    "couples rows": lambda: Coupled(I, H),
    "branches on B": lambda: Doubling(I, H),
}


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("dims", [(0, 0), (1, 1), (2, 0)])
@pytest.mark.parametrize("name", MAPPED)
def test_vmap_equals_a_loop_over_the_mapped_dimension(name, dims, B):
    rnn, x = ur.unroll(MAPPED[name]()), torch.randn(5, 3, B, I).movedim(1, dims[0])

    def mapped(x: Tensor) -> Any:
        return vmap(rnn, in_dims=dims[0], out_dims=dims[1])(x)

    def looped(x: Tensor) -> Any:
        each = [leaves(rnn(y)) for y in x.unbind(dims[0])]
        return [torch.stack(column, dims[1]) for column in zip(*each, strict=True)]

    assert_same(numbers(mapped, rnn, x), numbers(looped, rnn, x))
    x, weights = x.detach(), dict(rnn.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        call = vmap(lambda y: functional_call(rnn, weights, (y,)), in_dims=dims[0])
        return sum(t.pow(2).sum() for t in leaves(call(x)))

    got = grad(loss)(weights, x)
    numbers(looped, rnn, x)
    for key, tensor in weights.items():
        assert_match(got[key], torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)


def test_vmap_of_some_arguments_and_vmap_of_vmap():
    rnn, x, state = ur.unroll(ur.LSTMCell(I, H)), torch.randn(2, 3, 5, 2, I), (torch.randn(3, 2, H), torch.randn(2, H))
    got = vmap(rnn, in_dims=(0, (0, None)))(x[0], state)
    want = [rnn(y, (h, state[1])) for y, h in zip(x[0], state[0], strict=True)]
    assert_same(leaves(got), [torch.stack(column) for column in zip(*map(leaves, want), strict=True)])
    nested = vmap(vmap(lambda y: rnn(y)[0]))(x)
    assert_match(nested, torch.stack([torch.stack([rnn(z)[0] for z in y]) for y in x]))


def test_vmap_over_weights_maps_the_reference():
    rnn, x = ur.unroll(ur.GRUCell(I, H)), torch.randn(3, 5, 2, I)
    weights = {key: torch.randn(3, *tensor.shape) for key, tensor in rnn.named_parameters()}
    got = vmap(lambda w, y: functional_call(rnn, w, (y,))[0])(weights, x)
    each = [{key: tensor[n] for key, tensor in weights.items()} for n in range(3)]
    assert_match(got, torch.stack([functional_call(rnn, w, (y,))[0] for w, y in zip(each, x, strict=True)]))


def test_derivatives_of_vmap():
    rnn = ur.unroll(ur.GRUCell(I, H))
    x = torch.randn(2, 3, 1, I)

    def mapped(x: Tensor) -> Tensor:
        return vmap(lambda y: rnn(y)[0])(x)

    def looped(x: Tensor) -> Tensor:
        return torch.stack([rnn(y)[0] for y in x])

    assert_match(jvp(mapped, (x,), (x.cos(),)), jvp(looped, (x,), (x.cos(),)))
    assert_match(hessian(lambda x: mapped(x).sum())(x), hessian(lambda x: looped(x).sum())(x))


def test_vmap_folds_rows_and_does_not_walk_copy_by_copy(monkeypatch):
    rnn, x = ur.unroll(ur.GRUCell(I, H)), torch.randn(3, 5, 2, I)
    vmap(rnn)(x)
    monkeypatch.setattr("unrolled.engine.witness.Turns.next", lambda *_, **__: None)  # it asks the reference
    monkeypatch.setattr("unrolled.engine.reference.run", None)
    vmap(rnn)(x)
