"""torch.nn's recurrent layers with all their options, forward and backward; what they are converted to and from."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import unrolled as ur
from matching import assert_match
from unrolled.trees import Tree, leaves, map_leaves

F64 = torch.float64
I, H, P, T, B = 4, 4, 3, 7, 6
SORTED, UNSORTED = [7, 5, 5, 2, 1, 1], [2, 7, 1, 5, 1, 5]

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "RNN": ("RNN", {}),
    "RNN relu": ("RNN", {"nonlinearity": "relu"}),
    "LSTM": ("LSTM", {}),
    "LSTM projected": ("LSTM", {"proj_size": P}),
    "GRU": ("GRU", {}),
}


class Case(NamedTuple):
    """One point of the cross that torch's own tests of these layers walk through."""

    kind: str
    layers: int
    bias: bool
    bidirectional: bool
    batch_first: bool
    contiguous: bool
    given_state: bool
    lengths: str

    def options(self) -> dict[str, Any]:
        own = {"num_layers": self.layers, "bias": self.bias, "bidirectional": self.bidirectional}
        return own | {"batch_first": self.batch_first} | KINDS[self.kind][1]


AXES: list[list[Any]] = [
    [*KINDS],
    [1, 2, 3],
    [True, False],
    [False, True],
    [False, True],
    [True, False],
    [True, False],
    ["none", "list", "tensor", "packed", "packed sorted"],
]
CROSS = [Case(*point) for point in itertools.product(*AXES)]


def _pairs(case: Case) -> set[Any]:
    return set(itertools.combinations(enumerate(case), 2))


def pairwise() -> list[Case]:
    """Points of the cross among which every two options of every two axes meet."""
    chosen, drawn = [], random.Random(0)
    left = set().union(*map(_pairs, CROSS))
    while left:
        best = max(drawn.sample(CROSS, 60), key=lambda case: len(_pairs(case) & left))
        chosen.append(best)
        left -= _pairs(best)
    return [case for case in chosen if case]


