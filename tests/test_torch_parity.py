"""Values and all gradients against torch.nn's layers, and weights to and from them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from matching import assert_match
from unrolled.trees import Tree, leaves, map_leaves

I, H = 3, 5

KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "RNN": (nn.RNN, {}),
    "RNN relu": (nn.RNN, {"nonlinearity": "relu"}),
    "LSTM": (nn.LSTM, {}),
    "GRU": (nn.GRU, {}),
}


def torch_cell(layer: nn.Module, **options: Any) -> nn.Module:
    return getattr(nn, type(layer).__name__ + "Cell")(I, H, **options)


def our_cell(layer: nn.Module, **options: Any) -> nn.Module:
    return getattr(ur, type(layer).__name__ + "Cell")(I, H, **options)


def our_layer(layer: nn.Module, batch_first: bool, **options: Any) -> nn.Module:
    return getattr(ur, type(layer).__name__)(I, H, batch_first=batch_first, **options)


FORMS: dict[str, Callable[..., nn.Module]] = {
    "unroll": lambda layer, batch_first, **options: ur.unroll(our_cell(layer, **options), batch_first=batch_first),
    "layer": our_layer,
    "as_cell": lambda layer, batch_first, **options: ur.unroll(
        ur.as_cell(torch_cell(layer, **options)), batch_first=batch_first
    ),
}


def copy_weights(layer: nn.Module, ours: nn.Module) -> dict[str, Tensor]:
    """Give ours the layer's numbers; return ours by the layer's names."""
    own = {name.split(".")[-1].removesuffix("_l0") + "_l0": p for name, p in ours.named_parameters()}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            own[name].copy_(parameter)
    return own


def random_state(layer: nn.Module, B: int, dtype: torch.dtype) -> Tree:
    h, c = torch.randn(2, 1, B, H, dtype=dtype).unbind()
    return (h, c) if isinstance(layer, nn.LSTM) else h


def asking(tree: Tree) -> Tree:
    return None if tree is None else map_leaves(lambda x: x.detach().clone().requires_grad_(), tree)


def answers(
    rnn: nn.Module, weights: dict[str, Tensor], inputs: Tensor, state: Tree, cell_state: bool
) -> dict[str, Tree]:
    """Outputs, last state and every gradient of one run, all in torch.nn's layout."""
    inputs, state = asking(inputs), asking(state)
    given = map_leaves(lambda h: h.squeeze(0), state) if cell_state and state is not None else state
    outputs, last = rnn(inputs) if given is None else rnn(inputs, given)
    last = map_leaves(lambda h: h.unsqueeze(0), last) if cell_state else last
    loss = sum((leaf * torch.linspace(-1, 1, leaf.numel()).view_as(leaf)).sum() for leaf in [outputs, *leaves(last)])
    asked = {"inputs": inputs, **weights}
    asked |= {f"state {i}": leaf for i, leaf in enumerate(leaves(state))}
    grads = torch.autograd.grad(loss, list(asked.values()))
    return {"outputs": outputs, "last state": last, "gradient of": dict(zip(asked, grads, strict=True))}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["TBI", "BTI"])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_all_gradients_are_those_of_torch_nn(kind, form, dtype, B, batch_first, bias):
    layer_type, options = KINDS[kind]
    layer = layer_type(I, H, batch_first=batch_first, bias=bias, **options).to(dtype)
    ours = FORMS[form](layer, batch_first, bias=bias, **options).to(dtype)
    weights = copy_weights(layer, ours)
    mine = {name: weights[name] for name, _ in layer.named_parameters()}
    for T, with_state in itertools.product([1, 2, 7, 64], [False, True]):
        inputs = torch.randn((B, T, I) if batch_first else (T, B, I), dtype=dtype)
        state = random_state(layer, B, dtype) if with_state else None
        want = answers(layer, dict(layer.named_parameters()), inputs, state, cell_state=False)
        assert_match(answers(ours, mine, inputs, state, form != "layer"), want, f"{T=} {with_state=}: ")


