"""Rows that end at different times, against full batches and torch.nn's packed sequences; layers and directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import unrolled as ur
from benchmarks.timing import Target, in_turn

__all__ = ["targets"]

T, B, I, H = 784, 64, 16, 128


def drawn_lengths() -> Tensor:
    """Lengths `[B]` of a geometric law whose mean is T / 4; the longest is T."""
    torch.manual_seed(0)
    drawn = torch.distributions.Geometric(4 / T).sample((B,)).long() + 1
    drawn[0] = T
    return drawn.clamp(max=T)


def training(network: nn.Module, *given: object, **options: object) -> Callable[[], object]:
    """Forward, backward and weight gradients of a loss over all that comes out."""

    def step() -> None:
        network.zero_grad()
        outputs = network(*given, **options)[0]
        (outputs.data if isinstance(outputs, PackedSequence) else outputs).sum().backward()

    return step


def targets() -> Iterator[Target]:
    """Ours over the full batch and over torch.nn's layer with a PackedSequence."""
    lengths, inputs = drawn_lengths(), torch.randn(T, B, I)
    share = float(lengths.sum()) / (T * B)
    yield Target(f"  lengths of a geometric law, mean T / 4: their sum / T x B, at {(T, B, I, H)}", share, None)
    packed = pack_padded_sequence(inputs, lengths, enforce_sorted=False)
    for kind, most in (("LSTM", 0.7), ("GRU", 0.5)):
        ours, theirs = getattr(ur, kind)(I, H), getattr(nn, kind)(I, H)
        runs = [training(ours, inputs, lengths=lengths), training(ours, packed)]
        a, b, full, other = in_turn(*runs, training(ours, inputs), training(theirs, packed), rounds=5)
        yield Target(f"{kind} training with lengths / the full batch", a / full, 0.4)
        yield Target(f"{kind} training / torch.nn.{kind}, both with a PackedSequence", b / other, most)
        yield Target(f"{kind} training: a PackedSequence / padded inputs with lengths", b / a, 1.1)
    yield _two_layers_both_ways()


def _two_layers_both_ways() -> Target:
    inputs = torch.randn(100, 32, 128)
    made = [module(128, 128, num_layers=2, bidirectional=True) for module in (ur.LSTM, nn.LSTM)]
    a, b = in_turn(*(training(layer, inputs) for layer in made))
    return Target("2-layer bidirectional LSTM (100, 32, 128, 128) training / torch.nn.LSTM", a / b, 0.95)