def both(kind: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """torch.nn's layer and ours with the same numbers."""
    name, own = KINDS[kind]
    theirs = getattr(nn, name)(I, H, **own, **options).double()
    ours = getattr(ur, name)(I, H, **own, **options).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def inputs_for(case: Case) -> Tensor:
    shape = (B, T, I) if case.batch_first else (T, B, I)
    return torch.randn(shape, dtype=F64) if case.contiguous else torch.randn(shape[::-1], dtype=F64).permute(2, 1, 0)


def state_for(layer: nn.Module, *rows: int) -> Tree:
    many = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(many, *rows, layer.proj_size or H, dtype=F64)
    return (h, torch.randn(many, *rows, H, dtype=F64)) if isinstance(layer, nn.LSTM) else h


def run(layer: nn.Module, case: Case, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
    """A call as the case says; outputs padded."""
    lengths = SORTED if case.lengths == "packed sorted" else UNSORTED
    if case.lengths == "none":
        return layer(x, state)
    if case.lengths.startswith("packed") or isinstance(layer, nn.RNNBase):
        given = torch.tensor(lengths)
        packed = pack_padded_sequence(x, given, case.batch_first, enforce_sorted=case.lengths == "packed sorted")
        outputs, last = layer(packed, state)
        assert isinstance(outputs, PackedSequence)
        assert_match(list(outputs[1:]), list(packed[1:])) if outputs.sorted_indices is not None else None
        return pad_packed_sequence(outputs, case.batch_first)[0], last
    return layer(x, state, lengths=torch.tensor(lengths) if case.lengths == "tensor" else lengths)


def asking(tree: Tree) -> Tree:
    return None if tree is None else map_leaves(lambda x: x.detach().requires_grad_(), tree)


def mixed(*trees: Tree) -> Tensor:
    return sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in leaves(list(trees)))


def answers(layer: nn.Module, case: Case, x: Tensor, state: Tree) -> tuple[Tree, list[Tensor]]:
    x, state = asking(x), asking(state)
    outputs, last = run(layer, case, x, state)
    asked = [x, *(leaves(state) if state is not None else []), *layer.parameters()]
    return (outputs, last), [*torch.autograd.grad(mixed(outputs, last), asked)]


def assert_as_torch(case: Case) -> None:
    theirs, ours = both(case.kind, **{k: v for k, v in case.options().items() if k not in KINDS[case.kind][1]})
    x = inputs_for(case)
    state = state_for(theirs, B) if case.given_state else None
    (values, grads), (want, want_grads) = answers(ours, case, x, state), answers(theirs, case, x, state)
    assert_match(values, want, "values")
    names = ["inputs", *(["state"] * len(leaves(state)) if case.given_state else [])]
    names += [name for name, _ in theirs.named_parameters()]
    largest = max(grad.abs().max().item() for grad in want_grads)
    for name, got, grad in zip(names, grads, want_grads, strict=True):
        off = (got - grad).abs().max().item()
        assert off <= 1e-10 * largest, f"gradient by {name} is off by {off}"


@pytest.mark.parametrize("case", pairwise(), ids=lambda case: "-".join(map(str, case)))
def test_values_and_gradients_are_those_of_torch_nn(case):
    assert_as_torch(case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_values_and_gradients_are_those_of_torch_nn_over_the_whole_cross(layers, kind):
    for case in CROSS:
        if (case.kind, case.layers) == (kind, layers):
            assert_as_torch(case)


# -- state dicts, conversion, copies ---------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "bias": False, "batch_first": True},
    {"bidirectional": True, "batch_first": True},
    {"num_layers": 2, "dropout": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_load_strictly_both_ways_and_one_seed_draws_the_same(kind, options):
    name, own = KINDS[kind]
    made = []
    for module in (nn, ur):
        torch.manual_seed(4)
        made.append(getattr(module, name)(I, H, **own, **options))
    theirs, ours = made
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_match(dict(ours.state_dict()), dict(theirs.state_dict()), bound=0.0)
    other = getattr(nn, name)(I, H, **own, **options)
    other.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(other.state_dict(), strict=True)


def settings(layer: nn.Module) -> dict[str, Any]:
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
    found = {name: getattr(layer, name) for name in names} | {"training": layer.training}
    found["nonlinearity"] = layer.nonlinearity if isinstance(layer, nn.RNN | ur.RNN) else None
    return found | {name: (p.requires_grad, p.dtype) for name, p in layer.named_parameters()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_conversion_both_ways_keeps_all_options_and_numbers(kind, options):
    theirs = both(kind, **options)[0].eval()
    next(theirs.parameters()).requires_grad_(False)
    ours = ur.from_torch(theirs)
    back = ur.to_torch(ours)
    assert type(ours) is getattr(ur, KINDS[kind][0])
    assert type(back) is type(theirs)
    assert settings(theirs) == settings(ours) == settings(back)
    assert_match(dict(back.state_dict()), dict(theirs.state_dict()), bound=0.0)
    x = torch.randn(B, T, I, dtype=F64)
    assert_match(ours(x), theirs(x))


def test_dropout_of_one_layer_is_warned_of_and_kept():
    with pytest.warns(UserWarning, match="dropout"):
        theirs = nn.GRU(I, H, dropout=0.5)
    with pytest.warns(UserWarning, match="dropout=0.5 acts between layers"):
        ours = ur.from_torch(theirs)
    assert ours.dropout == 0.5


STACKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "one": (lambda: [ur.GRUCell(I, H)], {}),
    "three": (lambda: [ur.RNNCell(I, H, nonlinearity="relu"), *(ur.RNNCell(H, H, nonlinearity="relu"),) * 1], {}),
    "both ways": (lambda: [ur.LSTMCell(I, H), ur.LSTMCell(2 * H, H)], {"bidirectional": True, "dropout": 0.2}),
    "torch.nn's cells": (lambda: [nn.GRUCell(I, H), nn.GRUCell(H, H), ur.GRUCell(H, H)], {"batch_first": True}),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_of_plain_cells_becomes_torch_nns_layer(name):
    cells, options = STACKS[name]
    rnn = ur.stack(cells(), **options).double().eval()
    layer = ur.to_torch(rnn)
    assert (layer.training, layer.batch_first, layer.dropout) == (False, rnn.batch_first, rnn.dropout)
    x = torch.randn(T, B, I, dtype=F64)
    outputs, states = rnn(x)
    want, last = layer(x)
    assert_match(outputs, want)
    assert_match(torch.stack(leaves(states)), torch.stack(_by_layer(last)))


def _by_layer(last: Tree) -> list[Tensor]:
    return [h[n] for n in range(len(leaves(last)[0])) for h in leaves(last)]


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_bidirectional_network_becomes_a_bidirectional_layer(batch_first):
    rnn = ur.Bidirectional(ur.GRUCell(I, H), ur.GRUCell(I, H), batch_first=batch_first).double()
    layer, x = ur.to_torch(rnn), torch.randn(T, B, I, dtype=F64)
    assert layer.bidirectional
    assert_match(layer(x)[0], rnn(x)[0])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ur.unroll(ur.GRUCell(I, H), reverse=True), "backwards alone"),
        (lambda: ur.stack([ur.GRUCell(I, H), ur.LSTMCell(H, H)]), "all alike"),
        (lambda: ur.stack([ur.GRUCell(I, H), ur.GRUCell(H, 5)]), "all alike"),
        (lambda: ur.stack([ur.GRUCell(I, H), ur.GRUCell(H, H, bias=False)]), "all alike"),
        (lambda: ur.stack([(ur.GRUCell(I, H), ur.GRUCell(I, H)), ur.GRUCell(2 * H, H)]), "all alike"),
        (lambda: ur.stack([ur.GRUCell(I, H), *(ur.GRUCell(H, H),) * 2]), "share no weights"),
        (lambda: ur.stack([ur.GRUCell(I, H), ur.stack([ur.GRUCell(H, H)])]), "stack cells"),
        (lambda: ur.stack([ur.SLSTMCell(I, H)]), "SLSTMCell"),
        (lambda: ur.stack([ur.GRUCell(I, H, learn_initial_state=True)]), "learned initial state"),
    ],
)
def test_what_torch_nn_has_no_layer_for_is_refused(make, says):
    with pytest.raises(ur.OptionError, match=says):
        ur.to_torch(make())


LARGE = {"num_layers": 2, "bidirectional": True}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("kind", ["LSTM projected", "GRU"])
def test_copies_have_the_numbers_and_weights_of_their_own(kind, copied):
    _, layer = both(kind, **LARGE)
    x = torch.randn(T, B, I, dtype=F64)
    want = layer(x, lengths=UNSORTED)
    twin = copied(layer)
    assert_match(twin(x, lengths=UNSORTED), want, bound=0.0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert_match(twin(x, lengths=UNSORTED), want, bound=0.0)
    assert (layer(x)[0] == 0).all()
    twin(x)[0].sum().backward()
    assert all(p.grad is None for p in layer.parameters())
    assert all(p.grad is not None for p in twin.parameters())


@pytest.mark.parametrize("make", [lambda: ur.stack([ur.GRUCell(I, H), ur.GRUCell(2 * H, H)], bidirectional=True)])
def test_stacks_are_copied_and_pickled_whole(make):
    rnn = make().double()
    x = torch.randn(T, B, I, dtype=F64)
    want = rnn(x, lengths=UNSORTED)
    for twin in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert_match(twin(x, lengths=UNSORTED), want, bound=0.0)


# -- states, single sequences, resets --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_sequence_without_a_batch(kind, given, batch_first):
    theirs, ours = both(kind, **LARGE, batch_first=batch_first)
    x, state = torch.randn(T, I, dtype=F64), state_for(theirs) if given else None
    assert_match(ours(x, state), theirs(x, state))


@pytest.mark.parametrize("kind", ["LSTM projected", "GRU"])
def test_a_sequence_in_two_halves_with_the_state_carried_is_the_whole_one_way(kind):
    _, layer = both(kind, num_layers=3)
    x = torch.randn(T, B, I, dtype=F64)
    whole, last = layer(x)
    first, carried = layer(x[:3])
    second, end = layer(x[3:], carried)
    assert_match(torch.cat([first, second]), whole)
    assert_match(end, last)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["LSTM projected", "GRU"])
def test_a_reset_cuts_the_rows_of_all_layers_and_directions(kind, batch_first):
    theirs, layer = both(kind, num_layers=1, bidirectional=True, batch_first=batch_first)
    x, cut = torch.randn(T, B, I, dtype=F64), 3
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[cut] = True
    want = torch.cat([both_parts[0] for both_parts in (_timed(theirs, x[:cut]), _timed(theirs, x[cut:]))])
    got = layer(x.transpose(0, 1), resets=resets.T)[0].transpose(0, 1) if batch_first else layer(x, resets=resets)[0]
    assert_match(got, want)


def _timed(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tree]:
    outputs, last = layer(x.transpose(0, 1) if layer.batch_first else x)
    return outputs.transpose(0, 1) if layer.batch_first else outputs, last


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["LSTM projected", "GRU"])
def test_a_compiled_layer_gives_the_same_numbers(kind):
    _, layer = both(kind, **LARGE)
    compiled = torch.compile(layer, backend="eager")
    x = torch.randn(T, B, I, dtype=F64)
    for rest in ({}, {"lengths": UNSORTED}):
        found = []
        for module in (layer, compiled):
            asked = x.clone().requires_grad_()
            outputs, last = module(asked, **rest)
            grads = torch.autograd.grad(mixed(outputs, last), [asked, *layer.parameters()])
            found.append([outputs, *leaves(last), *grads])
        assert_match(found[1], found[0])