@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["TBI", "BTI"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_takes_one_sequence_without_a_batch_as_torch_nn_does(kind, batch_first, with_state):
    layer_type, options = KINDS[kind]
    layer = layer_type(I, H, batch_first=batch_first, **options).double()
    ours = our_layer(layer, batch_first, **options).double()
    ours.load_state_dict(layer.state_dict())
    inputs = torch.randn(7, I, dtype=torch.float64)
    state = map_leaves(lambda h: h.squeeze(1), random_state(layer, 1, torch.float64)) if with_state else None
    want = answers(layer, dict(layer.named_parameters()), inputs, state, cell_state=False)
    assert_match(answers(ours, dict(ours.named_parameters()), inputs, state, cell_state=False), want)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["unroll", "layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_torch_nns_initial_parameters(kind, form, bias):
    layer_type, options = KINDS[kind]
    torch.manual_seed(3)
    layer = layer_type(I, H, bias=bias, **options)
    torch.manual_seed(3)
    ours = FORMS[form](layer, False, bias=bias, **options)
    for (theirs_name, theirs), (_, own) in zip(layer.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(theirs, own), theirs_name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [torch_cell, lambda layer, **o: type(layer)(I, H, **o)], ids=["cell", "layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_load_strictly_in_both_directions(kind, make, bias):
    layer_type, options = KINDS[kind]
    theirs = make(layer_type(I, H, **options), bias=bias, **options)
    ours = getattr(ur, type(theirs).__name__)(I, H, bias=bias, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_match(dict(ours.state_dict()), dict(theirs.state_dict()))
    again = make(layer_type(I, H, **options), bias=bias, **options)
    again.load_state_dict(ours.state_dict(), strict=True)
    assert_match(dict(again.state_dict()), dict(theirs.state_dict()))


THEIRS: dict[str, Callable[..., nn.Module]] = {
    "RNN": nn.RNN,
    "RNN relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    "RNN batch_first": lambda *sizes, **options: nn.RNN(*sizes, batch_first=True, **options),
    "LSTM": nn.LSTM,
    "LSTM batch_first": lambda *sizes, **options: nn.LSTM(*sizes, batch_first=True, **options),
    "GRU": nn.GRU,
    "GRU without bias": lambda *sizes, **options: nn.GRU(*sizes, bias=False, **options),
    "RNNCell": nn.RNNCell,
    "RNNCell relu": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
    "LSTMCell": nn.LSTMCell,
    "LSTMCell without bias": lambda *sizes, **options: nn.LSTMCell(*sizes, bias=False, **options),
    "GRUCell": nn.GRUCell,
}


def marked(module: nn.Module) -> nn.Module:
    """A module with a mode and a requires_grad of which a careless copy would lose one."""
    next(module.parameters()).requires_grad_(False)
    return module.eval()


def settings(module: nn.Module) -> dict[str, Any]:
    found = {name: (p.requires_grad, p.dtype, p.device) for name, p in module.named_parameters()}
    options = ("input_size", "hidden_size", "bias", "batch_first", "nonlinearity")
    return found | {name: getattr(module, name, None) for name in options} | {"training": module.training}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", THEIRS)
def test_from_torch_and_back_keeps_numbers_options_dtype_mode_and_requires_grad(name, dtype):
    theirs = marked(THEIRS[name](I, H, dtype=dtype))
    ours = ur.from_torch(theirs)
    back = ur.to_torch(ours)
    assert type(ours).__module__.startswith("unrolled")
    assert type(ours).__name__ == type(back).__name__ == type(theirs).__name__
    assert settings(theirs) == settings(ours) == settings(back)
    assert_match(dict(back.state_dict()), dict(theirs.state_dict()), bound=0)


@pytest.mark.parametrize("name", THEIRS)
def test_converted_modules_share_no_memory_with_their_source(name):
    theirs = THEIRS[name](I, H)
    modules = [theirs, ur.from_torch(theirs)]
    modules.append(ur.to_torch(modules[1]))
    with torch.no_grad():
        for k, module in enumerate(modules):
            for parameter in module.parameters():
                parameter.fill_(k)
    assert [{p.mean().item() for p in module.parameters()} for module in modules] == [{0.0}, {1.0}, {2.0}]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("adapted", [False, True], ids=["our cell", "torch.nn's cell"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_unrolled_cell_becomes_torch_nns_layer(kind, adapted, batch_first):
    layer_type, options = KINDS[kind]
    make = torch_cell if adapted else our_cell
    rnn = marked(ur.unroll(make(layer_type(I, H), **options), batch_first=batch_first)).double()
    layer = ur.to_torch(rnn)
    assert type(layer) is layer_type
    assert layer.batch_first == batch_first
    assert not layer.training
    assert [p.requires_grad for p in layer.parameters()] == [p.requires_grad for p in rnn.parameters()]
    inputs = torch.randn(2, 3, I, dtype=torch.float64)
    assert_match(layer(inputs)[0], rnn(inputs)[0])


LAYERS = [(ur.RNN, nn.RNN), (ur.LSTM, nn.LSTM), (ur.GRU, nn.GRU)]


@pytest.mark.parametrize("wrap", [lambda cell: cell, ur.unroll], ids=["cell", "unrolled"])
@pytest.mark.parametrize("cell", [ur.RNNCell, ur.LSTMCell, ur.GRUCell])
def test_a_learned_initial_state_has_no_place_in_torch_nn(cell, wrap):
    with pytest.raises(ur.OptionError, match="learned initial state"):
        ur.to_torch(wrap(cell(I, H, learn_initial_state=True)))


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Transformer, 3], ids=["Linear", "class", "number"])
@pytest.mark.parametrize("convert", [ur.from_torch, ur.to_torch])
def test_conversion_refuses_what_it_does_not_know(convert, module):
    with pytest.raises(ur.OptionError, match=type(module).__name__):
        convert(module)


@pytest.mark.parametrize(("ours", "theirs"), LAYERS)
def test_layers_take_the_constructor_arguments_of_torch_nn_by_position(ours, theirs):
    extra = ("tanh",) if ours is ur.RNN else ()
    arguments = (I, H, 1, *extra, False, True, 0.0, False)
    assert settings(ours(*arguments)) == settings(theirs(*arguments)) | {
        "nonlinearity": getattr(ours(*arguments), "nonlinearity", None)
    }


@pytest.mark.parametrize(
    "options",
    [
        {"step": lambda module, x, h: (2 * module(x, h), module(x, h))},
        {"state": lambda batch_size, device=None, dtype=None: torch.ones(batch_size, H)},
    ],
    ids=["own step", "own state"],
)
def test_to_torch_never_drops_what_the_user_gave(options):
    with pytest.raises(ur.OptionError, match="AdaptedCell"):
        ur.to_torch(ur.unroll(ur.as_cell(torch.nn.GRUCell(I, H), **options)))
