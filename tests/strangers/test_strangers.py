"""Other libraries' own cells, as their users call them, held against the loops that their users write.

`make strangers` installs the libraries and runs this; they are imported by the tests that need them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from matching import assert_match
from unrolled.trees import Tree, leaves, map_leaves

pytestmark = pytest.mark.strangers
T, B, I, H = 4, 3, 4, 6
LENGTHS = [4, 1, 2]


def of(path: str, *args: Any, **options: Any) -> Any:
    """Call what is found at `module:name`."""
    module, name = path.split(":")
    return getattr(import_module(module), name)(*args, **options)


class AfterLinear(nn.Module):
    """A neuron of snntorch's, which takes what it returned: `spikes, *state = neuron(x, *state)`."""

    def __init__(self, neuron: nn.Module, *, spikes_are_state: bool = False) -> None:
        super().__init__()
        self.linear, self.neuron, self.spikes_are_state = nn.Linear(I, H), neuron, spikes_are_state

    def forward(self, input: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, Tree]:
        spikes, *rest = self.neuron(self.linear(3 * input), *state)
        return spikes, (spikes, *rest) if self.spikes_are_state else tuple(rest)


class OfNorse(nn.Module):
    """A neuron of norse's, which takes a named tuple and returns one."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.linear, self.neuron = nn.Linear(I, H), neuron

    def forward(self, input: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        return self.neuron(40 * self.linear(input), state)


def zeros(many: int) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(B, H) for _ in range(many))


def snn(name: str, *args: Any, many: int, rest: bool = False, **options: Any) -> tuple[nn.Module, Tree]:
    return AfterLinear(of(f"snntorch:{name}", *args, **options), spikes_are_state=rest), zeros(many)


def norse(name: str, *args: Any) -> tuple[nn.Module, Tree]:
    neuron = of(f"norse.torch:{name}", *args)
    _, state = neuron(torch.zeros(B, H), None)
    return OfNorse(neuron), map_leaves(lambda x: torch.zeros(B, H), state)


def ncps(name: str, *args: Any, **options: Any) -> tuple[nn.Module, Tree]:
    """With the time between steps as a part of the input."""
    cell = of(f"ncps.torch:{name}", *args, **options)
    units = H if name == "CfCCell" else 12
    return ur.as_cell(cell, step=lambda cell, x, state: cell(x[0], state, x[1])), torch.zeros(B, units)


def wiring() -> Any:
    made = of("ncps.wirings:AutoNCP", 12, 3)
    made.build(I)
    return made


GIVEN: dict[str, Callable[[], tuple[nn.Module, Tree]]] = {
    "snntorch Leaky": lambda: snn("Leaky", 0.9, many=1, learn_beta=True),
    "snntorch Leaky, to zero": lambda: snn("Leaky", 0.9, many=1, reset_mechanism="zero", learn_threshold=True),
    "snntorch Leaky, fast sigmoid": lambda: snn(
        "Leaky", 0.9, many=1, spike_grad=of("snntorch.surrogate:fast_sigmoid", slope=25)
    ),
    "snntorch Synaptic": lambda: snn("Synaptic", 0.9, 0.8, many=2),
    "snntorch Alpha": lambda: snn("Alpha", 0.9, 0.8, many=3),
    "snntorch Lapicque": lambda: snn("Lapicque", beta=0.9, many=1),
    "snntorch RLeaky": lambda: snn("RLeaky", 0.9, linear_features=H, many=2, rest=True),
    "snntorch RSynaptic": lambda: snn("RSynaptic", 0.9, 0.8, linear_features=H, many=3, rest=True),
    "snntorch SLSTM": lambda: snn("SLSTM", H, H, many=2),
    "norse LIFCell": lambda: norse("LIFCell"),
    "norse LIFRecurrentCell": lambda: norse("LIFRecurrentCell", H, H),
    "norse LSNNCell": lambda: norse("LSNNCell"),
    "norse LIFAdExCell": lambda: norse("LIFAdExCell"),
    "norse LICell": lambda: norse("LICell"),
    "ncps CfCCell": lambda: ncps("CfCCell", I, H, backbone_units=7),
    "ncps CfCCell, pure": lambda: ncps("CfCCell", I, H, mode="pure", backbone_units=7),
    "ncps WiredCfCCell": lambda: ncps("WiredCfCCell", I, wiring()),
    "ncps LTCCell": lambda: ncps("LTCCell", wiring(), I, ode_unfolds=3),
}


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make()


def inputs_of(name: str) -> Tree:
    x = torch.randn(T, B, I)
    return (x, torch.rand(T, B, 1) + 0.5) if name.startswith("ncps") else x


def by_hand(cell: nn.Module, x: Tree, state: Tree) -> tuple[Tensor, Tree]:
    outputs = []
    for t in range(len(leaves(x)[0])):
        output, state = cell(map_leaves(lambda leaf, t=t: leaf[t], x), state)
        outputs.append(output)
    return torch.stack(outputs), state


def numbers(cell: nn.Module, run: Callable[..., tuple[Tensor, Tree]], x: Tree, *rest: Any) -> list[Tensor]:
    """Outputs, the last state and all gradients, zeros where there are none."""
    x = map_leaves(lambda leaf: leaf.clone().requires_grad_(), x)
    found = leaves(run(x, *rest))
    loss = sum((y * torch.linspace(0.5, 1.5, y.numel()).view(y.shape)).sum() for y in found)
    by = [p for p in (*leaves(x), *cell.parameters()) if p.requires_grad]
    grads = torch.autograd.grad(loss, by, allow_unused=True)
    return [*found, *(torch.zeros_like(p) if g is None else g for p, g in zip(by, grads, strict=True))]


def assert_trained_alike(cell: nn.Module, own: nn.Module, runs: Iterator[Callable[[], Tensor]]) -> None:
    runs = list(runs)
    optimisers = [torch.optim.SGD([p for p in one.parameters() if p.requires_grad], 1e-2) for one in (cell, own)]
    for _ in range(5):
        for optimiser, run in zip(optimisers, runs, strict=True):
            optimiser.zero_grad()
            run().square().sum().backward()
            optimiser.step()
    assert_match(list(cell.parameters()), list(own.parameters()), bound=1e-4)


@pytest.mark.parametrize("name", GIVEN)
def test_a_cell_that_is_given_its_state(name):
    # Made twice, not copied: norse hangs a hook on its recurrent weights, which a copy does not have.
    (cell, start), (own, _) = (seeded(GIVEN[name]) for _ in range(2))
    x, rnn = inputs_of(name), ur.unroll(cell)
    wanted = numbers(own, lambda *given: by_hand(own, *given), x, start)
    assert_match(numbers(cell, rnn, x, start), wanted)
    assert rnn.ran == "native", rnn.plan(x, start).why
    # A run of the cell's own, of another batch, leaves things in its attributes.
    by_hand(cell, map_leaves(lambda leaf: leaf[:2, :2], x), map_leaves(lambda leaf: leaf[:2], start))
    assert_match(numbers(cell, rnn, x, start), wanted)
    assert rnn.ran == "native", rnn.plan(x, start).why
    first, state = rnn(map_leaves(lambda leaf: leaf[:2], x), start)
    second, _ = rnn(map_leaves(lambda leaf: leaf[2:], x), state)
    assert_match(torch.cat([first, second]), wanted[0])
    ragged, _ = rnn(x, start, lengths=LENGTHS)
    assert rnn.ran == "native", rnn.plan(x, start, lengths=LENGTHS).why
    for row, length in enumerate(LENGTHS):
        assert_match(ragged[:length, row], wanted[0][:length, row])
    assert_trained_alike(cell, own, iter([lambda: rnn(x, start)[0], lambda: by_hand(own, x, start)[0]]))


def net_of(neuron: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(I, H), neuron(), nn.Linear(H, H), neuron())


STATEFUL: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "spikingjelly IFNode": (lambda: of("spikingjelly.activation_based.neuron:IFNode"), ("v",)),
    "spikingjelly LIFNode": (lambda: of("spikingjelly.activation_based.neuron:LIFNode"), ("v",)),
    "spikingjelly LIFNode, soft reset, ATan": (
        lambda: of(
            "spikingjelly.activation_based.neuron:LIFNode",
            v_reset=None,
            detach_reset=True,
            surrogate_function=of("spikingjelly.activation_based.surrogate:ATan"),
        ),
        ("v",),
    ),
    "spikingjelly ParametricLIFNode": (lambda: of("spikingjelly.activation_based.neuron:ParametricLIFNode"), ("v",)),
    "spikingjelly IzhikevichNode": (lambda: of("spikingjelly.activation_based.neuron:IzhikevichNode"), ("v", "w")),
    "snntorch Leaky": (lambda: of("snntorch:Leaky", 0.9, init_hidden=True), ("mem",)),
    "snntorch Synaptic": (lambda: of("snntorch:Synaptic", 0.9, 0.8, init_hidden=True), ("mem", "syn")),
    "snntorch RLeaky": (
        lambda: of("snntorch:RLeaky", 0.9, linear_features=H, init_hidden=True),
        ("mem", "spk"),
    ),
}


def stateful_by_hand(net: nn.Module, x: Tensor) -> Tensor:
    for part in net.modules():
        reset = next((found for n in ("reset", "reset_mem") if callable(found := getattr(part, n, None))), None)
        if reset is not None:
            reset()
    return torch.stack([net(step) for step in x])


@pytest.mark.parametrize("name", STATEFUL)
def test_a_net_that_keeps_its_state_in_attributes(name):
    torch.manual_seed(0)
    neuron, attributes = STATEFUL[name]
    net = net_of(neuron)
    own, x, rnn = copy.deepcopy(net), 3 * torch.randn(T, B, I), ur.unroll(net)
    wanted = numbers(own, lambda given: stateful_by_hand(own, given), x)
    outputs, state = rnn(x)
    assert tuple(state) == tuple(f"{part}.{attribute}" for part in (1, 3) for attribute in attributes)
    assert_match(numbers(net, lambda given: rnn(given)[0], x), wanted)
    assert rnn.ran == "native", rnn.plan(x).why
    stateful_by_hand(net, x[:2, :2])
    assert_match(rnn(x)[0], outputs)
    assert rnn.ran == "native", rnn.plan(x).why
    first, state = rnn(x[:2])
    assert_match(torch.cat([first, rnn(x[2:], state)[0]]), outputs)
    ragged, _ = rnn(x, lengths=LENGTHS)
    assert rnn.ran == "native", rnn.plan(x, lengths=LENGTHS).why
    for row, length in enumerate(LENGTHS):
        assert_match(ragged[:length, row], outputs[:length, row])
    assert_trained_alike(net, own, iter([lambda: rnn(x)[0], lambda: stateful_by_hand(own, x)]))