# -- dropout ---------------------------------------------------------------------------------------------------------


class Passing(nn.Module):
    """Gives out what it reads."""

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, 1, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return input, state


@pytest.mark.parametrize("lengths", [None, [40, 0, 17, 1]], ids=str)
def test_dropout_keeps_entries_with_its_probability_and_scales_them(lengths):
    p, cell = 0.25, ur.GRUCell(I, 64, dtype=F64)
    rnn = ur.stack([cell, Passing()], dropout=p, engine="eager")
    x = torch.randn(40, 4, I, dtype=F64)
    whole = ur.unroll(cell, engine="eager")(x, lengths=lengths)[0]
    got = rnn(x, lengths=lengths)[0]
    kept = got != 0
    assert_match(got[kept], (whole / (1 - p))[kept])
    share = kept.sum() / (whole != 0).sum()
    assert abs(share.item() - (1 - p)) < 0.03
    assert not torch.equal(rnn(x, lengths=lengths)[0], got)
    torch.manual_seed(1)
    once = rnn(x, lengths=lengths)[0]
    torch.manual_seed(1)
    assert torch.equal(rnn(x, lengths=lengths)[0], once)
    assert_match(rnn.eval()(x, lengths=lengths)[0], whole, bound=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_between_layers_in_training_only(kind):
    theirs, ours = both(kind, num_layers=3, bidirectional=True, dropout=1.0)
    x = torch.randn(T, B, I, dtype=F64)
    for training in (True, False, True):  # with p = 1 everything is dropped, in torch.nn likewise
        assert_match(ours.train(training)(x), theirs.train(training)(x))
    ours.dropout = theirs.dropout = 0.0
    assert_match(ours(x), theirs(x))
